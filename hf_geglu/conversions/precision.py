"""In which precision conversions compute: float32 or better, rounded once to the model's dtype at the end."""

from __future__ import annotations

import torch

from hf_geglu.errors import WeightsError

Factor = float | torch.Tensor
"""One number for every output of a projection, or one for each: (F,), of stacked experts (E, F)."""


def scaled(tensor: torch.Tensor, factor: Factor, dim: int = 0) -> torch.Tensor:
    """``factor * tensor`` in float32, or float64 for a float64 tensor. Same shape.

    Args:
        tensor: a weight or a bias.
        factor: a number, or one for each output.
        dim: the dimension of `tensor` that counts outputs.
    """
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    if isinstance(factor, torch.Tensor):
        return wide * along(factor, wide, dim)
    # a plain zero: 0 * w would leave -0.0, or NaN where w is not finite
    return torch.zeros_like(wide) if factor == 0.0 else wide * factor


def along(factor: Factor, tensor: torch.Tensor, dim: int) -> Factor:
    """A factor for each output in the shape that multiplies `tensor` along `dim`.

    Of stacked experts, (E, F) meets (E, F), (E, F, D) or (E, D, F), or (E F, D) where their rows lie one after the
    other.
    """
    if not isinstance(factor, torch.Tensor):
        return factor
    factor = factor.to(tensor)
    dim %= tensor.ndim
    shape = [1] * tensor.ndim
    if factor.ndim == 2 and dim > 0:
        shape[0] = factor.shape[0]
        shape[dim] = factor.shape[1]
        return factor.reshape(shape)
    shape[dim] = factor.numel()
    return factor.reshape(shape)


def shifted(tensor: torch.Tensor, constant: Factor, dim: int = 0) -> torch.Tensor:
    """``tensor + constant`` along `dim`; untouched by a plain zero, which would turn -0.0 into 0.0."""
    return (
        tensor if not isinstance(constant, torch.Tensor) and constant == 0.0 else tensor + along(constant, tensor, dim)
    )


def product(tensor: torch.Tensor, factor: Factor, dim: int = 0) -> torch.Tensor:
    """``rounded(scaled(tensor, factor, dim), tensor.dtype)``; for a number in one pass: torch multiplies 16-bit numbers
    by a Python number in float32 and rounds once. Raises WeightsError as `rounded` does."""
    if isinstance(factor, torch.Tensor):
        return rounded(scaled(tensor, factor, dim), tensor.dtype)
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


def all_finite(tensor: torch.Tensor) -> bool:
    """Neither NaN nor infinity, told in one pass: a finite sum has finite terms, at a tenth of what
    ``isfinite(...).all()`` costs; one that is not may have overflowed."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def _check_finite(result: torch.Tensor, given: torch.Tensor, factor: float) -> None:
    if all_finite(result):
        return
    raise WeightsError(
        f"a converted weight is not finite in {result.dtype}: largest magnitude "
        f"{given.abs().max().item() * abs(factor):.3g}, the format ends at {torch.finfo(result.dtype).max:.3g}; load "
        "the model in float32 or bfloat16"
    )
