"""What a narrowing does and how much of it.

Defaults were chosen on MiniLM; benchmarks/results/quality_narrow.json has the figures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_geglu.conversions.whitened import FitSettings
from hf_geglu.errors import ConfigurationError

Stage = Literal["closed", "local", "heal"]
STAGES: tuple[Stage, ...] = ("closed", "local", "heal")


@dataclass(frozen=True, slots=True, kw_only=True)
class HealSettings:
    """Of the training of the whole narrow model on the original's outputs.

    Attributes:
        passes: over the calibration data.
        learning_rate: at its highest, in whitened coordinates.
        warmup: steps.
        gradient_norm: to clip to.
        low_precision: products in bfloat16.
    """

    passes: float = 1.0
    learning_rate: float = 5e-5
    warmup: int = 30
    gradient_norm: float = 1.0
    low_precision: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowSettings:
    """How to narrow.

    Attributes:
        stage: where to stop. closed: neurons are chosen and the down projections solved for; local: every block is
            trained by itself; heal: the whole model is trained, FFN blocks only.
        selection_tokens: the first ones of the calibration data, on which neurons are chosen: runs backwards are
            dear, and an order needs less text than a fit.
        statistics_tokens: the first ones, on which blocks are fitted. The last stage sees all of the data.
        sensitivity: how much of an error's cost is how far it moves the model's output, to first order, rather than its
            size.
        fit: of every block.
        heal: of the whole model.
        seed: of the random directions that the sensitivity is measured along, and of the order of training.
        control: also narrow without a value branch, which shows what the gate has to do with the result.
        curve: also measure these shares of the width, closed form only.
    """

    stage: Stage = "closed"
    selection_tokens: int = 70_000
    statistics_tokens: int = 190_000
    sensitivity: float = 0.5
    fit: FitSettings = field(default_factory=FitSettings)
    heal: HealSettings = field(default_factory=HealSettings)
    seed: int = 0
    control: bool = True
    curve: tuple[float, ...] = (2 / 3, 3 / 4, 5 / 6)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ConfigurationError(f"stage={self.stage!r}; expected one of {', '.join(STAGES)}")

    def reaches(self, stage: Stage) -> bool:
        """Whether that stage is carried out."""
        return STAGES.index(stage) <= STAGES.index(self.stage)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self) | {
            "curve": list(self.curve),
            "fit": asdict(self.fit) | {"dtype": str(self.fit.dtype).removeprefix("torch.")},
        }
