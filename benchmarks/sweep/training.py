"""One training step, for any model that can be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.sweep.outputs import run

STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Lengths of the step relative to the parameters' norm, in this order: routers and quantisers jump on long ones, and
where a ReLU became a sharp GELU, most of the norm is that of its gate (128 times the original) while its value branch
stands at 1/128."""


def train_one_step(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[float, float]:
    """(loss before, loss after) one step of gradient descent on the mean square of all outputs.

    Nothing is special about that loss: it is defined for every architecture, and not flat. The first of `STEPS` that
    lowers it counts.

    Raises:
        ValueError: no step lowers it, or nothing receives a finite gradient.
    """
    parameters = [parameter.requires_grad_(True) for parameter in model.parameters() if parameter.is_floating_point()]
    before = _loss(model, inputs, gradients=True)
    if not before.isfinite():
        raise ValueError("no output is finite everywhere")
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
    return torch.stack(terms).mean() if terms else torch.tensor(float("inf"))
