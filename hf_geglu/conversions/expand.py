"""expand: a dense block becomes a gated one, ``Wd act(W1 x + b1) = Wd (f(Wg x + bg) * (Wv x + bv))``."""

from __future__ import annotations

import torch

from hf_geglu.conversions.coefficients import Coefficients
from hf_geglu.conversions.precision import Factor, rounded, scaled, shifted
from hf_geglu.conversions.scaling import Scaling


def expand(
    parameter: torch.Tensor,
    line: Scaling | Coefficients,
    *,
    constant: Factor = 0.0,
    shift: Factor = 0.0,
    dim: int = 0,
    groups: int = 1,
) -> torch.Tensor:
    """A weight or bias of the packed up projection ``[gate | value]`` that computes what the dense one and its
    activation did.

    With ``act(z) = f(a z + b) (alpha z + beta)`` and ``z = W1 x + b1``:
    Wg = a W1, bg = a b1 + b, Wv = alpha W1, bv = alpha b1 + beta. For a GELU owner that is Wg = W1, Wv = 0, bv = 1:
    exact, and the value branch receives its gradient from the first step, since ``d out/d Wv = Wd gelu(z) x`` is not
    zero.

    Args:
        parameter: W1 or b1; zeros where the dense projection has no bias.
        line: the row of `scaling.SCALINGS` to fold in, or one line a neuron.
        constant: added to the value half: beta for a bias, 0 for a weight.
        shift: added to the gate half: b for a bias, 0 for a weight.
        dim: the dimension that counts outputs, F long.
        groups: of a grouped convolution; each group of outputs is packed for itself.

    Returns:
        The same shape but 2F long in `dim`, in the dtype of `parameter`. Computed in float32 or better and rounded
        once.

    Raises:
        WeightsError: a value leaves the range of the dtype.
    """
    gate = shifted(scaled(parameter, line.a, dim), shift, dim)
    value = shifted(scaled(parameter, line.alpha, dim), constant, dim)
    halves = [torch.unflatten(half, dim, (groups, -1)) for half in (gate, value)]
    return rounded(torch.cat(halves, dim=dim + 1).flatten(dim, dim + 1), parameter.dtype)
