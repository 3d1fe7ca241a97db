"""`hf_geglu.ops.rms_norm` in the norms of a model that compute just that."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_geglu.ops.norm import plain_rms_norm, rms_norm
from hf_geglu.optimizing.plain import hooked, watched

FEWEST_ELEMENTS = 1 << 14
"""Below, calling a kernel costs more than it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormRecipe:
    """A norm is its weight and this."""

    eps: float

    def answer(self, module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
        """What the norm gives, or None where the module's own `forward` must."""
        if not torch.is_grad_enabled() or len(args) != 1 or kwargs or type(args[0]) is not Tensor:
            return None  # first: while a model generates, every question takes time
        x_D: Tensor = args[0]
        if x_D.numel() < FEWEST_ELEMENTS or hooked(module) or watched() is not None:
            return None
        weight: Any = module.weight
        plain = type(weight) is nn.Parameter and weight.dtype == x_D.dtype and weight.device == x_D.device
        if not plain or x_D.dim() < 2 or torch.compiler.is_compiling():
            return None
        if not (x_D.requires_grad or weight.requires_grad):
            return None
        return rms_norm(x_D, weight, self.eps)


def norm_recipes(model: nn.Module) -> dict[nn.Module, NormRecipe]:
    """The norms of a model that `rms_norm` computes, shown on numbers in float32 and, bit for bit, in bfloat16."""
    known: dict[tuple[type, int, float], bool] = {}
    found = {}
    for module in model.modules():
        eps = _eps(module)
        if eps is None:
            continue
        key = (type(module), module.weight.numel(), eps)  # type: ignore[operator]
        if key not in known:
            known[key] = _is_rms_norm(module, eps)
        if known[key]:
            found[module] = NormRecipe(eps=eps)
    return found


def _eps(module: nn.Module) -> float | None:
    """The small constant of a module that holds one vector and nothing else."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.dim() != 1 or weight.is_meta or hooked(module):
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    values = [getattr(module, name, None) for name in ("variance_epsilon", "eps")]
    return next((value for value in values if isinstance(value, float)), None)


def _is_rms_norm(module: nn.Module, eps: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    width = module.weight.numel()  # type: ignore[operator]
    x_TD = torch.randn(7, width, generator=generator) * torch.tensor([1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0, 100.0])[:, None]
    weight = torch.randn(width, generator=generator)
    twin = copy.deepcopy(module).cpu()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            twin = twin.to(dtype)
            with torch.no_grad():
                twin.weight.copy_(weight)  # type: ignore[operator]
                expected, found = twin(x_TD.to(dtype)), plain_rms_norm(x_TD.to(dtype), weight.to(dtype), eps)
            same = expected.dtype == dtype and torch.allclose(expected, found, rtol=1e-6, atol=0.0)
            if not same or (dtype == torch.bfloat16 and not torch.equal(expected, found)):
                return False
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # it wants other arguments: no norm
    return True
