"""retarget: a gated block gets another gate activation, ``act(z) v = f(a z) (beta v)``, folded into its weights."""

from __future__ import annotations

from typing import Literal

import torch

from hf_geglu.conversions.coefficients import Coefficients
from hf_geglu.conversions.precision import Factor, product, rounded, scaled, shifted
from hf_geglu.conversions.scaling import Scaling
from hf_geglu.errors import ConversionError
from hf_geglu.functional import split_packed


def retarget(
    parameter: torch.Tensor,
    branch: Literal["gate", "value"],
    line: Scaling | Coefficients,
    *,
    shift: Factor = 0.0,
    dim: int = 0,
) -> torch.Tensor:
    """A weight or bias of a gated block as the new gate wants it: ``a parameter + shift`` (gate) or ``beta parameter``
    (value).

    Exact where the line is; for SiLU -> GELU it is ``silu(z) ~ 1.702 gelu(z/1.702)`` (arXiv:1606.08415, section 2), or
    one line a neuron.

    Args:
        parameter: weight or bias of that branch, any shape.
        branch: which of the two it belongs to.
        line: a row of `scaling.SCALINGS`, or one line a neuron, with alpha = 0.
        shift: added to the gate: b for a bias, 0 for a weight.
        dim: the dimension that counts outputs.

    Returns:
        Same shape and dtype, computed in float32 or better and rounded once.

    Raises:
        ConversionError: `line` needs the value branch for itself (alpha != 0).
        WeightsError: a value leaves the range of the dtype.
    """
    if not line.fits_gated:
        name = f"{line.source} -> {line.gate}" if isinstance(line, Scaling) else "this fit"
        raise ConversionError(
            f"{name} writes the gate's input into the value branch, but a gated block uses "
            "its value branch; expected a scaling with alpha = 0"
        )
    factor = line.a if branch == "gate" else line.beta
    if not isinstance(shift, torch.Tensor) and shift == 0.0:
        return product(parameter, factor, dim)
    return rounded(shifted(scaled(parameter, factor, dim), shift, dim), parameter.dtype)


def retarget_packed(
    parameter: torch.Tensor,
    line: Scaling | Coefficients,
    *,
    layout: Literal["packed", "interleaved"],
    gate_half: Literal["first", "last"],
    shift: Factor = 0.0,
    dim: int = 0,
) -> torch.Tensor:
    """`retarget` for a parameter that holds both branches, 2F long in `dim`. Same shape and dtype."""
    result = parameter.detach().clone()
    gate, value = split_packed(result.movedim(dim, -1), layout, gate_half)
    gate.copy_(retarget(gate, "gate", line, shift=shift, dim=-1))
    value.copy_(retarget(value, "value", line, dim=-1))
    return result
