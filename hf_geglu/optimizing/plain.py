"""Whether a module is called for nothing but its formula, so that a kernel may compute it without calling it.

A hook, a wrapper, a quantised or sharded weight: each has its effect in the call of the module. Where there is one, the
call must happen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers.pytorch_utils import Conv1D

from hf_geglu.ops import Projection

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


def part(block: nn.Module, path: str) -> nn.Module:
    """The module at that path: `get_submodule` in a fraction of its time, for what is asked at every call."""
    for name in path.split(".") if path else ():
        block = block._modules[name]  # type: ignore[assignment]
    return block


def hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its class says: hooks, or a `forward` of its own (accelerate's)."""
    state = module.__dict__
    forward_hooks, pre_hooks, backward_hooks, backward_pre_hooks = _HOOKS
    return bool(
        "forward" in state
        or state.get(forward_hooks)
        or state.get(pre_hooks)
        or state.get(backward_hooks)
        or state.get(backward_pre_hooks)
    )


def not_plain(projection: nn.Module) -> str | None:
    """Why this projection must be called; None for an ordinary linear layer or GPT-2's Conv1D with ordinary weights."""
    if type(projection) is not nn.Linear and type(projection) is not Conv1D:
        return f"a projection is a {type(projection).__module__}.{type(projection).__name__}, which must be called"
    if hooked(projection):
        return "a projection has a hook, which must be called"
    weight, bias = tensors_of(projection)
    for tensor in (weight, bias):
        if tensor is not None and type(tensor) not in _PLAIN_TENSORS:
            return f"a projection's weight is a {type(tensor).__name__}"
    return "a projection's weight is sharded or has no values" if weight.dim() != 2 or weight.is_meta else None


def tensors_of(projection: nn.Module) -> Projection:
    """Its weight and bias."""
    own = projection._parameters
    if "weight" in own and "bias" in own:  # attributes take twenty times as long
        return own["weight"], own["bias"]  # type: ignore[return-value]
    return projection.weight, projection.bias  # type: ignore[return-value]


def watched() -> str | None:
    """Why modules must be called as long as this goes on, whatever they are: somebody records, exports or transforms
    what is computed. None in ordinary execution, and under `torch.compile`."""
    if torch.compiler.is_compiling():
        exporting = getattr(torch.compiler, "is_exporting", None)  # torch 2.7
        asked = exporting() if exporting is not None else not torch.compiler.is_dynamo_compiling()
        return "the model is being exported" if asked else None
    if torch._C._get_tracing_state() is not None or torch.onnx.is_in_onnx_export():
        return "the model is being traced"
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "hooks are set for all modules"
    if forward_ad._current_level >= 0 or _transformed():
        return "a transform of torch.func or forward-mode differentiation is at work"
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if torch._C._len_torch_dispatch_stack() or any(type(mode) is not DeviceContext for mode in modes):
        return "somebody watches the operations"
    return None


def _transformed() -> bool:
    asked: Any = getattr(torch._C._functorch, "peek_interpreter_stack", None)
    return asked is not None and asked() is not None
