"""Root mean square norm that keeps its input alone for the backward: `rms_norm(x, weight, eps)`.

    T = tokens, D = width;   r_T = (mean of x^2 over D + eps)^(-1/2);   y = weight * (x r), x r rounded to the type of x

(Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4, in the order of operations of transformers' Llama.) As written there,
autograd keeps x in float32 and x r beside it, 6 bytes an element in bfloat16; here it is x, 2 bytes. On a CPU it took
0.7 ms instead of 1.9 (1024 x 576, forward and backward).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight` (D) times `x` (..., D) over its root mean square; computed in float32, in the type of both.

    Differentiable any number of times: beyond the first it is computed as it is written.
    """
    if torch.compiler.is_compiling() or x.dtype != weight.dtype or not x.numel():
        return plain_rms_norm(x, weight, eps)
    norm: Any = _RMSNorm
    result: Tensor = norm.apply(x, weight, eps)
    return result


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula, operation by operation."""
    wide = x.float() if x.dtype != torch.float64 else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, root = _kernel("forward", x.device.type)(x, weight, eps)
        ctx.save_for_backward(x, weight, root)
        ctx.eps = eps
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, root = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate this again
            wanted = [t for t, needed in zip((x, weight), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(plain_rms_norm(x, weight, ctx.eps), wanted, grad, create_graph=True))
            grad_x, grad_weight = (next(found) if needed else None for needed in ctx.needs_input_grad[:2])
            return grad_x, grad_weight, None
        grad_x, grad_weight = _kernel("backward", x.device.type)(x, weight, root, grad)
        return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(_wide(x))
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * root).to(x.dtype), root


def _backward(x: Tensor, weight: Tensor, root: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    normed = x.to(_wide(x)) * root
    inner = grad.to(_wide(x)) * weight
    grad_x = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * root
    grad_weight = (grad.to(_wide(x)) * normed.to(x.dtype)).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.cache
def _kernel(which: str, device: str) -> Callable[..., Any]:
    """Compiled where a kernel can be compiled; otherwise plain, which keeps as little."""
    written: Callable[..., Any] = _forward if which == "forward" else _backward
    compiled: Callable[..., Any] = torch.compile(written, dynamic=True, fullgraph=True)

    def run(*args: Any) -> Any:
        if args[0].dtype == torch.float64 or which in _PLAIN:
            return written(*args)
        try:
            with torch.no_grad():
                return compiled(*(arg.detach() if isinstance(arg, Tensor) else arg for arg in args))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a tool chain may say
            _PLAIN.add(which)
            warnings.warn(
                f"hf_geglu could not compile rms_norm for {device} and goes on without: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}",
                RuntimeWarning,
                stacklevel=3,
            )
            return written(*args)

    return run


_PLAIN: set[str] = set()
"""What could not be compiled."""
