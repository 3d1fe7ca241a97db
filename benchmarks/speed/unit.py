"""The unit alone, beside a copy: which share of the memory's speed do its kernels reach?

Forward reads two tensors and writes one, backward (beside its inputs: in place, the numbers would be others in each
round) reads three and writes two, a copy reads one and writes one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.speed.clock import interleaved
from hf_geglu.ops import pointwise

MOVED = {"copy": 2, "forward": 3, "backward": 5}
"""Tensors read and written."""

CALLS = 10
"""In one measurement: one is over too soon."""


def measure(
    *, width: int, tokens: int, dtype: str, activation: str, seconds: float, device: str = "cpu"
) -> dict[str, Any]:
    """Bytes a second of each pass over those of a copy."""
    kind = getattr(torch, dtype)
    gate, value, hidden = (torch.randn(tokens, width, device=device).to(kind) for _ in range(3))
    into, beside = torch.empty_like(gate), (torch.empty_like(gate), torch.empty_like(gate))
    passes: dict[str, Callable[[], object]] = {
        "copy": lambda: into.copy_(gate),
        "forward": lambda: pointwise.forward(gate, value, activation),
        "backward": lambda: pointwise.backward(gate, value, hidden, activation, 0.0, beside),
    }

    def often(run: Callable[[], object]) -> Callable[[], object]:
        return lambda: [run() for _ in range(CALLS)]

    runs = {name: often(run) for name, run in passes.items()}
    times = interleaved(runs, device=device, seconds=seconds, rounds=(5, 101))
    speeds = {name: MOVED[name] / statistics.median(own) for name, own in times.items()}
    return {"share of a copy's speed": {name: round(speed / speeds["copy"], 3) for name, speed in speeds.items()}}
