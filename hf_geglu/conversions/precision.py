"""In which precision conversions compute: float32 or better, rounded once to the model's dtype at the end."""

from __future__ import annotations

import torch

from hf_geglu.errors import WeightsError


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """``factor * tensor`` in float32, or float64 for a float64 tensor. Same shape."""
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    # a plain zero: 0 * w would leave -0.0, or NaN where w is not finite
    return torch.zeros_like(wide) if factor == 0.0 else wide * factor


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To `dtype`. Raises WeightsError where a finite weight leaves its range (float16 ends at 65504)."""
    result = tensor.to(dtype)
    # the extremes tell as much as isfinite(...).all() and cost a fifth of it: NaN is always among them
    if result.numel() and not torch.isfinite(torch.stack(result.aminmax())).all():
        raise WeightsError(
            f"a converted weight is not finite in {dtype}: largest magnitude {tensor.abs().max().item():.3g}, the "
            "format "
            f"ends at {torch.finfo(dtype).max:.3g}; load the model in float32 or bfloat16"
        )
    return result
