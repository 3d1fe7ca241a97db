"""Random weights under which every part of a small model matters.

Initialisers are made for training: layer scales of 1e-6, output projections of zero, a standard deviation of 0.02 at
any width, parameters that a checkpoint would fill and that are uninitialised memory until then. In such a model an FFN
block hardly moves the output, and a wrong one goes unnoticed.
"""

from __future__ import annotations

import math

import torch
from torch import nn

_NOISE = 0.1
"""Standard deviation of what is added to norms (around 1) and biases (around 0)."""


@torch.no_grad()
def randomise(model: nn.Module, *, seed: int = 0) -> None:
    """Matrices become N(0, 1/fan_in), so that every layer keeps the size of its input; in place.

    Norm weights and biases get noise. Other parameters (decays, positions, class tokens) stay, unless they are not
    finite or next to nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and parameter.is_floating_point() and parameter.numel():
                seen.add(id(parameter))
                _fill(module, name, parameter, generator)


def _fill(module: nn.Module, name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    matrix = (name == "weight" and parameter.dim() > 1) or (parameter.dim() == 3 and min(parameter.shape) > 1)
    if isinstance(module, nn.Embedding):
        parameter.copy_(noise)
    elif matrix:
        parameter.copy_(noise / math.sqrt(_fan_in(module, parameter)))
    elif _is_constant(parameter, 1.0):
        parameter.copy_(1.0 + _NOISE * noise)
    elif _is_constant(parameter, 0.0) or not bool(parameter.isfinite().all()):
        parameter.copy_(_NOISE * noise)
    elif parameter.abs().max() < 1e-3:
        parameter.copy_(0.5 + _NOISE * noise)  # a layer scale


def _fan_in(module: nn.Module, parameter: nn.Parameter) -> int:
    if hasattr(module, "nf"):  # transformers' Conv1D keeps (in, out)
        return parameter.shape[0]
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        return max(math.prod(parameter.shape[1:]), 1)
    return parameter.shape[-1]


def _is_constant(parameter: nn.Parameter, value: float) -> bool:
    return bool((parameter == value).all())
