"""expand: a dense block becomes a gated one, ``Wd act(W1 x + b1) = Wd (f(Wg x + bg) * (Wv x + bv))``."""

from __future__ import annotations

import torch

from hf_geglu.conversions.precision import rounded, scaled
from hf_geglu.conversions.scaling import Scaling


def expand(
    weight: torch.Tensor, bias: torch.Tensor | None, scaling: Scaling, *, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed up projection ``[gate | value]`` that computes what the dense one and its activation did.

    With ``act(z) = f(a z) (alpha z + beta)`` and ``z = W1 x + b1``:
    Wg = a W1, bg = a b1, Wv = alpha W1, bv = alpha b1 + beta. For a GELU owner that is Wg = W1, Wv = 0, bv = 1: exact,
    and
    the value branch receives its gradient from the first step, since ``d out/d Wv = Wd gelu(z) x`` is not zero.

    Args:
        weight: (F, D), or (D, F) where `transposed` (GPT-2's Conv1D).
        bias: (F,) or None.
        scaling: the line of `scaling.SCALINGS` to fold in.

    Returns:
        Weight (2F, D), or (D, 2F) where transposed, and bias (2F,), in the dtype of `weight`. Computed in float32 or
        better and rounded once.
    """
    output_dim = 1 if transposed else 0
    dense_bias = weight.new_zeros(weight.shape[output_dim]) if bias is None else bias
    packed_weight = torch.cat([scaled(weight, scaling.a), scaled(weight, scaling.alpha)], dim=output_dim)
    packed_bias = torch.cat([scaled(dense_bias, scaling.a), scaled(dense_bias, scaling.alpha) + scaling.beta])
    return rounded(packed_weight, weight.dtype), rounded(packed_bias, weight.dtype)
