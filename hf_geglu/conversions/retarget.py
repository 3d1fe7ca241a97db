"""retarget: a gated block gets another gate activation, ``act(z) v = f(a z) (beta v)``, folded into its weights."""

from __future__ import annotations

from typing import Literal

import torch

from hf_geglu.conversions.precision import product
from hf_geglu.conversions.scaling import Scaling
from hf_geglu.errors import ConversionError
from hf_geglu.functional import split_packed


def retarget(parameter: torch.Tensor, branch: Literal["gate", "value"], scaling: Scaling) -> torch.Tensor:
    """A weight or bias of a gated block as the new gate wants it: ``a parameter`` (gate) or ``beta parameter`` (value).

    Exact where `scaling` is; for SiLU -> GELU it is ``silu(z) ~ 1.702 gelu(z/1.702)`` (arXiv:1606.08415, section 2).

    Args:
        parameter: weight or bias of that branch, any shape.
        branch: which of the two it belongs to.
        scaling: a line of `scaling.SCALINGS` with alpha = 0.

    Returns:
        Same shape and dtype, computed in float32 or better and rounded once.

    Raises:
        ConversionError: `scaling` needs the value branch for itself (alpha != 0).
        WeightsError: a value leaves the range of the dtype.
    """
    if not scaling.fits_gated:
        raise ConversionError(
            f"{scaling.source} -> {scaling.gate} writes the gate's input into the value branch, but a gated block uses "
            "its value branch; expected a scaling with alpha = 0"
        )
    return product(parameter, scaling.a if branch == "gate" else scaling.beta)


def retarget_packed(
    parameter: torch.Tensor,
    scaling: Scaling,
    *,
    layout: Literal["packed", "interleaved"],
    gate_half: Literal["first", "last"],
    dim: int = 0,
) -> torch.Tensor:
    """`retarget` for a parameter that holds both branches, 2F long in `dim`. Same shape and dtype."""
    result = parameter.detach().clone()
    gate, value = split_packed(result.movedim(dim, -1), layout, gate_half)
    gate.copy_(retarget(gate, "gate", scaling))
    value.copy_(retarget(value, "value", scaling))
    return result
