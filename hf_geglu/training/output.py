"""The output folder: may it be written, what of an earlier run goes away, how the finished model gets in."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_geglu.errors import OutputError, TrainingError
from hf_geglu.provenance import TrainingRecord
from hf_geglu.training.checkpoints.checkpoint import CheckpointFolder
from hf_geglu.training.checkpoints.progress import read_progress
from hf_geglu.training.checkpoints.room import room_for, weight_bytes
from hf_geglu.training.settings.run import LATEST, OutputSettings

logger = logging.getLogger(__name__)

LEFT_BY_A_RUN = (
    "checkpoint-*",
    ".checkpoint-*",
    "*_log.jsonl",
    ".*_log.jsonl",
    "settings.json",
    "results.json",
    ".settings.json.draft",
    ".results.json.draft",
    "loss.png",
    ".draft-loss.png",
    "control",
    ".model",
    "..model.partial",
)
"""What --overwrite removes when the new run starts. The model goes when the new one is there, foreign files never."""


@dataclass
class RunFolder:
    """OUTPUT_DIR. Nothing is written before `open`.

    Attributes:
        path: the folder.
        overwrite: remove what an earlier run left when it is opened.
    """

    path: Path
    overwrite: bool = False
    opened: bool = field(default=False, init=False)

    def open(self) -> None:
        """Make the folder, once."""
        if self.opened:
            return
        self.opened = True
        self.path.mkdir(parents=True, exist_ok=True)
        if self.overwrite:
            for pattern in LEFT_BY_A_RUN:
                for old in list(self.path.glob(pattern)):
                    shutil.rmtree(old) if old.is_dir() else old.unlink()

    def publish(
        self,
        model: Any,
        tokenizer: Any,
        training: TrainingRecord | None = None,
        command: Sequence[str] = (),
        curves: Path | None = None,
    ) -> None:
        """Save the finished model and its papers. It is written beside and then moved in file by file, config.json
        last: a folder with a config holds a whole model, while logs and checkpoints stay where they are. A card that a
        person wrote stays too; ours then lies beside it."""
        from hf_geglu.hub import save_folder
        from hf_geglu.hub.card import CARD, is_ours
        from hf_geglu.hub.manifest import FOLDER

        self.open()
        draft = self.path / ".model"
        shutil.rmtree(draft, ignore_errors=True)
        name = self.path.resolve().name
        kept = None if is_ours(self.path / CARD) else self.path / CARD
        newest = CheckpointFolder(self.path).latest()
        after = "Make room and give the same command with --resume" if newest else "Make room and start again"
        then = f"{newest.name if newest else 'No checkpoint'} has the training. {after}."
        with room_for("the finished model", self.path, needed=weight_bytes(model), then=then):
            save_folder(
                model,
                draft,
                tokenizer=tokenizer,
                training=training,
                command=command,
                name=name,
                keep_card=kept,
                curves=curves,
            )
        (self.path / "config.json").unlink(missing_ok=True)
        shutil.rmtree(self.path / FOLDER, ignore_errors=True)
        for old in self.path.glob("model*.safetensors*"):
            old.unlink()
        for new in sorted(draft.iterdir(), key=lambda path: path.name == "config.json"):
            target = self.path / new.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(new, target)
        draft.rmdir()

    def amend(self, training: TrainingRecord, curves: Path | None = None) -> None:
        """Complete the papers of the published model with what was measured after it was saved: its control."""
        from hf_geglu.hub.manifest import MANIFEST
        from hf_geglu.hub.papers import amend

        if (self.path / MANIFEST).is_file():  # a model that was not converted has none
            amend(self.path, training=training, curves=curves)


def check_output(output: OutputSettings, *, sources: Iterable[str] = ()) -> tuple[RunFolder, Path | None]:
    """The folder to write to and the checkpoint to go on from (if any). Changes nothing.

    Args:
        output: where to, and how.
        sources: paths that are read (model, data) and must survive.

    Raises:
        OutputError: the folder must not be written.
        TrainingError: --resume without a checkpoint.
    """
    folder = Path(output.output_dir)
    name = folder.name or str(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--output_dir {name} is a file: expected a folder. Give another name.")
    if output.resume is not None:
        found = _checkpoint(folder, output.resume)
        if found is None:
            logger.info("%s holds no checkpoint yet: the run starts anew", name)
        return RunFolder(folder, overwrite=found is None), found
    if folder.is_dir() and any(folder.iterdir()) and not output.overwrite_output_dir:
        raise OutputError(
            f"--output_dir {name} is not empty: expected a new or empty folder. Give another one, --resume to go on "
            "from its newest checkpoint, or --overwrite_output_dir to start anew."
        )
    for source in sources:
        if Path(source).exists() and folder.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
            raise OutputError(
                f"--output_dir {name} holds {Path(source).name}, which this run reads: expected another folder. Give "
                "one."
            )
    parent = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"--output_dir {name} cannot be written: expected write access. Give another folder.")
    return RunFolder(folder, overwrite=output.overwrite_output_dir), None


def _checkpoint(folder: Path, resume: str) -> Path | None:
    """None: a run was killed before its first checkpoint."""
    if resume.lower() in (LATEST, "true"):
        found = CheckpointFolder(folder).latest()
        if found is None and not _only_begun(folder):
            raise TrainingError(
                f"--resume, but {folder.name or folder} holds no checkpoint: expected a folder checkpoint-N. Leave "
                "--resume out to start a run there."
            )
        return found
    path = next((p for p in (Path(resume), folder / resume) if p.is_dir()), None)
    if path is None:
        raise TrainingError(
            f"--resume {Path(resume).name} does not exist: expected a checkpoint folder. Check the path."
        )
    read_progress(path)
    return path


def _only_begun(folder: Path) -> bool:
    """Whether there is no more than an interrupted run leaves before its first checkpoint."""
    if not folder.is_dir() or any((folder / name).exists() for name in ("config.json", "results.json")):
        return False
    ours = [path for pattern in LEFT_BY_A_RUN for path in folder.glob(pattern)]
    return (folder / "settings.json").is_file() or set(folder.iterdir()) <= set(ours)
