"""The block as custom operators of torch, which `torch.compile` takes over as they are: under the compiler too a block
saves x, gate and value, or x alone."""

from __future__ import annotations

from typing import Any

import torch

from hf_geglu.ops import block
from hf_geglu.ops.block import NAMES, Way, Weights
from hf_geglu.ops.form import Form


def _way(activation: str, layout: str, gate_half: str, transposed: bool, offset: float, tiled: bool) -> Way:
    form = Form(
        activation=activation,
        layout=layout,  # type: ignore[arg-type]
        gate_half=gate_half,  # type: ignore[arg-type]
        transposed=transposed,
        offset=offset,
    )
    return Way(form=form, tiled=tiled)


_SETTINGS = "str activation, str layout, str gate_half, bool transposed, float offset, bool tiled"
_WEIGHTS = "Tensor? gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias"

_forward = torch.library.custom_op(
    "hf_geglu::block",
    lambda x, *rest: _run(x, *rest),
    mutates_args=(),
    schema=f"(Tensor x, {_WEIGHTS}, {_SETTINGS}) -> Tensor[]",
)
_backward = torch.library.custom_op(
    "hf_geglu::block_backward",
    lambda grad, x, saved, *rest: _run_backward(grad, x, saved, *rest),
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor[] saved, {_WEIGHTS}, {_SETTINGS}, bool[] needed) -> Tensor[]",
)


def _run(x_TD: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    weights, way = Weights.of(rest[: len(NAMES)]), _way(*rest[len(NAMES) :])
    with block.without_autocast(x_TD.device.type):
        answer_TD, saved = block.forward(x_TD, weights, way)
    return [answer_TD, *saved]


def _run_backward(
    grad_TD: torch.Tensor, x_TD: torch.Tensor, saved: list[torch.Tensor], *rest: Any
) -> list[torch.Tensor]:
    *flat, needed = rest
    weights, way = Weights.of(tuple(flat[: len(NAMES)])), _way(*flat[len(NAMES) :])
    own = tuple(tensor.clone() for tensor in saved)  # an operator may not write over what it is given
    with block.without_autocast(x_TD.device.type):
        found = block.backward(grad_TD, x_TD, own, weights, way, tuple(needed))
    return [gradient for gradient in found if gradient is not None]


@_forward.register_fake
def _forward_shapes(x_TD: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    weights, way = Weights.of(rest[: len(NAMES)]), _way(*rest[len(NAMES) :])
    tokens, at = x_TD.shape[0], 1 if way.form.transposed else 0
    shapes = [x_TD.new_empty((tokens, weights.down[0].shape[at]))]
    if not way.tiled:
        projections = [each for each in (weights.gate, weights.up) if each is not None]
        shapes += [x_TD.new_empty((tokens, weight.shape[at])) for weight, _ in projections]
    return shapes


@_backward.register_fake
def _backward_shapes(
    grad_TD: torch.Tensor, x_TD: torch.Tensor, saved: list[torch.Tensor], *rest: Any
) -> list[torch.Tensor]:
    tensors, needed = (x_TD, *rest[: len(NAMES)]), rest[-1]
    wanted = (tensor for tensor, wants in zip(tensors, needed, strict=True) if wants and tensor is not None)
    return [tensor.new_empty(tensor.shape) for tensor in wanted]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x_TD, *rest = inputs
    ctx.save_for_backward(x_TD, *rest[: len(NAMES)], *output[1:])
    ctx.settings = rest[len(NAMES) :]
    ctx.saved = len(output) - 1


def _differentiate(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    x_TD, *rest = ctx.saved_tensors
    flat, saved = rest[: len(NAMES)], rest[len(NAMES) :]
    needed = [bool(wants) for wants in ctx.needs_input_grad[: 1 + len(NAMES)]]
    found = iter(_backward(grads[0], x_TD, list(saved), *flat, *ctx.settings, needed))
    answers = [
        next(found) if wants and tensor is not None else None
        for tensor, wants in zip((x_TD, *flat), needed, strict=True)
    ]
    return (*answers, *(None for _ in ctx.settings))


_forward.register_autograd(_differentiate, setup_context=_keep)


def run(x_TD: torch.Tensor, weights: Weights, way: Way) -> torch.Tensor:
    """`hf_geglu.ops.block.run` without dropout, as one operator."""
    form = way.form
    settings = form.activation, form.layout, form.gate_half, form.transposed, form.offset, way.tiled
    answer: torch.Tensor = _forward(x_TD, *weights.flat(), *settings)[0]
    return answer
