"""What a run leaves behind, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from hf_geglu.training.evaluation import EvalResult


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: its number, from 1.
        loss: mean negative log-likelihood of a predicted token of the whole batch, in nats, before the update.
        learning_rate: that of the update.
        grad_norm: norm of the gradient before it was clipped.
        tokens: tokens that went through the model, over all processes.
        predicted: tokens that the loss is a mean of.
        seconds: wall time of the step, without evaluation and checkpoint.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    predicted: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of the step, over all processes."""
        return self.tokens / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation: `EvalResult` and the number of steps before it."""

    step: int
    nll: float
    perplexity: float | None
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    loss_name: str = "nll"

    @classmethod
    def at(cls, step: int, result: EvalResult) -> EvalRecord:
        """The result of the evaluation after `step` steps."""
        return cls(step=step, **{**vars(result), "metrics": dict(result.metrics)})


def numbers(record: StepRecord | EvalRecord) -> dict[str, float]:
    """What a tracker draws of a record: every number but the step, metrics among them."""
    told = {key: value for key, value in asdict(record).items() if key not in ("step", "metrics", "loss_name")}
    found: dict[str, float] = {key: value for key, value in told.items() if value is not None}
    if isinstance(record, EvalRecord):
        return found | dict(record.metrics)
    return found | {"tokens_per_second": record.tokens_per_second}


@dataclass(frozen=True)
class SampleRecord:
    """What the model wrote to one prompt after that many steps."""

    step: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class TrainResult:
    """A whole training run; after a resume it includes what came before.

    Attributes:
        steps: one record a step, in order.
        evals: one record an evaluation: step 0, along the way, the end. Empty without evaluation blocks.
        best_step: the evaluation whose weights the model was left with, where those are not the last ones.
    """

    steps: tuple[StepRecord, ...]
    evals: tuple[EvalRecord, ...]
    best_step: int | None = None

    @property
    def final(self) -> EvalRecord | None:
        """The evaluation of the model as it was left."""
        kept = [record for record in self.evals if record.step == self.best_step] or self.evals
        return kept[-1] if kept else None

    @property
    def left_at(self) -> int:
        """The step whose weights the model was left with."""
        return self.best_step if self.best_step is not None else self.steps[-1].step

    @property
    def losses(self) -> tuple[float, ...]:
        """Loss per step."""
        return tuple(record.loss for record in self.steps)

    @property
    def tokens(self) -> int:
        """Tokens that went through the model."""
        return sum(record.tokens for record in self.steps)

    @property
    def seconds(self) -> float:
        """Wall time of all steps, without evaluations and checkpoints."""
        return sum(record.seconds for record in self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Mean speed."""
        return self.tokens / max(self.seconds, 1e-9)
