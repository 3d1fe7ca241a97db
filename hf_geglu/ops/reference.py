"""The unit and the block in plain torch, differentiable by autograd: what every kernel is tested against, and what runs
where no kernel fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F

from hf_geglu.errors import KernelError
from hf_geglu.functional import quick_gelu, relu_squared
from hf_geglu.ops.form import Form, Projection, split

_NATIVE: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "quick_gelu": quick_gelu,
        "silu": F.silu,
        "relu": F.relu,
        "relu2": relu_squared,
        "sigmoid": torch.sigmoid,
        "linear": lambda z: z,
    }
)


def unit(gate_F: torch.Tensor, value_F: torch.Tensor, activation: str, offset: float = 0.0) -> torch.Tensor:
    """activation(gate) * (value + offset), (..., F) (Shazeer 2020, arXiv:2002.05202, eq. 5 and 6)."""
    try:
        activated = _NATIVE[activation](gate_F)
    except KeyError:
        raise KernelError(f"no activation {activation!r}; expected one of: {', '.join(_NATIVE)}") from None
    return activated * (value_F + offset if offset else value_F)


def unit_in_two_steps(
    gate_F: torch.Tensor, value_F: torch.Tensor, activation: str, offset: float = 0.0
) -> torch.Tensor:
    """The same without a third tensor; not differentiable."""
    with torch.no_grad():
        return _NATIVE[activation](gate_F).mul_(value_F + offset if offset else value_F)


def project(x_D: torch.Tensor, projection: Projection, *, transposed: bool) -> torch.Tensor:
    """x W + b, with the weight (out, in), or (in, out) where `transposed`."""
    weight, bias = projection
    return F.linear(x_D, weight.t() if transposed else weight, bias)


def branches(
    x_D: torch.Tensor, gate: Projection | None, up: Projection, form: Form
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, value), each (..., F): two results, or views of one where they are packed."""
    if form.layout != "separate":
        return split(project(x_D, up, transposed=form.transposed), form)
    assert gate is not None
    return project(x_D, gate, transposed=form.transposed), project(x_D, up, transposed=form.transposed)


def block(
    x_D: torch.Tensor,
    gate: Projection | None,
    up: Projection,
    down: Projection,
    form: Form,
    *,
    noise_F: torch.Tensor | None = None,
) -> torch.Tensor:
    """A whole gated block, (..., D) -> (..., D). `noise_F` is what dropout multiplies the unit's answer by."""
    gate_F, value_F = branches(x_D, gate, up, form)
    hidden_F = unit(gate_F, value_F, form.activation, form.offset)
    if noise_F is not None:
        hidden_F = hidden_F * noise_F
    return project(hidden_F, down, transposed=form.transposed)
