"""The formulas themselves, as pure tensor mathematics: what every faster or stranger path is tested against.

Legend of suffixes: F intermediate size, P packed size (2F), D hidden size; a leading `...` stands for any batch
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch

from hf_geglu.errors import SiteError, VariantError

Activation = Callable[[torch.Tensor], torch.Tensor]


def gelu(z: torch.Tensor) -> torch.Tensor:
    """z Phi(z) with the normal distribution function by erf (arXiv:1606.08415, section 2)."""
    return z * 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))


def gelu_tanh(z: torch.Tensor) -> torch.Tensor:
    """The tanh form of GELU (arXiv:1606.08415, section 2). Differs from the erf form by at most 4.8e-4."""
    return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))


def quick_gelu(z: torch.Tensor) -> torch.Tensor:
    """z sigmoid(1.702 z) (arXiv:1606.08415, section 2)."""
    return z * torch.sigmoid(1.702 * z)


def silu(z: torch.Tensor) -> torch.Tensor:
    """z sigmoid(z) (arXiv:1606.08415, section 2; Swish-1 in arXiv:1710.05941)."""
    return z * torch.sigmoid(z)


def relu_squared(z: torch.Tensor) -> torch.Tensor:
    """max(0, z)^2 (arXiv:2109.08668, Primer)."""
    return torch.relu(z) ** 2


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": gelu,
        "gelu_pytorch_tanh": gelu_tanh,
        "quick_gelu": quick_gelu,
        "silu": silu,
        "relu": torch.relu,
        "relu2": relu_squared,
        "sigmoid": torch.sigmoid,
        "linear": torch.clone,
    }
)
"""Activations that a conversion can start from or lead to, by their names in transformers' ACT2FN."""


def activation(name: str) -> Activation:
    """The formula of that name. Raises VariantError with the list of names."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise VariantError(f"no formula for the activation {name!r}; known are: {', '.join(ACTIVATIONS)}") from None


def split_packed(
    packed_P: torch.Tensor, layout: Literal["packed", "interleaved"], gate_half: Literal["first", "last"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, value), each (..., F), out of a packed projection's output (..., 2F).

    "packed": two halves; "interleaved": even and odd positions. `gate_half` "first" means the first half, or the even
    positions. Raises SiteError where the last dimension is odd.
    """
    if packed_P.shape[-1] % 2:
        raise SiteError(
            f"a packed projection has an even number of outputs, but this one has {packed_P.shape[-1]}; "
            "check that the site's `up` is the packed projection"
        )
    if layout == "packed":
        first, last = packed_P.chunk(2, dim=-1)
    else:
        first, last = packed_P[..., 0::2], packed_P[..., 1::2]
    return (first, last) if gate_half == "first" else (last, first)


def glu_unit(gate_F: torch.Tensor, value_F: torch.Tensor, gate_activation: str) -> torch.Tensor:
    """f(gate) * value, (..., F) (Shazeer 2020, arXiv:2002.05202, eq. 5 and 6)."""
    return activation(gate_activation)(gate_F) * value_F


def ffn(
    x_D: torch.Tensor,
    gate: tuple[torch.Tensor, torch.Tensor | None],
    value: tuple[torch.Tensor, torch.Tensor | None] | None,
    down: tuple[torch.Tensor, torch.Tensor | None],
    gate_activation: str,
) -> torch.Tensor:
    """A whole FFN block, (..., D) -> (..., D): ``(f(x Wg + bg) * (x Wv + bv)) Wd + bd``, dense where `value` is None.

    Each projection is (weight, bias or None) with the weight as in nn.Linear, (out, in). Biases as in GLU (Dauphin et
    al. 2017, arXiv:1612.08083, eq. 1); Shazeer 2020 leaves them out.
    """
    hidden_F = activation(gate_activation)(torch.nn.functional.linear(x_D, *gate))
    if value is not None:
        hidden_F = hidden_F * torch.nn.functional.linear(x_D, *value)
    return torch.nn.functional.linear(hidden_F, *down)
