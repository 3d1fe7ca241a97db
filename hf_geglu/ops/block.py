"""The whole block as one differentiable function that keeps little for its backward pass.

lean: x, gate and value are saved (2 + D/F units of tokens x F; plain torch: 4 + D/F). Backward recomputes the unit's
answer, and writes the gradients of gate and value where these were: one pass over three tensors.

tiled: x alone is saved. Both passes go over tiles of tokens, and backward computes gate and value again.

Nothing here knows of modules: `hf_geglu.optimizing` calls it with the weights of one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hf_geglu.ops import pointwise, products, reference
from hf_geglu.ops.form import Form, Projection, split
from hf_geglu.ops.graph import graph_is_kept
from hf_geglu.ops.pointwise import Backend
from hf_geglu.ops.products import Sums, input_gradient

TILES = 8
"""Into how many tiles of tokens the tiled block is cut, as long as they have `LEAST` tokens."""

LEAST = 128
"""Tokens of a tile below which the matrix products themselves become slow."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Gate (None where packed), up and down projection."""

    gate: Projection | None
    up: Projection
    down: Projection

    def flat(self) -> tuple[torch.Tensor | None, ...]:
        """Gate weight, gate bias, up weight, up bias, down weight, down bias."""
        return (*(self.gate or (None, None)), *self.up, *self.down)

    @classmethod
    def of(cls, flat: tuple[torch.Tensor | None, ...]) -> Weights:
        """Back from `flat`."""
        gate, gate_bias, up, up_bias, down, down_bias = flat
        assert up is not None
        assert down is not None
        return cls(None if gate is None else (gate, gate_bias), (up, up_bias), (down, down_bias))


NAMES = ("gate", "gate_bias", "up", "up_bias", "down", "down_bias")
"""Of the tensors of `Weights.flat`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How one call is run: the form of the block, and everything else that is no tensor."""

    form: Form
    tiled: bool
    backend: Backend = "auto"
    dropout: float = 0.0
    """Probability, between the unit and the down projection; 0 for a tiled block."""


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of a dropout, drawn again instead of kept: the state of the generator before it was drawn."""

    probability: float
    state: torch.Tensor
    device: torch.device

    @classmethod
    def here(cls, probability: float, device: torch.device) -> Noise:
        """As the generator of that device stands now."""
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        return cls(probability, state, device)

    def again(self, like: torch.Tensor) -> torch.Tensor:
        """What the unit's answer was multiplied by; the generator goes on as if nothing had been drawn."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self.state, self.device)
            else:
                torch.set_rng_state(self.state)
            return F.dropout(torch.ones_like(like), self.probability, training=True)


def run(x_TD: torch.Tensor, weights: Weights, way: Way) -> torch.Tensor:
    """The block, (T, D) -> (T, D), differentiable with respect to x and the weights."""
    answer: torch.Tensor = _Block.apply(x_TD, *weights.flat(), way)  # type: ignore[no-untyped-call]
    return answer


def tiles(tokens: int) -> list[slice]:
    """Slices of about equal size over all tokens."""
    size = max(LEAST, -(-tokens // TILES))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def branches(x_TD: torch.Tensor, weights: Weights, form: Form) -> tuple[torch.Tensor, ...]:
    """What is saved of the projections: gate and value, or both in one."""
    if form.layout == "separate":
        assert weights.gate is not None
        turned = form.transposed
        return tuple(products.project(x_TD, each, transposed=turned) for each in (weights.gate, weights.up))
    return (products.project(x_TD, weights.up, transposed=form.transposed),)


def halves(saved: tuple[torch.Tensor, ...], form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and value as views of what `branches` gave."""
    return (saved[0], saved[1]) if form.layout == "separate" else split(saved[0], form)


def forward(x_TD: torch.Tensor, weights: Weights, way: Way) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The answer, and what of gate and value is to be saved: nothing where tiled."""
    form = way.form
    if not way.tiled:
        saved = branches(x_TD, weights, form)
        hidden_TF = pointwise.forward(*halves(saved, form), form.activation, form.offset, way.backend)
        if way.dropout:
            hidden_TF = F.dropout(hidden_TF, way.dropout, training=True, inplace=True)
        return products.project(hidden_TF, weights.down, transposed=form.transposed), saved
    answer_TD = x_TD.new_empty((x_TD.shape[0], weights.down[0].shape[1 if form.transposed else 0]))
    for tile in tiles(x_TD.shape[0]):
        saved = branches(x_TD[tile], weights, form)
        hidden_TF = pointwise.forward(*halves(saved, form), form.activation, form.offset, way.backend)
        answer_TD[tile] = products.project(hidden_TF, weights.down, transposed=form.transposed)
    return answer_TD, ()


def backward(
    grad_TD: torch.Tensor,
    x_TD: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    weights: Weights,
    way: Way,
    needed: tuple[bool, ...],
    noise: Noise | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x and the six tensors of the weights, None where not `needed`. `saved` is written over."""
    sums = Sums()
    wants = dict(zip(("x", *NAMES), needed, strict=True))
    if not way.tiled:
        _backward_tile(grad_TD, x_TD, None, saved, weights, way, wants, noise, sums)
    for tile in tiles(x_TD.shape[0]) if way.tiled else ():
        parts = branches(x_TD[tile], weights, way.form)
        _backward_tile(grad_TD, x_TD, tile, parts, weights, way, wants, noise, sums)
        del parts
    gradients = (
        None if tensor is None else sums.take(name, tensor.dtype)
        for name, tensor in zip(NAMES, weights.flat(), strict=True)
    )
    return (sums.dx_TI, *gradients)


def _backward_tile(
    all_grad_TD: torch.Tensor,
    all_x_TD: torch.Tensor,
    tile: slice | None,
    saved: tuple[torch.Tensor, ...],
    weights: Weights,
    way: Way,
    wants: dict[str, bool],
    noise: Noise | None,
    sums: Sums,
) -> None:
    grad_TD, x_TD = (all_grad_TD, all_x_TD) if tile is None else (all_grad_TD[tile], all_x_TD[tile])
    form, turned = way.form, way.form.transposed
    gate_TF, value_TF = halves(saved, form)
    if wants["down_bias"]:
        sums.add_rows("down_bias", grad_TD)
    hidden_TF = products.through(grad_TD, weights.down[0], transposed=turned)
    noise_TF = None if noise is None else noise.again(hidden_TF)
    if noise_TF is not None:
        hidden_TF.mul_(noise_TF)
    pointwise.backward_(gate_TF, value_TF, hidden_TF, form.activation, form.offset, way.backend)
    # from here on gate_TF and value_TF are gradients, hidden_TF is the unit's answer
    if wants["down"]:
        if noise_TF is not None:
            hidden_TF.mul_(noise_TF)
        sums.add_product("down", grad_TD, hidden_TF, transposed=turned)
    del hidden_TF, noise_TF
    names = ("gate", "up") if form.layout == "separate" else ("up",)
    for at, (name, grad) in enumerate(zip(names, saved, strict=True)):
        weight = getattr(weights, name)[0]
        if wants["x"]:
            input_gradient(grad, weight, transposed=turned, out=sums.input_rows(all_x_TD, tile), add=at > 0)
        if wants[name]:
            sums.add_product(name, grad, x_TD, transposed=turned)
        if wants[f"{name}_bias"]:
            sums.add_rows(f"{name}_bias", grad)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """No autocast; nothing is entered where there is none, since entering takes as long as ten other things here."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, *arguments: Any) -> torch.Tensor:
        *flat, way = arguments
        weights = Weights.of(tuple(flat))
        ctx.way = way
        ctx.noise = Noise.here(way.dropout, x_TD.device) if way.dropout else None
        with without_autocast(x_TD.device.type):
            answer_TD, saved = forward(x_TD, weights, way)
        ctx.save_for_backward(x_TD, *flat, *saved)
        return answer_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, *rest = ctx.saved_tensors
        weights, saved = Weights.of(tuple(rest[: len(NAMES)])), tuple(rest[len(NAMES) :])
        needed = ctx.needs_input_grad[: 1 + len(NAMES)]
        if torch.is_grad_enabled():  # somebody differentiates this derivative too
            form = ctx.way.form
            noise_TF = None
            if ctx.noise is not None:
                with torch.no_grad():
                    noise_TF = ctx.noise.again(halves(branches(x_TD, weights, form), form)[0])
            answer_TD = reference.block(x_TD, weights.gate, weights.up, weights.down, form, noise_F=noise_TF)
            return (*pointwise.gradients(answer_TD, (x_TD, *weights.flat()), grad_TD, needed), None)
        if graph_is_kept():
            saved = tuple(tensor.clone() for tensor in saved)
        with without_autocast(x_TD.device.type):
            found = backward(grad_TD, x_TD, saved, weights, ctx.way, needed, ctx.noise)
        return (*found, None)
