"""Runs of a recipe that kill themselves at a given moment: a process that has imported everything forks them.

What a run does to the disk (files opened for writing or written by safetensors, renamed, removed, synced; folders made
and removed) and each update of the weights is a moment; a run is told before which one it dies. A file that is being
written then is left half written.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class Forge:
    """Starts runs of one recipe in a folder, on one process or several."""

    def __init__(self, folder: Path, *, processes: int = 1) -> None:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_CACHE": str(folder / "cache"),
        }
        self._processes = processes
        self._log = folder / "runs.log"
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(processes), str(self._log)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, task: str, flags: Sequence[str], *, at: int = -1, process: int = 0) -> tuple[str, list[int]]:
        """Run; how it ended ("done", "killed" or "failed"), and how many moments each process had.

        Args:
            task: name of the recipe.
            flags: its command line.
            at: number of the moment, from 1, before which that process dies; -1: never.
            process: which of several.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write("\t".join([str(at), str(process), task, *flags]) + "\n")
        self._server.stdin.flush()
        word, *counts = self._server.stdout.readline().split()
        assert word != "failed", self._log.read_text()[-3000:]
        return word, [int(count) for count in counts]

    def close(self) -> None:
        """End the process that forks."""
        self._server.communicate()


class _Moments:
    """Counts, and kills this process before number `at`."""

    def __init__(self, at: int, told: int) -> None:
        self._at, self._told = at, told
        self.count = 0
        self._lock = threading.Lock()

    def pass_by(self, before_death: Callable[[], Any] = lambda: None) -> None:
        with self._lock:
            self.count += 1
            os.pwrite(self._told, f"{self.count:10}".encode(), 0)
            if self.count == self._at:
                self._at = 0
                with suppress(OSError):
                    before_death()
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        import safetensors.torch
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        here = os.getcwd()
        cache = os.environ["HF_DATASETS_CACHE"]

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and any(letter in str(arguments[1]) for letter in "wax+")
            if not (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")):
                return
            path = os.path.abspath(str(arguments[0]))
            if path.startswith(here) and not path.startswith(cache):
                self.pass_by()

        real_save, real_fsync = safetensors.torch.serialize_file, os.fsync

        def save(tensors: Any, path: Any, metadata: Any = None) -> None:
            def torn() -> None:
                real_save(tensors, path, metadata=metadata)
                os.truncate(path, os.path.getsize(path) // 2)

            self.pass_by(torn)
            real_save(tensors, path, metadata=metadata)

        def fsync(handle: int) -> None:
            self.pass_by()
            real_fsync(handle)

        safetensors.torch.serialize_file = save
        os.fsync = fsync
        register_optimizer_step_pre_hook(lambda *_: self.pass_by())
        sys.addaudithook(audit)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _child(at: int, told: int, log: str, task: Any, flags: Sequence[str]) -> None:
    from hf_geglu.training.command_line import main

    code = 3
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        moments = _Moments(at, told)
        moments.watch()
        code = main(task, list(flags))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(processes: int, log: str) -> None:
    import warnings

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print (DeepSpeed does) are not taken for us
    warnings.simplefilter("ignore")
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torch
    import torch.distributed
    from matplotlib import pyplot  # noqa: F401
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: F401

    import hf_geglu.hub  # noqa: F401
    from hf_geglu.training import finetune  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        at, who, task, *flags = line.rstrip("\n").split("\t")
        told = [os.memfd_create(f"moments-{rank}") for rank in range(processes)]
        port = str(_free_port())
        children = []
        for rank in range(processes):
            child = os.fork()
            if not child:
                if processes > 1:  # what torchrun tells its workers
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                _child(int(at) if rank == int(who) else -1, told[rank], log, task, flags)
            children.append(child)
        ends = _wait(children)
        victim = ends[int(who)]
        word = "done" if not any(ends) else "killed" if victim == -signal.SIGKILL else "failed"
        print(word, *(int(os.pread(handle, 10, 0) or b"0") for handle in told), file=answers)
        for handle in told:
            os.close(handle)


def _wait(children: Sequence[int]) -> list[int]:
    """Exit codes; like a launcher it ends the others when one has died."""
    ends: dict[int, int] = {}
    while len(ends) < len(children):
        for child in children:
            if child not in ends:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    ends[child] = os.waitstatus_to_exitcode(status)
                    if ends[child] and len(ends) == 1:
                        for other in children:
                            if other != child:
                                os.kill(other, signal.SIGTERM)
        time.sleep(0.005)
    return [ends[child] for child in children]


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
