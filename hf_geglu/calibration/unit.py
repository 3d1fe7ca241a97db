"""What enters the down projection: as the block computes it, and as a fitted line would.

Legend of suffixes: T tokens, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_geglu.calibration.seen import Seen
from hf_geglu.conversions import Coefficients
from hf_geglu.functional import activation


def unit_now(seen: Seen) -> torch.Tensor:
    """(T, F) float32: ``act(z) v``, without v for a dense block."""
    unit_TF = activation(seen.site.activation)(seen.z_TF.float())
    return unit_TF if seen.v_TF is None else unit_TF * seen.v_TF.float()


def unit_fitted(seen: Seen, line: Coefficients, gate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(T, F) float32: ``f(a z + b) (alpha z + beta)``, in a gated block ``f(a z + b) (beta v)``.

    Args:
        seen: the site's activations, of one expert where it is a stack of them.
        line: of the site's neurons.
        gate: f.
    """
    z_TF = seen.z_TF.float()
    a, b, alpha, beta = (_of_expert(factor, seen) for factor in (line.a, line.b, line.alpha, line.beta))
    if seen.site.gated:
        assert seen.v_TF is not None
        return gate(a * z_TF + b) * (beta * seen.v_TF.float())
    return gate(a * z_TF + b) * (alpha * z_TF + beta)


def _of_expert(factor: float | torch.Tensor, seen: Seen) -> float | torch.Tensor:
    if not isinstance(factor, torch.Tensor):
        return factor
    chosen = factor[seen.expert or 0] if factor.dim() == 2 else factor
    return chosen.to(seen.z_TF.device, torch.float32)
