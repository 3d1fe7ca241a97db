"""Distillation: besides the labels, the student is taught the whole distribution of its teacher.

    loss = (1 - a) CE(labels) + a T^2 KL(softmax(teacher/T) || softmax(student/T))

a sum over the predicted tokens. The factor T^2 keeps the size of the gradient when T changes (Hinton 2015,
arXiv:1503.02531, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_geglu.errors import ConfigurationError
from hf_geglu.modes import evaluating
from hf_geglu.training.evaluation import logits_of
from hf_geglu.training.objectives.objective import IGNORED, Batch


@dataclass(frozen=True)
class Distillation:
    """A teacher and how much it counts.

    Attributes:
        teacher: a model with the vocabulary of the student; it is not trained and stays as it is.
        weight: a, from 0 to 1.
        temperature: T, above 0.
    """

    teacher: nn.Module
    weight: float
    temperature: float = 1.0

    def summed(self, student: nn.Module, batch: Batch, *, autocast: Any) -> Tensor:
        """Sum of the losses of the predicted tokens of a batch, a float32 scalar.

        Args:
            student: the model that is trained.
            batch: on the device of both; `labels` as an objective makes them.
            autocast: a context for the teacher's forward, in the precision of the student's.

        Raises:
            ConfigurationError: the two have different vocabularies.
        """
        kept = batch["labels"] != IGNORED
        with torch.no_grad(), evaluating(self.teacher), autocast:
            taught_NV = logits_of(self.teacher, batch)[kept].float()
        said_NV = logits_of(student, batch)[kept].float()
        if taught_NV.shape != said_NV.shape:
            raise ConfigurationError(
                f"the teacher knows {taught_NV.shape[-1]} tokens, the student {said_NV.shape[-1]}: expected the same "
                "vocabulary. Leave --distill out."
            )
        own = functional.cross_entropy(said_NV, batch["labels"][kept], reduction="sum")
        t = self.temperature
        apart = functional.kl_div(
            functional.log_softmax(said_NV / t, -1),
            functional.log_softmax(taught_NV / t, -1),
            reduction="sum",
            log_target=True,
        )
        return (1 - self.weight) * own + self.weight * t * t * apart
