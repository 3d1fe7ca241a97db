"""Jobs for the forking server's tests: children that die in the ways real ones do."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def well(job: dict[str, Any], keep: Any) -> dict[str, Any]:
    print("noise that is no answer")
    return {"twice": 2 * job["number"]}


def killed(job: dict[str, Any], keep: Any) -> dict[str, Any]:
    keep({"known": "so far"})
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def hangs(job: dict[str, Any], keep: Any) -> dict[str, Any]:
    keep({"known": "so far"})
    time.sleep(600)
    return {}


def greedy(job: dict[str, Any], keep: Any) -> dict[str, Any]:
    return {"bytes": len(bytearray(64 * 2**30))}


def any_of_them(job: dict[str, Any], keep: Any) -> dict[str, Any]:
    handler: Any = globals()[job["how"]]
    result: dict[str, Any] = handler(job, keep)
    return result
