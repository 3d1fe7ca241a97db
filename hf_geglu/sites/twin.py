"""The probe twin: a stand-in for a module that can be run, broken and thrown away without the original noticing.

The twin has the classes, the structure and the attributes of the original, but none of its weights: large tensors
become one row of float64 numbers seen from every index (a matrix of 4096 x 11008 costs 86 KB), small ones become random
vectors. So a model in bfloat16, on the meta device or spread over machines is probed like any other, and no hook,
cache or mode of the original is ever touched.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from hf_geglu.sites.projections import read_port

SMALL = 4096
"""Tensors up to this size get random values, so that a learned scale between two projections cannot pass unseen."""

_PLAIN = (
    int,
    float,
    complex,
    str,
    bytes,
    bool,
    type(None),
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    torch.dtype,
)
_INSTANCE_OVERRIDES = ("_old_forward", "_hf_hook")
"""What accelerate leaves on a dispatched module. There, and only there, the instance's `forward` is a hook and no
code."""
_FRESH = dict(nn.Module().__dict__)
"""The bookkeeping of a module without hooks, parameters or children."""


def stand_in(tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """A float64 tensor on the CPU of the same shape that costs nothing when it is large, whatever the original
    holds."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        kind = tensor.dtype if tensor.dtype in (torch.bool, torch.int32, torch.int64) else torch.int64
        return torch.full((), int(kind == torch.bool), dtype=kind, device="cpu").expand(tensor.shape)
    if tensor.numel() <= SMALL:
        return torch.rand(tensor.shape, generator=noise, dtype=torch.float64, device="cpu") + 0.5
    # a whole row, so that strides still tell which dimension came last when the tensor is seen transposed
    return torch.full(tensor.shape[-1:], 0.5, dtype=torch.float64, device="cpu").expand(tensor.shape)


def _buffer(buffer: torch.Tensor, name: str, noise: torch.Generator) -> torch.Tensor:
    """A stand-in, but single numbers as they are: the bounds of a clamp must stay in order, and a padding is itself.
    On the meta device, where they have no value, bounds are infinite."""
    floats = buffer.is_floating_point()
    if buffer.numel() != 1 or buffer.is_complex() or (buffer.is_meta and not floats):
        return stand_in(buffer, noise)
    if not buffer.is_meta:
        return buffer.detach().to("cpu", torch.float64 if floats else None, copy=True)
    bound = -math.inf if name.endswith("min") else math.inf if name.endswith("max") else 1.0
    return torch.full(buffer.shape, bound, dtype=torch.float64, device="cpu")


class Mold:
    """Casts twins of the modules of one model."""

    def __init__(self, model: nn.Module) -> None:
        # Everything that belongs to the model is its own copy for `deepcopy`, unless a twin of it is cast: an attribute
        # that refers to a parent, or to a tied weight, must not drag a copy of the whole model along.
        self._own: dict[int, Any] = {}
        for module in model.modules():
            self._own[id(module)] = module
            for tensors in (module._parameters, module._buffers):
                self._own.update((id(tensor), tensor) for tensor in tensors.values() if tensor is not None)

    def cast(self, module: nn.Module, stubbed: Mapping[int, Callable[[], nn.Module]] | None = None) -> nn.Module:
        """A twin of `module` in eval mode; what `stubbed` names by id is replaced by what it makes, unopened."""
        noise = torch.Generator().manual_seed(0)
        memo = dict(self._own)
        pairs: list[tuple[nn.Module, nn.Module]] = []
        twin = self._shape(module, memo, pairs, stubbed or {}, noise)
        for original, its_twin in pairs:
            self._furnish(original, its_twin, memo, noise)
        return twin

    def _shape(
        self,
        module: nn.Module,
        memo: dict[int, Any],
        pairs: list[tuple[nn.Module, nn.Module]],
        stubbed: Mapping[int, Callable[[], nn.Module]],
        noise: torch.Generator,
    ) -> nn.Module:
        """The tree of empty twins with their tensors; attributes follow once every module has its twin in `memo`."""
        known = memo.get(id(module))
        if known is not None and known is not module:
            return known  # type: ignore[no-any-return]
        if id(module) in stubbed:
            memo[id(module)] = stub = stubbed[id(module)]()
            return stub
        twin: nn.Module = type(module).__new__(type(module))
        nn.Module.__init__(twin)
        memo[id(module)] = twin
        pairs.append((module, twin))
        twin.__dict__["training"] = False
        projects = read_port(module) is not None
        for name, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[name] = None
                continue
            if memo.get(id(parameter)) is parameter or id(parameter) not in memo:
                # The weight of a projection is float64 even where it is stored as integers: T5 casts to its dtype.
                shape = torch.empty(parameter.shape, device="meta") if projects else parameter
                values = stand_in(shape, noise)
                if not projects and name.endswith("bias") and parameter.ndim > 1:
                    # of a stack of experts, added by hand to a product that answers with noise anyway
                    values = torch.zeros(1, dtype=torch.float64).expand(parameter.shape)
                memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
            twin._parameters[name] = memo[id(parameter)]
        for name, buffer in module._buffers.items():
            twin._buffers[name] = None if buffer is None else _buffer(buffer, name, noise)
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else self._shape(child, memo, pairs, stubbed, noise)
        return twin

    def _furnish(self, module: nn.Module, twin: nn.Module, memo: dict[int, Any], noise: torch.Generator) -> None:
        """Copy the plain attributes, bound to the twins where they refer to modules that have one."""
        dispatched = "_hf_hook" in module.__dict__
        for name, value in module.__dict__.items():
            if name in _FRESH or name in _INSTANCE_OVERRIDES or (dispatched and name == "forward"):
                continue
            if isinstance(value, _PLAIN):
                twin.__dict__[name] = value
            elif isinstance(value, torch.Tensor):
                twin.__dict__[name] = stand_in(value, noise)
            else:
                twin.__dict__[name] = self._copied(value, memo)

    def _copied(self, value: Any, memo: dict[int, Any]) -> Any:
        """A deep copy, or the value itself where it cannot be copied (a lock, an open file): reading it is harmless."""
        try:
            copied = copy.deepcopy(value, memo)
            if isinstance(value, PretrainedConfig):
                # experts one after the other, as their class says it, not by the grouped kernels that stand in for it
                copied.__dict__["_experts_implementation_internal"] = "eager"
                self._own[id(value)] = copied  # one copy serves every twin
            return copied
        except (TypeError, RuntimeError, NotImplementedError, AttributeError):
            return value
