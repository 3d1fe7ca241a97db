"""What is done to a model before it is trained: the type of its weights, gradient checkpointing, kernels."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_geglu.errors import ConfigurationError
from hf_geglu.optimizing import optimize
from hf_geglu.optimizing.running import STATE
from hf_geglu.training.settings.run import TrainSettings

logger = logging.getLogger(__name__)


def cast_weights(model: nn.Module, settings: TrainSettings) -> None:
    """Weights in the type they are trained in; says so where that changes something."""
    if settings.dtype == "auto":
        return
    wanted: torch.dtype = getattr(torch, settings.dtype)
    found = {p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16, torch.float32)} - {
        wanted
    }
    if found:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        logger.info("weights in %s are cast to %s for training (--dtype auto leaves them)", names, settings.dtype)
        model.to(wanted)


@contextmanager
def gradient_checkpointing(model: nn.Module, settings: TrainSettings) -> Iterator[None]:
    """Gradient checkpointing for the run, if it is wanted and not on already.

    Raises:
        ConfigurationError: a model that cannot.
    """
    module: Any = model
    if not settings.gradient_checkpointing or getattr(module, "is_gradient_checkpointing", False):
        yield
        return
    if not getattr(module, "supports_gradient_checkpointing", False):
        raise ConfigurationError(
            f"--gradient_checkpointing with {type(model).__name__}: expected a model that supports it. Leave it out."
        )
    # The reentrant form loses the gradients of blocks whose inputs need none.
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        module.gradient_checkpointing_disable()


@contextmanager
def with_kernels(model: nn.Module, settings: TrainSettings) -> Iterator[None]:
    """The kernels of `hf_geglu.optimize` in every gated block, for the run; what is saved is as ever.

    A model that was optimised before keeps its kernels.
    """
    if settings.ops == "reference" or any(STATE in vars(module) for module in model.modules()):
        yield
        return
    logger.info("%s", optimize(model, ops=settings.ops))
    try:
        yield
    finally:
        optimize(model, ops="reference")
