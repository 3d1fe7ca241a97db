"""The whole block behind one function: checks what it is given, chooses how to run it, and runs it."""

from __future__ import annotations

import torch

from hf_geglu.errors import KernelError
from hf_geglu.ops import block, library, reference
from hf_geglu.ops.block import Way, Weights
from hf_geglu.ops.choose import Call, Choice, choose
from hf_geglu.ops.form import MODES, Form, Mode, Projection, as_rows
from hf_geglu.ops.formulas import FORMULAS
from hf_geglu.ops.pointwise import Backend


def ffn(
    x_D: torch.Tensor,
    gate: Projection | None,
    up: Projection,
    down: Projection,
    *,
    form: Form,
    dropout: float = 0.0,
    mode: Mode = "auto",
    backend: Backend = "auto",
) -> torch.Tensor:
    """A whole gated block, (..., D) to (..., D): ``(f(x Wg + bg) * (x Wv + bv)) Wd + bd`` (Shazeer 2020,
    arXiv:2002.05202, eq. 6, with biases).

    Args:
        x_D: any number of tokens, contiguous or not.
        gate: its weight and bias; None where `up` is the packed projection of both.
        up: weight and bias of the value, or of [gate | value].
        down: weight and bias.
        form: activation and layout.
        dropout: probability between the unit and the down projection. The noise is what `torch.nn.Dropout` would draw.
        mode: how it is run; "auto" chooses by the call.
        backend: of the unit.

    Derivatives of any order; under autocast the products are computed in its type, as `torch.nn.Linear` would.

    Raises:
        KernelError: no kernel for the activation, widths or dtypes that do not fit each other, an unknown mode.
    """
    weights = Weights(gate, up, down)
    _check(x_D, weights, form, mode)
    x_D, weights = _as_autocast(x_D, weights)
    way = chosen(x_D, weights, form, mode)
    if way == "reference" or (dropout and torch.compiler.is_compiling()):
        return _plainly(x_D, weights, form, dropout)
    x_TD = x_D.reshape(-1, x_D.shape[-1])
    # the noise of a dropout is drawn for all tokens at once
    how = Way(form=form, tiled=way == "tiled" and not dropout, backend=backend, dropout=dropout)
    if torch.compiler.is_compiling():
        answer_TD = library.run(x_TD, weights, how)
    elif differentiated(x_D, weights):
        answer_TD = block.run(x_TD, weights, how)
    else:
        with block.without_autocast(x_D.device.type):
            answer_TD, _ = block.forward(x_TD, weights, how)
    return as_rows(answer_TD, x_D.shape[:-1])


def differentiated(x_D: torch.Tensor, weights: Weights) -> bool:
    """Whether autograd will want a backward pass."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in (x_D, *weights.flat()))


def chosen(x_D: torch.Tensor, weights: Weights, form: Form, mode: Mode) -> Choice:
    """How `ffn` would run that."""
    if x_D.numel() == 0:
        return "reference"
    if mode != "auto":
        return mode
    width = weights.down[0].shape[0 if form.transposed else 1]
    return choose(
        Call(
            tokens=x_D.shape[:-1].numel(),
            width=width,
            dtype=x_D.dtype,
            device_type=x_D.device.type,
            activation=form.activation,
            differentiated=differentiated(x_D, weights),
        )
    )


def _plainly(x_D: torch.Tensor, weights: Weights, form: Form, dropout: float) -> torch.Tensor:
    gate_F, value_F = reference.branches(x_D, weights.gate, weights.up, form)
    hidden_F = reference.unit(gate_F, value_F, form.activation, form.offset)
    hidden_F = torch.nn.functional.dropout(hidden_F, dropout, training=True) if dropout else hidden_F
    return reference.project(hidden_F, weights.down, transposed=form.transposed)


def _as_autocast(x_D: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, Weights]:
    """What autocast does to the arguments of a linear layer; the casts are differentiable."""
    device = x_D.device.type
    if not torch.is_autocast_enabled(device):
        return x_D, weights
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

    cast_x = cast(x_D)
    assert cast_x is not None
    return cast_x, Weights.of(tuple(cast(tensor) for tensor in weights.flat()))


def _check(x_D: torch.Tensor, weights: Weights, form: Form, mode: Mode) -> None:
    if mode not in MODES:
        raise KernelError(f"unknown mode {mode!r}; expected one of: {', '.join(MODES)}")
    if form.activation not in FORMULAS:
        raise KernelError(
            f"there is no kernel for the activation {form.activation!r}; expected one of: {', '.join(FORMULAS)}"
        )
    if (weights.gate is None) == (form.layout == "separate"):
        given = "no gate" if weights.gate is None else "a gate of its own"
        raise KernelError(f"the layout is {form.layout!r}, but there is {given}; expected gate=None for packed weights")
    at = 0 if form.transposed else 1
    inputs = {"up": weights.up[0].shape[at], **({} if weights.gate is None else {"gate": weights.gate[0].shape[at]})}
    wrong = [name for name, width in inputs.items() if width != x_D.shape[-1]]
    if wrong:
        raise KernelError(
            f"x has {x_D.shape[-1]} features, but the weight of {wrong[0]} reads {inputs[wrong[0]]}; expected weights "
            f"{'(in, out)' if form.transposed else '(out, in)'}, as form.transposed says"
        )
    width = weights.down[0].shape[0 if form.transposed else 1]
    branch = weights.up[0].shape[1 if form.transposed else 0] // (1 if form.layout == "separate" else 2)
    if branch != width or (weights.gate is not None and weights.gate[0].shape != weights.up[0].shape):
        raise KernelError(
            f"gate, up and down do not fit together: {width} neurons go into the down projection, {branch} come out of "
            "the unit; expected one width"
        )
    dtypes = {tensor.dtype for tensor in (x_D, *weights.flat()) if tensor is not None}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(x_D.device.type):
        raise KernelError(
            f"x and the weights have different dtypes: {', '.join(sorted(map(str, dtypes)))}; expected one, or autocast"
        )
