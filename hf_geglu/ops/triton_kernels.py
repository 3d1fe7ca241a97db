"""The unit as Triton kernels, for CUDA: three tensors in and three out in one pass, at the speed of memory.

Any strides, so that the halves of a packed projection are read where they are. Without a GPU the kernels run through
Triton's interpreter (``TRITON_INTERPRET=1``), which is how they are tested everywhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Neurons of one token that one program works on."""


@triton.jit  # type: ignore[untyped-decorator]
def _both(z: Any, ACTIVATION: tl.constexpr) -> Any:
    """Value and derivative, as in `hf_geglu.ops.formulas`."""
    if ACTIVATION == "gelu":
        phi = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value = z * phi
        slope = phi + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "gelu_pytorch_tanh":
        square = z * z
        s = 1.0 / (1.0 + tl.exp(-z * (1.5957691216057308 + 0.07135481282052264 * square)))
        value = z * s
        slope = s + value * (1.0 - s) * (1.5957691216057308 + 0.21406443846156792 * square)
    elif ACTIVATION == "quick_gelu":
        s = 1.0 / (1.0 + tl.exp(-1.702 * z))
        value = z * s
        slope = s + 1.702 * value * (1.0 - s)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        value = z * s
        slope = s + value * (1.0 - s)
    elif ACTIVATION == "relu":
        value = tl.where(z < 0.0, 0.0, z)
        slope = tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        positive = tl.where(z < 0.0, 0.0, z)
        value = positive * positive
        slope = 2.0 * positive
    elif ACTIVATION == "sigmoid":
        value = 1.0 / (1.0 + tl.exp(-z))
        slope = value * (1.0 - value)
    else:
        tl.static_assert(ACTIVATION == "linear")
        value = z
        slope = tl.where(z == z, 1.0, 1.0)
    return value, slope


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    gate: Any,
    value: Any,
    hidden: Any,
    gate_row: Any,
    value_row: Any,
    hidden_row: Any,
    gate_step: Any,
    value_step: Any,
    width: Any,
    offset: Any,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    z = tl.load(gate + row * gate_row + at * gate_step, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + row * value_row + at * value_step, mask=inside, other=0.0).to(tl.float32)
    activated, _ = _both(z, ACTIVATION)
    answer = activated * (v + offset)
    tl.store(hidden + row * hidden_row + at, answer.to(hidden.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    gate: Any,
    value: Any,
    grad: Any,
    d_gate: Any,
    d_value: Any,
    hidden: Any,
    gate_row: Any,
    value_row: Any,
    grad_row: Any,
    d_gate_row: Any,
    d_value_row: Any,
    gate_step: Any,
    value_step: Any,
    grad_step: Any,
    d_gate_step: Any,
    d_value_step: Any,
    width: Any,
    offset: Any,
    ACTIVATION: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    z = tl.load(gate + row * gate_row + at * gate_step, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + row * value_row + at * value_step, mask=inside, other=0.0).to(tl.float32) + offset
    g = tl.load(grad + row * grad_row + at * grad_step, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _both(z, ACTIVATION)
    dz = g * v * slope
    dv = g * activated
    tl.store(d_gate + row * d_gate_row + at * d_gate_step, dz.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_value + row * d_value_row + at * d_value_step, dv.to(d_value.dtype.element_ty), mask=inside)
    if HIDDEN:
        answer = activated * v
        tl.store(hidden + row * grad_row + at * grad_step, answer.to(hidden.dtype.element_ty), mask=inside)


def forward(gate_TF: torch.Tensor, value_TF: torch.Tensor, activation: str, offset: float) -> torch.Tensor:
    """activation(gate) * (value + offset) as a new contiguous tensor."""
    hidden_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype, device=gate_TF.device)
    if gate_TF.numel():
        with _on(gate_TF):
            _forward[_grid(gate_TF)](
                gate_TF,
                value_TF,
                hidden_TF,
                *(tensor.stride(0) for tensor in (gate_TF, value_TF, hidden_TF)),
                *(tensor.stride(1) for tensor in (gate_TF, value_TF)),
                gate_TF.shape[1],
                offset,
                ACTIVATION=activation,
                BLOCK=BLOCK,
            )
    return hidden_TF


def backward_(
    gate_TF: torch.Tensor, value_TF: torch.Tensor, hidden_TF: torch.Tensor, activation: str, offset: float
) -> None:
    """In place: gate and value become their gradients, the gradient of the hidden state becomes the hidden state."""
    _run_backward(gate_TF, value_TF, hidden_TF, (gate_TF, value_TF), activation, offset, hidden=True)


def backward(
    gate_TF: torch.Tensor,
    value_TF: torch.Tensor,
    gradient_TF: torch.Tensor,
    activation: str,
    offset: float,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Gradients of gate and value into `out`; nothing else is changed."""
    _run_backward(gate_TF, value_TF, gradient_TF, out, activation, offset, hidden=False)


def _run_backward(
    gate_TF: torch.Tensor,
    value_TF: torch.Tensor,
    grad_TF: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
    activation: str,
    offset: float,
    *,
    hidden: bool,
) -> None:
    tensors = (gate_TF, value_TF, grad_TF, *out)
    if not gate_TF.numel():
        return
    with _on(gate_TF):
        _backward[_grid(gate_TF)](
            *tensors,
            grad_TF,
            *(tensor.stride(0) for tensor in tensors),
            *(tensor.stride(1) for tensor in tensors),
            gate_TF.shape[1],
            offset,
            ACTIVATION=activation,
            HIDDEN=hidden,
            BLOCK=BLOCK,
        )


def _grid(tensor_TF: torch.Tensor) -> tuple[int, int]:
    return tensor_TF.shape[0], triton.cdiv(tensor_TF.shape[1], BLOCK)


def _on(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
