"""How far a run is: the live count, and `progress.json`, which every complete checkpoint has."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_geglu.errors import TrainingError
from hf_geglu.training.reports.records import EvalRecord, StepRecord

FORMAT = 1
FILE = "progress.json"


@dataclass
class Progress:
    """How far a run is. The one mutable thing of a run besides the model and its optimizer."""

    step: int
    draws: int
    steps: list[StepRecord] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)

    @classmethod
    def start(cls) -> Progress:
        """The beginning of a run."""
        return cls(step=0, draws=0)

    def advance(self, record: StepRecord, *, draws: int) -> None:
        """Count a step that took so many blocks."""
        self.step = record.step
        self.draws += draws
        self.steps.append(record)


def read_progress(folder: Path) -> dict[str, Any]:
    """`progress.json` of a checkpoint.

    Raises:
        TrainingError: no complete checkpoint, or one that this version cannot read.
    """
    path = folder / FILE
    if not path.exists():
        raise TrainingError(
            f"{folder.name} holds no progress.json: expected a checkpoint folder written by this package. Name one "
            "called checkpoint-N, or give --resume alone for the newest."
        )
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TrainingError(
            f"{folder.name}/progress.json is damaged ({error}). Resume from another checkpoint."
        ) from error
    if read.get("format") != FORMAT:
        raise TrainingError(
            f"{folder.name} has format {read.get('format')}: expected {FORMAT}. Resume it with the version that wrote "
            "it."
        )
    return dict(read)
