"""Killed at any moment, a folder is there completely or not at all, and the same call finishes it."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints import files_in
from tiny_models import tiny

from hf_geglu.checkpoint import convert_checkpoint, job

SHARDS = "8KB"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

# One process that does its work again and again in children, so that a kill costs a fork and not an import. A child
# counts what it does to the disk, and kills itself before step `at`; 0: it is slowed, and is killed from outside.
_CHILDREN = """
import os, signal, sys, threading, time
told = os.dup(1)
os.dup2(2, 1)  # libraries that print (DeepSpeed does) are not taken for us
import hf_geglu, torch
what, source, tests, warm, shards = sys.argv[1:]
sys.path.insert(0, tests)
torch.set_num_threads(1)
from calibration_inputs import data
from pathlib import Path
from safetensors.torch import save_file
from tiny_models import tiny
from hf_geglu.calibration import calibrate
model = tiny("bert")
hf_geglu.convert(model, verify="sites")
given = data(rows=8, tokens=12)
if what in ("calibrate", "in memory"):
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(source)
    plan = hf_geglu.make_plan(base)
    sys.modules["hf_geglu.calibration.gather"].SAVE_EVERY = 1

def calibrated(target):
    made = calibrate(base, plan, given, state=Path(f"{target}.state"))
    tensors = {f"{path} {name}": t.clone() for path, fit in made.fits.items() for name, t in fit.tensors().items()}
    os.makedirs(target, exist_ok=True)
    save_file(tensors, f"{target}/draft")
    os.rename(f"{target}/draft", f"{target}/fits.safetensors")

hf_geglu.convert_checkpoint(source, warm)  # everything imported
lock, steps, at = threading.Lock(), 0, None

def tell(*words):
    os.write(told, (" ".join(map(str, words)) + "\\n").encode())

def step():
    global steps
    with lock:
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
    if at == 0:
        time.sleep(0.001)

def audit(event, arguments):
    writes = event == "open" and "w" in str(arguments[1])
    if at is not None and (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")):
        step()

def counted(function):
    def call(*args, **kwargs):
        step()
        return function(*args, **kwargs)
    return call

sys.addaudithook(audit)
for name in ("pwrite", "fsync", "copy_file_range"):
    if hasattr(os, name):
        setattr(os, name, counted(getattr(os, name)))
for line in sys.stdin:
    at, target, *flags = line.split()
    at, overwrite = int(at), "overwrite" in flags
    child = os.fork()
    if not child:
        try:
            if what == "convert":
                hf_geglu.convert_checkpoint(source, target, max_shard_size=shards, overwrite=overwrite)
            elif what == "calibrate":
                hf_geglu.convert_checkpoint(
                    source, target, max_shard_size=shards, overwrite=overwrite, calibration=given
                )
            elif what == "in memory":
                calibrated(target)
            else:
                hf_geglu.save_folder(model, target, max_shard_size=shards, overwrite=overwrite)
            tell(steps)
            os._exit(0)
        except BaseException as error:
            tell("failed", error)
            os._exit(1)
    if at == 0:
        tell(child)
    _, status = os.waitpid(child, 0)
    tell("ended", status)
    at = None
"""


class Children:
    """Starts the work in a process of its own."""

    def __init__(self, what: str, base: Path) -> None:
        arguments = [what, str(base), str(Path(__file__).parent), str(base.parent / "warm"), SHARDS]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _CHILDREN, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, target: Path, flags: list[str], *, at: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join([str(at), str(target), *flags]) + "\n")
        self._process.stdin.flush()

    def line(self) -> list[str]:
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split()
        return self.line() if words and "[WARNING]" in words else words  # deepspeed's, on being imported

    def whole(self, target: Path, flags: list[str]) -> int:
        """Let it come to its end; how many steps that takes."""
        self.start(target, flags, at=-1)
        steps = self.line()
        assert self.line() == ["ended", "0"], steps
        return int(steps[0])

    def killed(self, target: Path, flags: list[str], *, at: int) -> bool:
        """Kill it before that step, or after `-at` milliseconds; whether that was before its end."""
        self.start(target, flags, at=max(at, 0))
        if at <= 0:
            child = int(self.line()[0])
            time.sleep(-at / 1000)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        last = self.line()
        while last[0] != "ended":
            last = self.line()
        return last == ["ended", str(int(signal.SIGKILL))]

    def close(self) -> None:
        self._process.communicate()


def _content(folder: Path, *, names_only: bool) -> dict[str, bytes]:
    """Papers that `save_folder` writes have a name and a time in them."""
    found = files_in(folder) if folder.exists() else {}
    return dict.fromkeys(found, b"") if names_only else found


def _check(what: str, tmp_path: Path, moments: int, *, by_step: bool) -> None:
    saves = what == "save"
    tiny("bert").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    children = Children(what, tmp_path / "base")
    chance = random.Random(0)
    killed = 0
    try:
        steps = children.whole(tmp_path / "whole", [])
        expected = _content(tmp_path / "whole", names_only=saves)
        assert len([name for name in expected if name.endswith(".safetensors")]) > 3
        assert steps > 20
        for number in range(moments):
            target, flags = tmp_path / f"out-{number}", []
            if number % 2:
                target.mkdir()
                (target / "old").write_text("the folder before")
                flags = ["overwrite"]
            before = _content(target, names_only=saves)
            at = chance.randint(1, steps) if by_step else -chance.randint(1, 3 * steps)
            killed += children.killed(target, flags, at=at)
            after = _content(target, names_only=saves)
            assert after in ({}, before, expected), (number, at)
            if after != expected:
                children.whole(target, flags)
            elif not saves and job.left_to_tidy(target):
                convert_checkpoint(tmp_path / "base", target, max_shard_size=SHARDS)
            assert _content(target, names_only=saves) == expected
            if after != expected:
                assert not (tmp_path / f".{target.name}.partial").exists()
    finally:
        children.close()
    assert killed if not by_step else killed == moments


@pytest.mark.parametrize("what", ["convert", "save"])
def test_killed_at_20_random_steps(tmp_path, what):
    _check(what, tmp_path, 20, by_step=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["convert", "save"])
def test_killed_at_100_random_times(tmp_path, what):
    _check(what, tmp_path, 100, by_step=False)


@pytest.mark.slow
def test_killed_at_every_step(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    children = Children("convert", tmp_path / "base")
    try:
        steps = children.whole(tmp_path / "whole", [])
        expected = files_in(tmp_path / "whole")
        for at in range(1, steps + 1):
            target = tmp_path / f"out-{at}"
            assert children.killed(target, [], at=at)
            assert (files_in(target) if target.exists() else {}) in ({}, expected)
            if not target.exists() or job.left_to_tidy(target):
                children.whole(target, [])
            assert files_in(target) == expected
            assert not (tmp_path / f".{target.name}.partial").exists() or files_in(target) == expected
    finally:
        children.close()


def test_finished_shards_are_not_written_again(tmp_path):
    """And a file that only looks finished is."""
    tiny("bert").save_pretrained(tmp_path / "base")
    children = Children("convert", tmp_path / "base")
    try:
        steps = children.whole(tmp_path / "whole", [])
        assert children.killed(tmp_path / "out", [], at=2 * steps // 3)
    finally:
        children.close()
    folder = tmp_path / ".out.partial" / "folder"
    there = sorted(folder.glob("*.safetensors"))
    assert there
    with there[0].open("r+b") as file:
        file.truncate(there[0].stat().st_size - 1)
    seen = []
    done = convert_checkpoint(
        tmp_path / "base", tmp_path / "out", max_shard_size=SHARDS, progress=lambda now, total: seen.append(now)
    )
    assert done.resumed == len(there) - 1
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_another_conversion_starts_anew(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base")
    children = Children("convert", tmp_path / "base")
    try:
        steps = children.whole(tmp_path / "whole", [])
        assert children.killed(tmp_path / "out", [], at=2 * steps // 3)
    finally:
        children.close()
    done = convert_checkpoint(tmp_path / "base", tmp_path / "out", max_shard_size=SHARDS, layers=0)
    assert done.resumed == 0
    convert_checkpoint(tmp_path / "base", tmp_path / "fresh", max_shard_size=SHARDS, layers=0)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "fresh")
