"""One side in a process of its own (see benchmarks/speed/process.py)."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout, suppress
from typing import Any

from benchmarks.peers.material import Texts
from benchmarks.peers.meter import Enough, Meter
from benchmarks.peers.sides import LAUNCH, Request


def measure(*, side: str, texts: dict[str, Any], **request: Any) -> dict[str, Any]:
    """What the meter reads off one training of that side."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    wanted = Request(texts=Texts(texts["train"], texts["held_out"], tuple(texts["order"])), **request)
    meter = Meter(steps=wanted.steps)
    meter.install()
    with redirect_stdout(sys.stderr), suppress(Enough):
        LAUNCH[side](wanted)
    return meter.result()
