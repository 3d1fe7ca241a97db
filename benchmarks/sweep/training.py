"""One training step, for any model that can be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.sweep.outputs import run

STEPS = (1e-2, 1e-3, 1e-4, 1e-5)
"""Lengths of the step relative to the parameters' norm, in this order: routers and quantisers jump on long ones."""


def train_one_step(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[float, float]:
    """(loss before, loss after) one step of gradient descent on the mean square of all outputs.

    Nothing is special about that loss: it is defined for every architecture, and not flat. The first of `STEPS` that
    lowers it counts.

    Raises:
        ValueError: no step lowers it, or nothing receives a finite gradient.
    """
    parameters = [parameter.requires_grad_(True) for parameter in model.parameters() if parameter.is_floating_point()]
    before = _loss(model, inputs, gradients=True)
    gradients = torch.autograd.grad(before, parameters, allow_unused=True)
    moved = [(one, gradient) for one, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    size = torch.stack([gradient.norm() for _, gradient in moved]).norm() if moved else torch.zeros(())
    if not size.isfinite() or size == 0:
        raise ValueError(f"the norm of all gradients is {size.item()}")
    norm = torch.stack([one.detach().norm() for one, _ in moved]).norm()
    start = [one.detach().clone() for one, _ in moved]
    after = torch.zeros(())
    for step in STEPS:
        with torch.no_grad():
            for (one, gradient), value in zip(moved, start, strict=True):
                one.copy_(value - step * norm / size * gradient)
        after = _loss(model, inputs, gradients=False)
        if after < before:
            return before.item(), after.item()
    raise ValueError(f"no step lowers the loss {before.item():.6g}; the shortest gives {after.item():.6g}")


def _loss(model: nn.Module, inputs: Mapping[str, Any], *, gradients: bool) -> torch.Tensor:
    outputs = run(model, inputs, gradients=gradients)
    terms = [tensor.double().square().mean() for tensor in outputs.values() if tensor.isfinite().all()]
    if not terms:
        raise ValueError("no output is finite everywhere")
    return torch.stack(terms).mean()
