"""The unit through torch's compiler: forward, backward in place and backward beside, each one kernel.

Nothing is compiled before it is called; each kernel is compiled once for an activation and a dtype, for any number of
tokens. Where that cannot be (no C++ compiler, for one), one warning says why, and the caller goes on without.
"""

from __future__ import annotations

import os
import threading
import types
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from hf_geglu.ops.formulas import formula

_LOCK = threading.RLock()
_UNAVAILABLE: dict[str, str] = {}
"""By device type: why nothing can be compiled there."""

_SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


def why_not(device_type: str) -> str | None:
    """Why no kernel can be compiled for such a device; None as long as nothing is known against it."""
    for switch in _SWITCHES:
        if os.environ.get(switch) == "1":
            return f"{switch}=1 turns torch.compile off"
    return _UNAVAILABLE.get(device_type)


def forward(gate_TF: torch.Tensor, value_TF: torch.Tensor, activation: str, offset: float) -> torch.Tensor | None:
    """activation(gate) * (value + offset) as a new tensor; None where there is no such kernel."""
    ready = _ready(gate_TF, value_TF)
    if ready is None:
        return None
    hidden: torch.Tensor | None = _run("forward", activation, offset, ready)
    return None if hidden is None else hidden.view(gate_TF.shape)


def backward_(
    gate_TF: torch.Tensor, value_TF: torch.Tensor, hidden_TF: torch.Tensor, activation: str, offset: float
) -> bool:
    """In place: gate and value become their gradients, the gradient of the hidden state becomes the hidden state.
    False where there is no such kernel, and then nothing was done."""
    ready = _ready(gate_TF, value_TF, hidden_TF)
    return ready is not None and _run("backward_", activation, offset, ready) is not None


def backward(
    gate_TF: torch.Tensor,
    value_TF: torch.Tensor,
    gradient_TF: torch.Tensor,
    activation: str,
    offset: float,
    out: tuple[torch.Tensor, torch.Tensor],
) -> bool:
    """Gradients of gate and value into `out`. False where there is no such kernel, and then nothing was done."""
    ready = _ready(gate_TF, value_TF, gradient_TF, *out)
    return ready is not None and _run("backward", activation, offset, ready) is not None


def _ready(*tensors_TF: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """The tensors as kernels like them: all flat, or rows that are contiguous each by itself."""
    first = tensors_TF[0]
    if first.dtype == torch.float64 or first.numel() == 0 or 1 in first.shape:
        return None
    if all(tensor.is_contiguous() for tensor in tensors_TF):
        return tuple(tensor.detach().view(-1) for tensor in tensors_TF)
    return tuple(t.detach() for t in tensors_TF) if all(t.stride(-1) == 1 for t in tensors_TF) else None


def _run(which: str, activation: str, offset: float, tensors: tuple[torch.Tensor, ...]) -> Any:
    device = tensors[0].device.type
    if why_not(device) is not None:
        return None
    kernel = _kernel(which, activation, offset, tensors[0].dtype, device, tensors[0].dim())
    try:
        with torch.no_grad():
            return kernel(*tensors)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a tool chain may say
        with _LOCK:
            if device not in _UNAVAILABLE:
                _UNAVAILABLE[device] = reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                warnings.warn(
                    f"hf_geglu could not compile a kernel for {device} and goes on without, more slowly: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return None


@cache
def _kernel(
    which: str, activation: str, offset: float, dtype: torch.dtype, device: str, dims: int
) -> Callable[..., Any]:
    both = formula(activation, one_exponential=device == "cpu")

    def forward(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return (both(gate.float())[0] * (value.float() + offset)).to(gate.dtype)

    def backward_(gate: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor) -> bool:
        activated, slope = both(gate.float())
        shifted, gradient = value.float() + offset, hidden.float()
        gate.copy_(gradient * shifted * slope)
        value.copy_(gradient * activated)
        hidden.copy_(activated * shifted)
        return True

    def backward(
        gate: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, d_gate: torch.Tensor, d_value: torch.Tensor
    ) -> bool:
        activated, slope = both(gate.float())
        wide = gradient.float()
        d_gate.copy_(wide * (value.float() + offset) * slope)
        d_value.copy_(wide * activated)
        return True

    bodies: dict[str, Callable[..., Any]] = {"forward": forward, "backward_": backward_, "backward": backward}
    body = bodies[which]
    # The compiler counts recompilations by code object, and these closures would share one.
    name = f"{which.strip('_')}_{activation}_{str(dtype).removeprefix('torch.')}_{device}_{dims}d"
    assert isinstance(body, types.FunctionType)
    own = types.FunctionType(body.__code__.replace(co_name=name), globals(), name, None, body.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, dynamic=True, fullgraph=True, options=_options(device))
    return compiled


def _options(device: str) -> dict[str, Any]:
    """Multiplication and addition in one instruction, a tenth of a kernel's time; the compiler's own setting keeps
    them apart."""
    from torch._inductor import config

    name = "enable_floating_point_contract_flag"
    known = getattr(config.cpp, name, None) if device == "cpu" else None
    return {} if known is None else {f"cpp.{name}": "fast" if isinstance(known, str) else True}
