"""What a step minimises: the labels' negative log-likelihood, or that and what a teacher says."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_geglu.errors import ConfigurationError
from hf_geglu.training.distillation import Distillation
from hf_geglu.training.evaluation import summed_nll
from hf_geglu.training.objectives.head import Head, NoHead, find_head
from hf_geglu.training.objectives.objective import Batch
from hf_geglu.training.settings.run import TrainSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loss:
    """What a forward is summed to: the labels' negative log-likelihood, or that and what a teacher says."""

    head: Head | NoHead
    distillation: Distillation | None
    accelerator: Any

    def of_shares(self) -> Loss:
        """The same of the model after it was shared out."""
        return self if isinstance(self.head, NoHead) else replace(self, head=replace(self.head, sharded=True))

    def with_head(self, head: Head | NoHead) -> Loss:
        """The same by another head."""
        return replace(self, head=head)

    def __call__(self, model: nn.Module, batch: Batch, *, divisor: float) -> torch.Tensor:
        """The sum over a batch, divided by that."""
        if self.distillation is None:
            return summed_nll(model, batch, self.head, divisor=divisor)
        return self.distillation.summed(model, batch, autocast=self.accelerator.autocast()) / divisor


def loss_for(model: nn.Module, settings: TrainSettings, teacher: nn.Module | None, accelerator: Any) -> Loss:
    """The loss of these settings; says so where the logits are needed for it.

    Raises:
        ConfigurationError: a teacher without --distill, or the other way round.
    """
    if (teacher is None) != (settings.distill == 0):
        raise ConfigurationError(
            f"distill={settings.distill:g} {'without' if teacher is None else 'with'} a teacher: expected a share "
            "above 0 and a model to learn from, or neither. Set both or none."
        )
    head: Head | NoHead = NoHead("chunked_cross_entropy is off")
    if settings.chunked_cross_entropy == "auto":
        head = find_head(model)
        if isinstance(head, NoHead):
            logger.info("the logits of a forward are made whole: %s", head.reason)
    if teacher is None:
        return Loss(head, None, accelerator)
    teacher.to(accelerator.device)
    return Loss(head, Distillation(teacher, settings.distill, settings.distill_temperature), accelerator)
