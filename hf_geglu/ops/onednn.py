"""Products in float32 by oneDNN, through an operator of torch's compiler that takes ordinary tensors.

torch multiplies float32 matrices on a CPU by MKL, which on processors of other makers than its own runs at half of
their speed (on an AMD CPU with AVX-512, all nine products of a block took .44 to .54 of the time by oneDNN). A switch
of torch's for all products of a process (`torch.set_float32_matmul_precision("medium")`) leads there too, and allows
bfloat16 inside; this allows nothing.

oneDNN sums a row from one end to the other, MKL in several sums: over 2048 numbers its error is 2.2 times MKL's, over
1024 it is 1.6 times. Longer sums are made in parts.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor

LONGEST = 1024
"""Numbers that one product in float32 may sum."""

ENOUGH = 1 << 22
"""Multiplications of a product from which on its library matters."""

ROWS = 32
"""Rows of the left matrix from which on copying a part of the right one costs little beside their product."""

CLEARLY = 0.75
"""How much quicker oneDNN must have been. Where it is not MKL's equal it takes half of the time, so that noise decides
nothing, and a run that is resumed computes as before."""


def better(left_AK: Tensor, right: Tensor) -> bool:
    """Whether to multiply these by `times`; `right` may be transposed."""
    return (
        left_AK.dtype == torch.float32
        and right.dtype == torch.float32
        and left_AK.is_cpu
        and left_AK.shape[0] >= ROWS
        and left_AK.shape[0] * right.numel() >= ENOUGH
        and pays()
    )


def times(left_AK: Tensor, right_KB: Tensor, bias_B: Tensor | None = None) -> Tensor:
    """``left right + bias``; any strides. Not differentiable."""
    multiply: Any = torch.ops.mkldnn._linear_pointwise
    left_AK, right_BK = left_AK.detach(), right_KB.detach().t()
    size = -(-left_AK.shape[1] // -(-left_AK.shape[1] // LONGEST))
    answer_AB: Tensor | None = None
    for left, right in zip(*(torch.split(each, size, dim=1) for each in (left_AK, right_BK)), strict=True):
        if not right.is_contiguous() and not right.t().is_contiguous():
            right = right.contiguous()  # else a kernel that is 2,500 times slower
        if answer_AB is None:
            answer_AB = multiply(left, right, None if bias_B is None else bias_B.detach(), "none", [], "")
        else:
            answer_AB.add_(multiply(left, right, None, "none", [], ""))
    assert answer_AB is not None
    return answer_AB


def is_on() -> bool:
    """Whether torch has oneDNN and may use it."""
    asked: Any = torch.backends.mkldnn
    return bool(asked.is_available() and asked.enabled)


@cache
def pays() -> bool:
    """Whether products are much quicker so than by what torch takes for them: measured once, 512 x 768 x 1024. A second
    matrix library that is as quick as the first changes nothing."""
    if not is_on():
        return False
    left, right = torch.ones((512, 768)), torch.ones((768, 1024))
    spent: dict[bool, list[float]] = {False: [], True: []}
    try:
        with torch.no_grad():
            for _ in range(5):
                for own, measured in spent.items():
                    start = time.thread_time()
                    product = times(left, right) if own else torch.mm(left, right)
                    measured.append(time.thread_time() - start)
                    assert float(product[0, 0]) == 768.0
    except (AttributeError, AssertionError, RuntimeError):  # another version of a private operator
        return False
    return min(spent[True]) < CLEARLY * min(spent[False])
