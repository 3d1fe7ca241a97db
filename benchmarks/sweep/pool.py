"""Deals model types out to pairs of servers, one that converts and one that reads, and appends each row to a file."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweep.forking import Job
from benchmarks.sweep.scrubbing import ROOT, scrub

CONVERTING = (
    "transformers",
    "transformers.modeling_utils",
    "hf_geglu",
    "hf_geglu.converting",
    "benchmarks.zoo.building",
    "benchmarks.opinions.comparing",
    "benchmarks.sweep.converting",
)
READING = ("transformers", "transformers.modeling_utils", "safetensors.torch", "benchmarks.sweep.reading")
EXTRAS = "benchmarks.zoo.with_extras"
"""Imported first by both sides."""

ENVIRONMENT = {
    # MKL picks its kernels by the shape of a product; this makes an output's arithmetic independent of the width
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """For one job of one side."""

    seconds: float = 120.0
    gigabytes: float = 8.0


class Server:
    """A child process that answers one job at a time."""

    def __init__(self, handler: str, modules: Iterable[str], limits: Limits) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.sweep.forking", handler]
        command += [str(limits.seconds), str(limits.gigabytes), EXTRAS, *modules]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | ENVIRONMENT,
            cwd=ROOT,
        )

    def ask(self, job: Job) -> Job:
        """The answer to one job. Raises RuntimeError where the server itself is gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def wait_until_ready(self) -> None:
        """Returns when the modules are imported."""
        self._answer()

    def _answer(self) -> Job:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a server ended with status {self._process.wait()}")
        answer: Job = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def sweep(
    types: list[str],
    rows: Path,
    *,
    partial: Callable[[str], bool],
    processes: int,
    limits: Limits,
    done: Callable[[Job], None],
) -> None:
    """One row a type, in the order in which they are finished, appended to `rows` (JSON lines).

    Args:
        types: the model types.
        rows: the file; each row is written with one write, so that a killed run leaves whole lines.
        partial: whether the first block's conversion alone is saved and read too, for a type.
        processes: how many types at a time.
        limits: for each job.
        done: called with every row.
    """
    lock = threading.Lock()

    def work(name: str, servers: tuple[Server, ...]) -> None:
        row = scrub(one(name, *servers, partial=partial(name)))
        with lock, rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            done(row)

    sides = [
        ("benchmarks.sweep.converting:convert", CONVERTING),
        ("benchmarks.sweep.reading:read", READING),
    ]
    deal(types, sides, work, processes=processes, limits=limits)


def deal(
    types: list[str],
    sides: Sequence[tuple[str, Iterable[str]]],
    work: Callable[[str, tuple[Server, ...]], None],
    *,
    processes: int,
    limits: Limits,
) -> None:
    """Call `work` on every type, `processes` at a time, each time with servers of its own.

    Args:
        types: the model types.
        sides: (handler, modules to import first) of each server that `work` needs.
        work: takes a type and the servers; called from several threads. What it raises ends everything.
        processes: how many at a time.
        limits: for each job.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in types:
        waiting.put(name)
    failures: list[BaseException] = []

    def loop() -> None:
        servers = tuple(Server(handler, modules, limits) for handler, modules in sides)
        try:
            for server in servers:
                server.wait_until_ready()
            while not failures:
                work(waiting.get_nowait(), servers)
        except queue.Empty:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            for server in servers:
                server.close()

    threads = [threading.Thread(target=loop) for _ in range(min(processes, len(types)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def one(name: str, converting: Server, reading: Server, *, partial: bool) -> dict[str, Any]:
    """The row of one type."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        answer = converting.ask({"type": name, "folder": folder, "partial": partial})
        row: dict[str, Any] = answer.get("row") or {"type": name}
        row["crash"] = answer.get("crash", "")
        read_start = time.perf_counter()
        row["reads"] = [
            {"what": job["what"], "way": job["way"], **_as_error(reading.ask(job))} for job in answer.get("reads", [])
        ]
        if not all(map(is_identical, row["reads"])):
            row["reads"] += _original(name, folder, converting, reading)
    row.setdefault("seconds", {})
    row["seconds"]["read"] = round(time.perf_counter() - read_start, 3)
    row["seconds"]["all"] = round(time.perf_counter() - start, 3)
    return row


def is_identical(read: Mapping[str, Any]) -> bool:
    """Whether what was loaded is what was saved, bit for bit."""
    return not any(read.get(key) for key in ("error", "difference", "weights", "missing", "unexpected", "mismatched"))


def _original(name: str, folder: str, converting: Server, reading: Server) -> list[dict[str, Any]]:
    """The same with the model as it was: does transformers itself give back what was saved?"""
    answer = converting.ask({"type": name, "folder": folder, "original": True})
    if answer.get("crash") or answer.get("error"):
        return [{"what": "original", "way": "plain", "error": answer.get("crash") or answer["error"]}]
    return [{"what": job["what"], "way": job["way"], **_as_error(reading.ask(job))} for job in answer["reads"]]


def _as_error(answer: Job) -> Job:
    crash = answer.pop("crash", "")
    return {**answer, "error": crash} if crash else answer
