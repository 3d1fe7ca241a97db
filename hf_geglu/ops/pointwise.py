"""The unit, ``activation(gate) * (value + offset)``, by whichever implementation runs here: Triton, C, torch's
compiler, or none of them.

And the unit alone as one differentiable function, for blocks that cannot be run as a whole.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

import torch

from hf_geglu.errors import KernelError
from hf_geglu.ops import c_kernels, compiled, eager, reference
from hf_geglu.ops.form import Form, as_rows, split

Backend: TypeAlias = Literal["auto", "eager", "c", "compiled", "triton"]
"""auto: Triton's kernels on CUDA, those in C on a CPU, torch's compiler elsewhere, plain torch where none runs."""


def forward(
    gate_TF: torch.Tensor, value_TF: torch.Tensor, activation: str, offset: float = 0.0, backend: Backend = "auto"
) -> torch.Tensor:
    """activation(gate) * (value + offset) as a new contiguous tensor, computed in float32 where that is wider."""
    if _by_triton(backend, gate_TF):
        from hf_geglu.ops import triton_kernels

        return triton_kernels.forward(gate_TF, value_TF, activation, offset)
    if backend in ("auto", "c"):
        hidden = c_kernels.forward(gate_TF, value_TF, activation, offset)
        if hidden is not None:
            return hidden
        _insist(backend, gate_TF)
    if backend == "auto" and _two_steps_pay(gate_TF, activation):
        return reference.unit_in_two_steps(gate_TF, value_TF, activation, offset)
    if backend != "eager":
        hidden = compiled.forward(gate_TF, value_TF, activation, offset)
        if hidden is not None:
            return hidden
        _insist(backend, gate_TF)
    return eager.forward(gate_TF, value_TF, activation, offset)


def backward_(
    gate_TF: torch.Tensor,
    value_TF: torch.Tensor,
    hidden_TF: torch.Tensor,
    activation: str,
    offset: float = 0.0,
    backend: Backend = "auto",
) -> None:
    """In place: `gate_TF` and `value_TF` become their gradients, `hidden_TF`, the gradient of the unit's answer,
    becomes that answer."""
    if _by_triton(backend, gate_TF):
        from hf_geglu.ops import triton_kernels

        triton_kernels.backward_(gate_TF, value_TF, hidden_TF, activation, offset)
        return
    if backend in ("auto", "c"):
        if c_kernels.backward_(gate_TF, value_TF, hidden_TF, activation, offset):
            return
        _insist(backend, gate_TF)
    if backend != "eager":
        if compiled.backward_(gate_TF, value_TF, hidden_TF, activation, offset):
            return
        _insist(backend, gate_TF)
    eager.backward_(gate_TF, value_TF, hidden_TF, activation, offset)


def backward(
    gate_TF: torch.Tensor,
    value_TF: torch.Tensor,
    gradient_TF: torch.Tensor,
    activation: str,
    offset: float,
    out: tuple[torch.Tensor, torch.Tensor],
    backend: Backend = "auto",
) -> None:
    """The gradients of gate and value into `out`; nothing else is changed."""
    if _by_triton(backend, gate_TF):
        from hf_geglu.ops import triton_kernels

        triton_kernels.backward(gate_TF, value_TF, gradient_TF, activation, offset, out)
        return
    if backend in ("auto", "c"):
        if c_kernels.backward(gate_TF, value_TF, gradient_TF, activation, offset, out):
            return
        _insist(backend, gate_TF)
    if backend != "eager":
        if compiled.backward(gate_TF, value_TF, gradient_TF, activation, offset, out):
            return
        _insist(backend, gate_TF)
    eager.backward(gate_TF, value_TF, gradient_TF, activation, offset, out)


_QUICK_ALONE = frozenset({"gelu", "silu", "relu"})


def _two_steps_pay(gate_TF: torch.Tensor, activation: str) -> bool:
    """Whether torch's own kernels for activation and product are as quick as one fused kernel, or quicker: on a CPU in
    16 bits, where with oneDNN's activations they take 0.6 to 0.8 of the time."""
    low = gate_TF.dtype in (torch.bfloat16, torch.float16)
    return gate_TF.device.type == "cpu" and low and gate_TF.is_contiguous() and activation in _QUICK_ALONE


def _by_triton(backend: Backend, tensor: torch.Tensor) -> bool:
    if backend not in get_args(Backend):
        raise KernelError(f"unknown backend {backend!r}; expected one of: {', '.join(get_args(Backend))}")
    if backend == "auto":
        return tensor.is_cuda and tensor.dtype != torch.float64 and triton_missing() is None
    if backend != "triton":
        return False
    missing = triton_missing()
    if missing is None and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        missing = f"Triton's kernels do not run on {tensor.device.type}"
    if missing is None and tensor.dtype == torch.float64:
        missing = "Triton's kernels compute in float32, and these tensors are float64"
    if missing is not None:
        raise KernelError(f"{missing}; expected a machine that has it, or backend='auto'")
    return True


@cache
def triton_missing() -> str | None:
    """Why Triton's kernels cannot run in this process; None where they can."""
    return "Triton is not installed" if importlib.util.find_spec("triton") is None else None


def _insist(backend: Backend, tensor: torch.Tensor) -> None:
    if backend == "c":
        reason = c_kernels.why_not(tensor.device.type, tensor.dtype) or "rows are not contiguous, or there are none"
        raise KernelError(f"the unit does not run in C: {reason}; expected backend='auto', which goes on without")
    if backend == "compiled":
        reason = (
            compiled.why_not(tensor.device.type) or f"not for a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
        )
        raise KernelError(f"the unit cannot be compiled: {reason}; expected backend='auto', which goes on without")


def glu(
    gate_F: torch.Tensor,
    value_F: torch.Tensor,
    activation: str,
    *,
    offset: float = 0.0,
    backend: Backend = "auto",
) -> torch.Tensor:
    """activation(gate) * (value + offset), (..., F), as one differentiable function that saves its two inputs only
    (Shazeer 2020, arXiv:2002.05202, eq. 5 and 6). Differentiable once; twice where autograd is asked to.

    Raises:
        KernelError: no kernel for that activation; a backend that was named and is not there.
    """
    if gate_F.shape != value_F.shape or gate_F.dtype != value_F.dtype:
        raise KernelError(
            f"gate and value differ: {tuple(gate_F.shape)} of {gate_F.dtype}, {tuple(value_F.shape)} of "
            f"{value_F.dtype}; expected two tensors of one shape and dtype"
        )
    if gate_F.numel() == 0 or torch.compiler.is_compiling():
        return reference.unit(gate_F, value_F, activation, offset)
    answer: torch.Tensor = _Unit.apply(  # type: ignore[no-untyped-call]
        gate_F, value_F, activation, offset, backend
    )
    return answer


def packed_glu(packed_P: torch.Tensor, form: Form, *, backend: Backend = "auto") -> torch.Tensor:
    """The same of [gate | value] in one tensor, (..., 2F) to (..., F): its gradient is written into one tensor too."""
    if packed_P.numel() == 0 or torch.compiler.is_compiling():
        return reference.unit(*split(packed_P, form), form.activation, form.offset)
    answer: torch.Tensor = _PackedUnit.apply(packed_P, form, backend)  # type: ignore[no-untyped-call]
    return answer


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_F: torch.Tensor, value_F: torch.Tensor, activation: str, offset: float, backend: Backend
    ) -> torch.Tensor:
        ctx.save_for_backward(gate_F, value_F)
        ctx.kind = activation, offset, backend
        return as_rows(forward(_flat(gate_F), _flat(value_F), activation, offset, backend), gate_F.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_F: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_F, value_F = ctx.saved_tensors
        activation, offset, backend = ctx.kind
        if torch.is_grad_enabled():  # somebody differentiates this derivative too
            answer = reference.unit(gate_F, value_F, activation, offset)
            return (*gradients(answer, (gate_F, value_F), grad_F, ctx.needs_input_grad), None, None, None)
        out_F = (
            torch.empty(gate_F.shape, dtype=gate_F.dtype, device=gate_F.device),
            torch.empty(gate_F.shape, dtype=gate_F.dtype, device=gate_F.device),
        )
        out_TF = _flat(out_F[0]), _flat(out_F[1])
        backward(_flat(gate_F), _flat(value_F), _flat(grad_F), activation, offset, out_TF, backend)
        return (*out_F, None, None, None)


class _PackedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed_P: torch.Tensor, form: Form, backend: Backend) -> torch.Tensor:
        ctx.save_for_backward(packed_P)
        ctx.kind = form, backend
        gate_TF, value_TF = split(_flat(packed_P), form)
        hidden_TF = forward(gate_TF, value_TF, form.activation, form.offset, backend)
        return as_rows(hidden_TF, packed_P.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_F: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (packed_P,) = ctx.saved_tensors
        form, backend = ctx.kind
        if torch.is_grad_enabled():
            answer = reference.unit(*split(packed_P, form), form.activation, form.offset)
            return (*gradients(answer, (packed_P,), grad_F, ctx.needs_input_grad), None, None)
        out_P = torch.empty(packed_P.shape, dtype=packed_P.dtype, device=packed_P.device)
        gate_TF, value_TF = split(_flat(packed_P), form)
        out_TF = split(_flat(out_P), form)
        backward(gate_TF, value_TF, _flat(grad_F), form.activation, form.offset, out_TF, backend)
        return out_P, None, None


def gradients(
    answer: torch.Tensor,
    inputs: tuple[torch.Tensor | None, ...],
    gradient: torch.Tensor,
    needed: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """What autograd makes of a plain formula, itself differentiable; None for what is not needed."""
    wanted = [at for at, tensor in enumerate(inputs) if tensor is not None and needed[at]]
    chosen = [inputs[at] for at in wanted]
    found = torch.autograd.grad(answer, chosen, gradient, create_graph=True, allow_unused=True)  # type: ignore[arg-type]
    answers: list[torch.Tensor | None] = [None] * len(inputs)
    for at, each in zip(wanted, found, strict=True):
        answers[at] = each
    return answers


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """As (tokens, width)."""
    return tensor.reshape(-1, tensor.shape[-1])
