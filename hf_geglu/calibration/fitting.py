"""Fits of ``act(z) = f(a z + b) (alpha z + beta) + d``, one line a neuron, to a weighted distribution of z.

Levenberg-Marquardt on all neurons at once, from a line that is known to be good: an accepted step lowers a neuron's
error, so no neuron ends worse than it began.

Legend of suffixes: N neurons, K bins, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch

from hf_geglu.errors import ConversionError

Parameter = Literal["a", "b", "alpha", "beta", "d"]
ORDER: tuple[Parameter, ...] = ("a", "b", "alpha", "beta", "d")
STEPS = 30
_ROOT_2, _ROOT_PI = math.sqrt(2.0), math.sqrt(2.0 * math.pi)


def _gelu(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    phi = 0.5 * (1.0 + torch.erf(u / _ROOT_2))
    return u * phi, phi + u * torch.exp(-u * u / 2.0) / _ROOT_PI


def _gelu_tanh(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    k = math.sqrt(2.0 / math.pi)
    t = torch.tanh(k * (u + 0.044715 * u**3))
    return 0.5 * u * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t * t) * k * (1.0 + 3 * 0.044715 * u * u)


def _silu(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.sigmoid(u)
    return u * s, s * (1.0 + u * (1.0 - s))


def _sigmoid(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.sigmoid(u)
    return s, s * (1.0 - s)


GATES: Mapping[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = MappingProxyType(
    {"gelu": _gelu, "gelu_pytorch_tanh": _gelu_tanh, "silu": _silu, "sigmoid": _sigmoid}
)
"""Gate activations with their derivatives: those that bend smoothly, so that scale and shift can be fitted."""


def fit_lines(
    target_NK: torch.Tensor,
    z_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    gate: str,
    start: Mapping[Parameter, torch.Tensor],
    free: Sequence[Parameter],
) -> tuple[dict[Parameter, torch.Tensor], torch.Tensor]:
    """The weighted least-squares line of every neuron.

    Args:
        target_NK: act(z) at the points.
        z_NK: the points.
        weight_NK: their weights.
        gate: f, a name of `GATES`.
        start: (N,) each.
        free: which of a, b, alpha, beta, d are fitted; the others stay as they start.

    Returns:
        The line, (N,) float64 each, and the root of the weighted mean square of its error relative to that of the
        target, (N,).

    Raises:
        ConversionError: a gate that is not in `GATES`.
    """
    if gate not in GATES:
        raise ConversionError(f"lines are fitted to the gates {', '.join(GATES)}; {gate!r} has no slope to fit them by")
    line = torch.stack([start[name].double() for name in ORDER], dim=1)
    columns = torch.tensor([ORDER.index(name) for name in free], dtype=torch.int64)
    damping = torch.full((len(line),), 1e-3, dtype=torch.float64)
    error, residual, slopes = _linearised(line, target_NK, z_NK, weight_NK, gate)
    for _ in range(STEPS if free else 0):
        jacobian = slopes[:, :, columns]
        normal = torch.einsum("nk,nkp,nkq->npq", weight_NK, jacobian, jacobian)
        rhs = torch.einsum("nk,nkp,nk->np", weight_NK, jacobian, residual)
        diagonal = torch.diagonal(normal, dim1=1, dim2=2)
        ridge = damping[:, None] * diagonal + 1e-12 * diagonal.amax(dim=1, keepdim=True) + 1e-300
        step = torch.linalg.solve(normal + torch.diag_embed(ridge), rhs)
        tried = line.clone()
        tried[:, columns] += step
        new_error, new_residual, new_slopes = _linearised(tried, target_NK, z_NK, weight_NK, gate)
        better = new_error < error
        if not better.any() and damping.min() > 1e6:
            break
        line = torch.where(better[:, None], tried, line)
        residual = torch.where(better[:, None], new_residual, residual)
        slopes = torch.where(better[:, None, None], new_slopes, slopes)
        settled = (error - new_error).abs().amax() <= 1e-12 * error.abs().amax()
        error = torch.where(better, new_error, error)
        damping = torch.where(better, damping * 0.3, damping * 8.0).clamp(1e-9, 1e9)
        if settled:
            break
    size = (weight_NK * target_NK.square()).sum(dim=1).clamp_min(1e-300)
    return {name: line[:, column].clone() for column, name in enumerate(ORDER)}, (error / size).sqrt()


def _linearised(
    line_NP: torch.Tensor, target_NK: torch.Tensor, z_NK: torch.Tensor, weight_NK: torch.Tensor, gate: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weighted squared error (N,), residual (N, K), slopes (N, K, P)) of the lines."""
    a, b, alpha, beta, d = (column[:, None] for column in line_NP.unbind(dim=1))
    value, slope = GATES[gate](a * z_NK + b)
    factor = alpha * z_NK + beta
    residual = target_NK - value * factor - d
    slopes = torch.stack([slope * factor * z_NK, slope * factor, value * z_NK, value, torch.ones_like(value)], dim=2)
    return (weight_NK * residual.square()).sum(dim=1), residual, slopes
