"""How much memory a piece of work takes at its peak, on the device that it runs on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

INTERVAL = 0.002
"""Seconds between two looks at the memory of the process: allocations of a step live far longer."""


@dataclass
class Peak:
    """The largest that was seen, in bytes; of a CPU the whole process, of a GPU what torch has allocated there."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch the memory while the block runs; the figure is there when it has ended."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    process, stop = psutil.Process(), threading.Event()

    def watch() -> None:
        while True:
            peak.bytes = max(peak.bytes, int(process.memory_info().rss))
            if stop.wait(INTERVAL):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
