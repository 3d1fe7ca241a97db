"""The checkpoints of a run on disk: found, written whole or not at all, and thinned out.

A checkpoint is written beside its place, synced and renamed: a folder called checkpoint-N is complete. What is in it
says `state`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_geglu.errors import OutputError
from hf_geglu.files.folder import sync, sync_tree
from hf_geglu.training.checkpoints.generators import save_generators
from hf_geglu.training.checkpoints.progress import FILE, Progress
from hf_geglu.training.checkpoints.room import checkpoint_bytes, in_all_or_none, no_room
from hf_geglu.training.checkpoints.state import TrainingState

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
        """Write checkpoint-N, then remove what is older than the `keep` newest. Called by every process.

        Raises:
            OutputError: there is no room for it. What was there before is as it was.
        """
        main = bool(accelerator.is_main_process)
        target = self.folder / f"checkpoint-{progress.step}"
        draft = self.folder / f".{target.name}.draft"
        if main:
            self._tidy()

        def attempt(write: Callable[[], None]) -> None:
            in_all_or_none(accelerator, write, lambda: shutil.rmtree(draft, ignore_errors=True), full)

        def full(reason: str) -> OutputError:
            needed, kept = checkpoint_bytes(state), self.latest()
            return no_room(target.name, self.folder, needed=needed, reason=reason, then=_about_kept(kept))

        def write_state() -> None:
            if main:
                draft.mkdir(parents=True)
            state.write(draft, progress, self.tokenizer, main=main)

        attempt(write_state)
        attempt(lambda: save_generators(draft / f"rng-{accelerator.process_index}.safetensors"))
        if main:
            move_into_place(draft, target)
            self._thin_out(spared=target)
        accelerator.wait_for_everyone()

    def _tidy(self) -> None:
        """Remove what a killed process was writing or removing, and what a resumed run is to keep no longer."""
        for path in self.folder.glob(".checkpoint-*"):
            shutil.rmtree(path)
        self._thin_out()

    def _thin_out(self, spared: Path | None = None) -> None:
        for old in self.all()[: -self.keep] if self.keep else []:
            if old != spared:
                _remove(old)


def _about_kept(kept: Path | None) -> str:
    if kept is None:
        return "No checkpoint had been written before. Make room, or choose another --output_dir, and start again."
    return (
        f"{kept.name} is whole and stays. Make room, or lower --save_total_limit, and go on with the same command and "
        "--resume."
    )


def _remove(checkpoint: Path) -> None:
    """Under another name first: a checkpoint that is there is there completely."""
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(old)
    shutil.rmtree(old)


def move_into_place(draft: Path, target: Path) -> None:
    """Sync a finished folder to disk and give it its name; an older folder of that name goes away only afterwards."""
    sync_tree(draft)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    draft.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
