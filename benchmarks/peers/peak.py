"""One side for its memory, in a process whose allocator is as a user has it (see benchmarks/speed/process.py)."""

from __future__ import annotations

from benchmarks.peers.job import measure

__all__ = ["measure"]
