"""In which precision conversions compute: float32 or better, rounded once to the model's dtype at the end."""

from __future__ import annotations

import torch

from hf_geglu.errors import WeightsError


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """``factor * tensor`` in float32, or float64 for a float64 tensor. Same shape."""
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    # a plain zero: 0 * w would leave -0.0, or NaN where w is not finite
    return torch.zeros_like(wide) if factor == 0.0 else wide * factor


def product(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """``rounded(scaled(tensor, factor), tensor.dtype)`` in one pass: torch multiplies 16-bit numbers by a Python number
    in float32 and rounds once. Raises WeightsError as `rounded` does."""
    if factor == 0.0:
        return torch.zeros_like(tensor)
    result = tensor.detach() * factor
    _check_finite(result, tensor, factor)
    return result


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To `dtype`. Raises WeightsError where a finite weight leaves its range (float16 ends at 65504)."""
    result = tensor.to(dtype)
    _check_finite(result, tensor, 1.0)
    return result


def _check_finite(result: torch.Tensor, given: torch.Tensor, factor: float) -> None:
    # a finite sum has finite terms, at a tenth of what isfinite(...).all() costs; one that is not may have overflowed
    if torch.isfinite(result.sum()) or torch.isfinite(result).all():
        return
    raise WeightsError(
        f"a converted weight is not finite in {result.dtype}: largest magnitude "
        f"{given.abs().max().item() * abs(factor):.3g}, the format ends at {torch.finfo(result.dtype).max:.3g}; load "
        "the model in float32 or bfloat16"
    )
