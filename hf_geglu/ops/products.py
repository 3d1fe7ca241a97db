"""The matrix products of a block, for weights (out, in) and (in, out); nothing here is differentiable.

In float32 on a CPU, `hf_geglu.ops.onednn` multiplies where it was measured to be clearly quicker.

Legend: T tokens, I inputs and O outputs of a projection.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache

import torch

from hf_geglu.ops import onednn, reference
from hf_geglu.ops.form import Projection

ENOUGH = 1024
"""Tokens from which on a copy of the operand could pay for itself."""

MARGIN = 0.9
"""How much quicker the product with a copy must have been."""


def project(x_TI: torch.Tensor, projection: Projection, *, transposed: bool) -> torch.Tensor:
    """x W + b, as `reference.project`."""
    weight, bias = projection
    if onednn.better(x_TI, weight):
        return onednn.times(x_TI, weight if transposed else weight.t(), bias)
    return reference.project(x_TI, projection, transposed=transposed)


def through(grad_TO: torch.Tensor, weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """``grad W``, (T, I)."""
    matrix_OI = weight.t() if transposed else weight
    return onednn.times(grad_TO, matrix_OI) if onednn.better(grad_TO, weight) else torch.mm(grad_TO, matrix_OI)


def input_gradient(
    grad_TO: torch.Tensor, weight: torch.Tensor, *, transposed: bool, out: torch.Tensor, add: bool = False
) -> None:
    """``grad W`` into `out` (T, I), or added to it."""
    matrix_OI = weight.t() if transposed else weight
    if onednn.better(grad_TO, weight):
        product_TI = onednn.times(grad_TO, matrix_OI)
        out.add_(product_TI) if add else out.copy_(product_TI)
    elif add:
        out.addmm_(grad_TO, matrix_OI)
    else:
        torch.mm(grad_TO, matrix_OI, out=out)


@cache
def copies_pay(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the product of a transposed matrix in a 16-bit type is quicker through a contiguous copy: measured once.

    It depends on the matrix library's kernels for the processor: a factor of 0.70 to 0.84 with the copy on one machine,
    1.05 to 1.12 on another.
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    wide = torch.ones((ENOUGH, 1024), dtype=dtype)
    narrow = torch.ones((ENOUGH, 512), dtype=dtype)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(5):
        for copied, measured in times.items():
            start = time.thread_time()
            left = wide.t().contiguous() if copied else wide.t()
            torch.mm(left, narrow)
            measured.append(time.thread_time() - start)
    return min(times[True]) < MARGIN * min(times[False])


@dataclass(slots=True)
class Sums:
    """Gradients of parameters, of one tile or added up over several.

    A weight's shares are added inside the matrix product, which sums in float32 and rounds each time it adds: with 8
    tiles a 16-bit gradient has 1.2 times (noise) to 1.8 times (all of one sign) the error of one that is computed at
    once. Sums in float32 would cost two more copies of the weights. Biases are added in float32.
    """

    found: dict[str, torch.Tensor] = field(default_factory=dict)
    dx_TI: torch.Tensor | None = None
    """The gradient of the input; made as late as possible."""

    def input_rows(self, x_TI: torch.Tensor, tile: slice | None) -> torch.Tensor:
        """Where a tile's share of the gradient of `x_TI`, all tokens, belongs; None is the only tile."""
        if self.dx_TI is None:
            self.dx_TI = torch.empty(x_TI.shape, dtype=x_TI.dtype, device=x_TI.device)
        return self.dx_TI if tile is None else self.dx_TI[tile]

    def add_product(self, name: str, grad_TO: torch.Tensor, x_TI: torch.Tensor, *, transposed: bool) -> None:
        """A weight's share: ``grad^T x`` (O, I), or ``x^T grad`` (I, O) where the weight is `transposed`."""
        first, second = (x_TI, grad_TO) if transposed else (grad_TO, x_TI)
        left = first.t()
        if onednn.better(left, second):
            share = onednn.times(left, second)
            self.found[name] = self.found[name].add_(share) if name in self.found else share
            return
        if first.shape[0] >= ENOUGH and copies_pay(first.device.type, first.dtype):
            left = left.contiguous()
        if name in self.found:
            self.found[name].addmm_(left, second)
        else:
            self.found[name] = left @ second

    def add_rows(self, name: str, grad_TO: torch.Tensor) -> None:
        """A bias's share: the sum over tokens."""
        low = grad_TO.dtype in (torch.bfloat16, torch.float16)
        share = grad_TO.sum(0, dtype=torch.float32 if low else None)
        self.found[name] = self.found[name] + share if name in self.found else share

    def take(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """The sum in the parameter's dtype; it is not kept here."""
        gradient = self.found.pop(name, None)
        return None if gradient is None else gradient.to(dtype)
