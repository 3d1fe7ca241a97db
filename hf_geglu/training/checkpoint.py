"""The checkpoints of a run on disk: found, written whole or not at all, and thinned out.

A checkpoint is written beside its place, synced and renamed: a folder called checkpoint-N is complete. What is in it
says `state`.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_geglu.training.generators import save_generators
from hf_geglu.training.progress import FILE, Progress
from hf_geglu.training.state import TrainingState

NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class CheckpointFolder:
    """Where the checkpoints of one run are.

    Attributes:
        folder: the folder that holds the folders checkpoint-N.
        keep: how many to keep, newest first; 0 keeps all.
        tokenizer: saved with each, if given.
    """

    folder: Path
    keep: int = 2
    tokenizer: Any = None

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [(int(m[1]), path) for path in self.folder.glob("checkpoint-*") if (m := NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found) if (path / FILE).exists()]

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = self.all()
        return found[-1] if found else None

    def save(self, state: TrainingState, progress: Progress, accelerator: Any) -> None:
        """Write checkpoint-N, then remove what is older than the `keep` newest. Called by every process."""
        main = bool(accelerator.is_main_process)
        target = self.folder / f"checkpoint-{progress.step}"
        draft = self.folder / f".{target.name}.draft"
        if main:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            state.write(draft, progress, self.tokenizer)
        accelerator.wait_for_everyone()
        save_generators(draft / f"rng-{accelerator.process_index}.safetensors")
        accelerator.wait_for_everyone()
        if main:
            move_into_place(draft, target)
            for old in self.all()[: -self.keep] if self.keep else []:
                if old != target:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()


def move_into_place(draft: Path, target: Path) -> None:
    """Sync a finished folder to disk and give it its name; an older folder of that name goes away only afterwards."""
    for path in [*draft.rglob("*"), draft]:
        _sync(path)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    draft.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
