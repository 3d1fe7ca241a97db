"""Times of several sides of one comparison: taken in turns, and told as ratios only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    # One thread: its CPU time, which other processes do not lengthen. More threads: the clock on the wall, since the
    # waiting for each other is part of the cost.
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleaved(
    sides: Mapping[str, Callable[[], object]], *, device: str, seconds: float, rounds: tuple[int, int]
) -> dict[str, list[float]]:
    """Seconds of each side, round by round, each round beginning with another side; two rounds go first, unmeasured.

    Args:
        sides: what is timed. device: cpu or cuda. seconds: after so long no further round begins.
        rounds: at least and at most so many.
    """
    names = list(sides)
    for _ in range(2):
        for side in sides.values():
            side()
    found: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(rounds[1]):
        if number >= rounds[0] and time.perf_counter() - begin > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = _now(device)
            sides[name]()
            found[name].append(_now(device) - start)
    return found


def ratios(times: Mapping[str, list[float]], *, over: str) -> dict[str, float]:
    """Median over the rounds of each side's time over that of the side `over` in the same round."""
    return {
        name: round(statistics.median(a / b for a, b in zip(own, times[over], strict=True)), 4)
        for name, own in times.items()
    }
