"""Training or evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """That mode inside, and afterwards every module in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Evaluation mode: `in_mode` with training off."""
    return in_mode(model, training=False)
