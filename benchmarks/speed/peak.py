"""The job that measures a peak: `block` or `step`, one side a process, so that no side pays for another's memory."""

from __future__ import annotations

import importlib
from typing import Any


def measure(*, of: str, **options: Any) -> float:
    """`measure_peak` of that module."""
    peak: float = importlib.import_module(f"benchmarks.speed.{of}").measure_peak(**options)
    return peak
