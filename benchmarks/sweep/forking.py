"""A server that runs each job in a forked child of its own: a crash, a hang or a leak ends one job and nothing else.

    python -m benchmarks.sweep.forking HANDLER SECONDS GIGABYTES MODULE...

It imports the modules once, then reads one job (JSON) a line and answers with one result (JSON) a line. A child starts
with exactly what the server has imported, in a few milliseconds instead of the seconds that torch and transformers
take; what a child imports, builds or registers dies with it. So a reading server that imported torch and transformers
only serves as a fresh process for every job.

HANDLER is "module:function"; the function takes the job and a callable that keeps what is known so far, and returns
the result. Where the child does not live to return, the last that it kept is answered, with the reason under "crash".
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Keep = Callable[[Job], None]
Handler = Callable[[Job, Keep], Job]

_POLL = 0.02
_TAIL = 1500
"""Characters of a dead child's last words that are kept."""


def serve(handler: str, seconds: float, gigabytes: float, modules: list[str]) -> None:
    """Answer jobs from stdin until it ends."""
    for name in modules:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not be taken for an answer
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        answer = run_in_child(handler, json.loads(line), seconds=seconds, gigabytes=gigabytes)
        print(json.dumps(answer), file=answers, flush=True)


def run_in_child(handler: str, job: Job, *, seconds: float, gigabytes: float) -> Job:
    """One job in a fork of this process. Never raises for what the child does."""
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        kept, words = Path(folder, "result.json"), Path(folder, "words.txt")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _work(handler, job, kept, words, gigabytes)
        how = _wait(child, seconds)
        result: Job = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        if how:
            last = words.read_text(encoding="utf-8", errors="replace")[-_TAIL:] if words.exists() else ""
            result["crash"] = f"{how}: {last.strip().splitlines()[-1][:300]}" if last.strip() else how
        return result


def _work(handler: str, job: Job, kept: Path, words: Path, gigabytes: float) -> None:
    """The child's life; it never returns."""
    status = 1
    try:
        os.setsid()
        size = int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        file = os.open(words, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)

        def keep(result: Job) -> None:
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(result), encoding="utf-8")
            part.replace(kept)

        module, _, function = handler.partition(":")
        keep(getattr(importlib.import_module(module), function)(job, keep))
        status = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".replace("\n", " ").encode() + b"\n")
    finally:
        os._exit(status)


def _wait(child: int, seconds: float) -> str:
    """How the child ended, "" where all was well."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"stopped after {seconds:.0f} s"
        time.sleep(_POLL)
    if os.WIFSIGNALED(status):
        return f"ended by signal {signal.Signals(os.WTERMSIG(status)).name}"
    return "" if os.WEXITSTATUS(status) == 0 else "failed"


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
