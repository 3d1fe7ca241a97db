"""Activations with their derivatives, each written so that one exponential serves both.

A kernel that fuses the unit computes the derivative beside the value, in registers. What a formula costs there is its
transcendental functions: hence GELU's tanh form as a logistic function (``1 + tanh(u) = 2 sigmoid(2u)``) and the erf
form through the exponential that its derivative needs as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch

from hf_geglu.errors import KernelError

Formula: TypeAlias = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""z to (f(z), f'(z))."""

_SQRT_HALF = math.sqrt(0.5)
_DENSITY = 1.0 / math.sqrt(2.0 * math.pi)
_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715 * _SLOPE


def _gelu(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z Phi(z) (arXiv:1606.08415, section 2); its derivative is Phi(z) + z phi(z)."""
    phi = 0.5 * (1.0 + torch.erf(z * _SQRT_HALF))
    return z * phi, phi + z * torch.exp(-0.5 * z * z) * _DENSITY


def _gelu_one_exponential(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with erfc(x) = polynomial(1 / (1 + p x)) exp(-x^2), at most 1.5e-7 off (Abramowitz and Stegun, 7.1.26).

    torch's own vectorised erf on a CPU is that formula; written out, its exponential is also the density's.
    """
    x = z.abs() * _SQRT_HALF
    t = 1.0 / (1.0 + 0.3275911 * x)
    density = torch.exp(-x * x)
    polynomial = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * t * polynomial * density
    phi = torch.where(z >= 0.0, 1.0 - tail, tail)
    return z * phi, phi + z * density * _DENSITY


def _logistic(z: torch.Tensor, slope: float, cubic: float) -> tuple[torch.Tensor, torch.Tensor]:
    """z sigmoid(slope z + cubic z^3)."""
    square = z * z
    s = 1.0 / (1.0 + torch.exp(-z * (slope + cubic * square)))
    value = z * s
    return value, s + value * (1.0 - s) * (slope + 3.0 * cubic * square)


def _gelu_tanh(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _logistic(z, _SLOPE, _CUBIC)


def _quick_gelu(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _logistic(z, 1.702, 0.0)


def _silu(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _logistic(z, 1.0, 0.0)


def _relu(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return z.clamp_min(0.0), (z > 0.0).to(z.dtype)


def _relu_squared(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    positive = z.clamp_min(0.0)
    return positive * positive, 2.0 * positive


def _sigmoid(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = 1.0 / (1.0 + torch.exp(-z))
    return s, s * (1.0 - s)


def _linear(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return z, torch.ones_like(z)


FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "gelu": _gelu,
        "gelu_pytorch_tanh": _gelu_tanh,
        "quick_gelu": _quick_gelu,
        "silu": _silu,
        "relu": _relu,
        "relu2": _relu_squared,
        "sigmoid": _sigmoid,
        "linear": _linear,
    }
)
"""By their names in transformers' ACT2FN: every activation that has kernels."""


def formula(activation: str, *, one_exponential: bool = False) -> Formula:
    """Value and derivative of that activation. Raises KernelError with the list of names.

    Args:
        activation: its name.
        one_exponential: prefer fewer exponentials to erf, for fused kernels on a CPU.
    """
    try:
        found = FORMULAS[activation]
    except KeyError:
        raise KernelError(
            f"there is no kernel for the activation {activation!r}; expected one of: {', '.join(FORMULAS)}"
        ) from None
    return _gelu_one_exponential if one_exponential and found is _gelu else found
