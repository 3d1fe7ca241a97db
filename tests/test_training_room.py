"""A disk that is full: said with what was needed and what is free; what was there before stays, drafts go."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_training import gpt2, lines, one_thread, random_blocks, same_weights, saved_model  # noqa: F401

pytest.importorskip("accelerate")

from hf_geglu.errors import OutputError, TrainingError
from hf_geglu.files.folder import why_full
from hf_geglu.training import CheckpointFolder, TrainSettings, train
from hf_geglu.training.checkpoints import checkpoint as room
from hf_geglu.training.checkpoints import generators
from hf_geglu.training.checkpoints.progress import FILE
from hf_geglu.training.processes import tensor_file

SETTINGS = TrainSettings(max_steps=6, save_steps=2, learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True)


class Disk:
    """Room for so many bytes; what is written beyond them is cut off there, as the system does it."""

    def __init__(self, patch: pytest.MonkeyPatch, free: int) -> None:
        self.free = free
        patch.setattr(generators, "save_file", self._limited(generators.save_file, at=1))
        patch.setattr(tensor_file, "_append", self._limited(tensor_file._append, at=0))

    def _limited(self, write: Any, *, at: int) -> Any:
        def limited(*args: Any, **named: Any) -> None:
            path = args[at]
            before = path.stat().st_size if path.exists() else 0
            write(*args, **named)
            self._used(path, path.stat().st_size - before)

        return limited

    def _used(self, path: Path, count: int) -> None:
        self.free -= count
        if self.free < 0:
            os.truncate(path, max(0, path.stat().st_size + self.free))
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("moment", ["weights", "optimizer", "generators"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, moment: str) -> None:
    folder = CheckpointFolder(tmp_path)
    whole, model = gpt2(), gpt2()
    train(whole, random_blocks(9), None, SETTINGS)
    first = TrainSettings(**{**SETTINGS.__dict__, "max_steps": 2})
    train(gpt2(), random_blocks(9), None, first, checkpoints=folder)
    size = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir()}
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
    free = {"weights": 10, "optimizer": size["optimizer.safetensors"] // 2}
    room_left = free.get(moment, size["optimizer.safetensors"] + 10)
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, room_left)
        if moment == "weights":
            patch.setattr(type(model), "save_pretrained", lambda *_, **__: _raise_as_rust_does())
        with pytest.raises(OutputError) as told:
            train(model, random_blocks(9), None, SETTINGS, checkpoints=folder, resume_from=folder.latest())
    message = str(told.value)
    parameters = sum(p.numel() for p in model.parameters())
    assert "checkpoint-4 cannot be written" in message
    assert "No space left on device" in message
    needed = float(message.split("it needs about ")[1].split(" KB")[0]) * 2**10
    assert needed == pytest.approx(12 * parameters, rel=0.05)  # weights and two moments, of 4 bytes each
    assert "are free there" in message
    assert "checkpoint-2 is whole and stays" in message
    assert names(tmp_path) == {"checkpoint-2"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == before
    resumed = gpt2()
    train(resumed, random_blocks(9), None, SETTINGS, checkpoints=folder, resume_from=folder.latest())
    assert same_weights(whole, resumed)


def _raise_as_rust_does() -> None:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_without_a_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, 0)
    with pytest.raises(OutputError, match="No checkpoint had been written before"):
        train(gpt2(), random_blocks(9), None, SETTINGS, checkpoints=CheckpointFolder(tmp_path))
    assert names(tmp_path) == set()


def test_other_failures_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "save_generators", lambda path: path.write_bytes(1))
    with pytest.raises(TypeError):
        train(gpt2(), random_blocks(9), None, SETTINGS, checkpoints=CheckpointFolder(tmp_path))
    assert names(tmp_path) == set()


def test_what_says_that_a_disk_is_full() -> None:
    assert why_full(OSError(errno.ENOSPC, "x")) == os.strerror(errno.ENOSPC)
    assert why_full(Exception("I/O error: Disk quota exceeded (os error 122)")) == os.strerror(errno.EDQUOT)
    assert why_full(OSError(errno.EACCES, "x")) is None
    assert why_full(Exception("Permission denied (os error 13)")) is None
    assert why_full(TrainingError("said already (os error 28)")) is None


_LIMITED = """
import resource, sys
from hf_geglu.training.command_line import main
import hf_geglu.training.run as run
real = run.train
def train(*args, **named):
    trained = real(*args, **named)
    if limit_at_the_end:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return trained
limit, limit_at_the_end = int(sys.argv[1]), sys.argv[2] == "end"
run.train = train
if not limit_at_the_end:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main("clm", sys.argv[3:]))
"""


def test_a_recipe_that_meets_the_largest_size_of_a_file(tmp_path: Path) -> None:
    """The system's own refusal, in the middle of a file: in a checkpoint, and in the finished model."""
    pytest.importorskip("datasets")
    saved_model(tmp_path / "gpt2", "clm")
    (tmp_path / "text.txt").write_text("".join(line + "\n" for line in lines(80)))
    flags = "--model gpt2 --train_file text.txt --block_size 16 --output_dir out --use_cpu --save_steps 2"
    flags += " --max_steps 4 --lr_scheduler_type constant --validation_split_percentage 0 --convert"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }

    def run(limit: int, when: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _LIMITED, str(limit), when, *flags.split(), *more],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    out = tmp_path / "out"
    done = run(20_000, "start")
    assert done.returncode == 2, done.stderr
    assert "error: checkpoint-2 cannot be written into out (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(out) == {"settings.json", "train_log.jsonl"}
    done = run(20_000, "end", "--resume")
    assert done.returncode == 2, done.stderr
    assert "error: the finished model cannot be written into out (File too large)" in done.stderr
    assert "checkpoint-4 has the training" in done.stderr
    assert names(out) == {"settings.json", "train_log.jsonl", "checkpoint-2", "checkpoint-4"}
    done = run(10**9, "end", "--resume")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in (out / "train_log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert {"config.json", "model.safetensors", "results.json"} <= names(out)
    assert not [name for name in names(out) if name.startswith(".")]
    assert (out / "checkpoint-4" / FILE).is_file()
