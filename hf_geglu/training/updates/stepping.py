"""How the forwards of a step become an update of the weights: by accelerate and torch, or by DeepSpeed's engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import AdamW

from hf_geglu.training.parameters.trainable import mask_gradients
from hf_geglu.training.processes.sharded_model import shares_the_model
from hf_geglu.training.settings.run import TrainSettings
from hf_geglu.training.updates.clipping import clip_gradients
from hf_geglu.training.updates.zero import start_engine, uses_zero


class Stepping(Protocol):
    """The backward half of a step. Gradients are the mean over processes: the loop wants the sum, and scales for it."""

    model: nn.Module
    """As it is called: wrapped, shared out, or as it is."""

    def accumulating(self) -> AbstractContextManager[Any]:
        """Around a forward and its backward that are not the last ones of the step."""

    def backward(self, loss: Tensor, /) -> None:
        """Add the gradients of a loss."""

    def clip(self) -> float:
        """The norm of the gradients before they are clipped; where it is no number, nothing is updated."""

    def update(self) -> bool:
        """Update the weights, forget the gradients; False where loss scaling has left the step out."""


def make_stepping(
    model: nn.Module, optimizer: AdamW, accelerator: Any, settings: TrainSettings, masks: Mapping[nn.Parameter, Tensor]
) -> Stepping:
    """The steps of a model, shared out already if it will be, in the processes of `accelerator`.

    Args:
        model: wrapped here where that is needed.
        optimizer: of its parameters.
        accelerator: of this process.
        settings: of the training.
        masks: of gradients.

    Raises:
        ConfigurationError: settings that DeepSpeed has no place for.
    """
    if uses_zero(accelerator):
        return start_engine(model, optimizer, accelerator, settings)
    prepared = model if shares_the_model(accelerator) else accelerator.prepare(model)
    return TorchStepping(prepared, optimizer, accelerator, masks=masks, most=settings.max_grad_norm)


class TorchStepping:
    """By the optimizer, in any number of processes."""

    def __init__(
        self, model: nn.Module, optimizer: Any, accelerator: Any, *, masks: Mapping[nn.Parameter, Tensor], most: float
    ) -> None:
        """Of a prepared model.

        Args:
            model: as it is called.
            optimizer: not prepared yet.
            accelerator: that prepared the model.
            masks: of gradients.
            most: the norm that gradients are scaled down to; 0 for no limit.
        """
        self.model, self._accelerator, self._masks = model, accelerator, masks
        self._optimizer, self._most = accelerator.prepare_optimizer(optimizer), most or math.inf

    def accumulating(self) -> AbstractContextManager[Any]:
        """Processes do not exchange gradients."""
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self.model)
        return context

    def backward(self, loss: Tensor) -> None:
        """Scaled where fp16 wants it."""
        self._accelerator.backward(loss)

    def clip(self) -> float:
        """In place."""
        mask_gradients(self._masks)
        return clip_gradients(self.model, self._most, self._accelerator)

    def update(self) -> bool:
        """One step of the optimizer."""
        self._optimizer.step()
        done = not self._accelerator.optimizer_step_was_skipped
        self._optimizer.zero_grad()
        return done
