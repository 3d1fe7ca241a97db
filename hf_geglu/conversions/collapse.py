"""collapse: the way back from `expand`, for a block whose value branch is where the conversion put it, or constant.

``Wd (f(Wg x + bg) * (Wv x + bv)) = Wd' act(W1 x + b1)`` with W1 = Wg/a, b1 = bg/a, where ``Wv = 0`` and the line of
`scaling.SCALINGS` is ``act(z) = beta f(a z)``: then neuron n's value is the constant ``v_n = bv_n``, and what it
differs from beta by goes into column n of the down projection, ``Wd'_n = Wd_n v_n / beta``.

Legend of suffixes: F intermediate size, E experts, D inputs, O outputs.
"""

from __future__ import annotations

import torch

from hf_geglu.conversions.expand import expand
from hf_geglu.conversions.precision import rounded
from hf_geglu.conversions.scaling import Scaling
from hf_geglu.errors import ConversionError
from hf_geglu.sites.projections import Form


def packed_halves(parameter: torch.Tensor, *, dim: int = 0, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, value) of a weight or bias that `expand` packed, each F long in `dim`."""
    gate, value = torch.unflatten(parameter, dim, (groups, 2, -1)).unbind(dim + 1)
    return gate.flatten(dim, dim + 1), value.flatten(dim, dim + 1)


def collapse(parameter: torch.Tensor, scaling: Scaling, *, dim: int = 0, groups: int = 1) -> torch.Tensor:
    """A weight or bias of the dense up projection out of the packed one: ``Wg / a``, or ``Wv / alpha`` where the line
    has the gate's input in the value branch.

    The bits that `expand` was given come back where that factor is a power of two (GELU, ReLU, ReLU^2) or 1 (SiLU and
    GELU as a sigmoid GLU, from the value half). Other factors (1.702) lose up to one rounding step of the dtype there
    and back; `collapse` of a model that still has its originals takes those.

    Args:
        parameter: 2F long in `dim`.
        scaling: the line that was folded in.
        dim: the dimension that counts outputs.
        groups: of a grouped convolution.

    Returns:
        The same shape but F long in `dim`, in a memory of its own, in the same dtype.
    """
    gate, value = packed_halves(parameter.detach(), dim=dim, groups=groups)
    half, factor = (gate, scaling.a) if scaling.fits_gated else (value, scaling.alpha)
    wide = half.to(torch.promote_types(half.dtype, torch.float32))
    dense = rounded(wide if factor == 1.0 else wide / factor, parameter.dtype)
    return dense.clone(memory_format=torch.contiguous_format)


def at_start(
    parameter: torch.Tensor, scaling: Scaling, *, constant: float = 0.0, dim: int = 0, groups: int = 1
) -> bool:
    """Whether the value half is still, bit for bit, what `expand` makes beside this gate half."""
    again = expand(
        collapse(parameter, scaling, dim=dim, groups=groups), scaling, constant=constant, dim=dim, groups=groups
    )
    (gate, value), (old_gate, old_value) = (packed_halves(each, dim=dim, groups=groups) for each in (parameter, again))
    if not torch.equal(value, old_value):
        return False
    return scaling.fits_gated or torch.equal(gate, old_gate)


def scale_neurons(weight: torch.Tensor, factors: torch.Tensor, form: Form, *, groups: int = 1) -> torch.Tensor:
    """The weight of a down projection with what it takes from neuron n multiplied by ``factors[n]``.

    Args:
        weight: (O, F) linear, (F, O) conv1d, (O, F/groups, 1...) pointwise, (E, O, F) stack, (E, F, O)
            stack_transposed.
        factors: (F,), or (E, F) for stacks.
        form: which of these.
        groups: of a grouped convolution, whose groups of outputs read groups of neurons.

    Returns:
        Same shape and dtype. Computed in float64 and rounded once: no bit is lost where the factors are powers of two.

    Raises:
        ConversionError: a stack whose experts lie one after the other in two dimensions.
        WeightsError: a value leaves the range of the dtype.
    """
    wide = weight.detach().double()
    factors = factors.to(wide)
    if form == "linear":
        result = wide * factors
    elif form == "conv1d":
        result = wide * factors[:, None]
    elif form == "pointwise":
        grouped = torch.unflatten(wide, 0, (groups, -1)) * factors.view(groups, 1, -1, *[1] * (wide.dim() - 2))
        result = grouped.flatten(0, 1)
    elif wide.dim() == 3:
        result = wide * (factors.unsqueeze(-2) if form == "stack" else factors.unsqueeze(-1))
    else:
        raise ConversionError(
            f"a down projection of {tuple(weight.shape)} ({form}) holds its neurons in no dimension of their own, so "
            "no constant can be folded into it; leave the layer out with `layers=`"
        )
    return rounded(result, weight.dtype)
