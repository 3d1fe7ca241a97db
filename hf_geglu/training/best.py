"""The best model so far, by its held-out loss, and when to stop because there will hardly be a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hf_geglu.errors import TrainingError
from hf_geglu.training.processes.sharding import held, share
from hf_geglu.training.processes.tensor_file import Held, Source, part
from hf_geglu.training.reports.records import EvalRecord


class BestModel:
    """Keeps the trainable weights of the best evaluation on the CPU, and counts evaluations without a better one.

    Of a sharded model each process keeps its own shares.
    """

    def __init__(self, model: nn.Module, *, keep: bool, patience: int, threshold: float) -> None:
        """Nothing was seen yet.

        Args:
            model: whose trainable parameters are kept.
            keep: whether to keep weights at all.
            patience: stop after so many evaluations in a row that were not better; 0 never stops.
            threshold: nats that the loss has to fall by to count as better.
        """
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._keep, self._patience, self._threshold = keep, patience, threshold
        self._weights: dict[str, Tensor] = {}
        self._nll, self._waited = math.inf, 0
        self.step: int | None = None

    def see(self, record: EvalRecord) -> None:
        """Take note of an evaluation of the model as it is now."""
        if self._note(record) and self._keep:
            for name, parameter in self._parameters.items():  # in place: never two sets of weights at once
                if name in self._weights:
                    self._weights[name].copy_(share(parameter))
                else:
                    self._weights[name] = share(parameter).to("cpu", copy=True)

    @property
    def should_stop(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self._patience <= self._waited

    def give(self) -> None:
        """Leave the best weights in the model, if any were kept."""
        for name, value in self._weights.items():
            share(self._parameters[name]).copy_(value)

    def tensors(self) -> dict[str, Held]:
        """For a checkpoint."""
        return {name: held(value, self._parameters[name]) for name, value in self._weights.items()}

    def load(self, tensors: Mapping[str, Source]) -> None:
        """Take back `tensors()`.

        Raises:
            TrainingError: they are of another model.
        """
        if tensors and tensors.keys() != self._parameters.keys():
            raise TrainingError(
                "the best weights of the checkpoint are of other parameters: expected the same model, and the same "
                "--train. Give them as then."
            )
        self._weights = {
            name: part(source, self._parameters[name]).to("cpu", copy=True) for name, source in tensors.items()
        }

    def recall(self, records: Sequence[EvalRecord]) -> None:
        """Take note of the evaluations before a checkpoint, after `load`.

        Raises:
            TrainingError: the weights of the best of them were not kept.
        """
        for record in records:
            self._note(record)
        if self._keep and self.step is not None and not self._weights:
            raise TrainingError(
                f"the checkpoint does not hold the weights of its best evaluation, after step {self.step}: expected a "
                "run that was started with --load_best_model_at_end. Leave it out, or start anew."
            )

    def _note(self, record: EvalRecord) -> bool:
        better = record.nll < self._nll
        self._waited = 0 if record.nll < self._nll - self._threshold else self._waited + 1
        if better:
            self._nll, self.step = record.nll, record.step
        return better
