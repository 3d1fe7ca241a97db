"""The loss curves of a run as a picture that is brought up to date at every evaluation."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from hf_geglu.training.reports.picture import loss_curves
from hf_geglu.training.reports.records import EvalRecord

logger = logging.getLogger(__name__)

PICTURE = "loss.png"


@dataclass
class LiveCurves:
    """OUTPUT_DIR/loss.png: held-out loss over steps, one line a model.

    Attributes:
        folder: where it goes; there when the first evaluation comes.
        title: above the picture.
    """

    folder: Path
    title: str
    _found: dict[str, list[tuple[int, float]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._can_draw = find_spec("matplotlib") is not None
        if not self._can_draw:
            logger.info("no %s without matplotlib: pip install 'hf_geglu[plot]'", PICTURE)

    def known(self, name: str, records: Sequence[EvalRecord]) -> None:
        """Evaluations of a run that goes on."""
        if records:
            self._found[name] = [(record.step, record.nll) for record in records]

    def add(self, name: str, record: EvalRecord) -> None:
        """One evaluation more; draws."""
        self._found.setdefault(name, []).append((record.step, record.nll))
        if self._can_draw:
            value = {"nll": "held-out nll, nats per token"}.get(record.loss_name, f"held-out {record.loss_name}")
            draft = loss_curves(
                self.folder / f".draft-{PICTURE}", self._found, title=self.title, value=value.replace("_", " ")
            )
            os.replace(draft, self.folder / PICTURE)

    @property
    def picture(self) -> Path | None:
        """Where it is, if it was drawn."""
        path = self.folder / PICTURE
        return path if self._can_draw and self._found and path.is_file() else None
