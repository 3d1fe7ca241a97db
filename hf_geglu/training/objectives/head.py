"""The output head of a language model: where the logits come from and what happens to them, found by behaviour.

    hidden -> z = linear(hidden) -> logits = f(z),   f(z) = scale z, or cap tanh(scale z / cap)

A model that does this can be trained without its logits (`hf_geglu.ops.cross_entropy`): during its forward the linear
layer computes the loss itself. So every hook of the model, autocast, DDP and adapters run as ever; only the product
with the vocabulary is another one. `find_head` shows that it is true of this model, or says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_geglu.modes import evaluating
from hf_geglu.ops.cross_entropy import linear_cross_entropy

TOKENS = 8
"""Length of the text that a model is tried on."""

WIDE = 60.0
"""Logits that the head is tried with lie in -60..60: wide enough to tell soft caps, and what mends only some."""

AGREEMENT = 2e-5
"""Of two float32 computations of the same logits or loss, relative to the largest: some 200 roundings."""


@dataclass(frozen=True)
class Head:
    """A head whose loss can be computed without logits.

    Attributes:
        linear: the output projection, in the model.
        scale: factor of the logits.
        softcap: bound of the logits, None without one.
        sharded: FSDP has put its hooks around the projection since it was tried. They gather its weight for whatever
            forward it has, so it can be led another way as before.
        weight_by: what the weight goes through on its way to the loss (see `tied`).
    """

    linear: nn.Linear = field(repr=False)
    scale: float = 1.0
    softcap: float | None = None
    sharded: bool = False
    weight_by: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def usable(self) -> bool:
        """Nothing else was put around the projection since it was tried."""
        return self.sharded or untouched(self.linear)

    def logits(self, z: Tensor) -> Tensor:
        """What the model makes of the projection's output."""
        return z * self.scale if self.softcap is None else self.softcap * torch.tanh(z * (self.scale / self.softcap))

    def summed_loss(self, run: Callable[[], Any], labels: Tensor, *, ignore_index: int, divisor: float = 1.0) -> Tensor:
        """Sum of the cross entropies of the forward that `run` does, divided by `divisor`.

        The division is done before gradients are rounded, and costs nothing: of the finished loss it would be another
        pass over the gradient of the weight.

        Raises:
            RuntimeError: the forward did not come by the head once, with one hidden state a label.
        """
        losses: list[Tensor] = []

        def loss_instead(hidden: Tensor) -> Tensor:
            weight = self.linear.weight if self.weight_by is None else self.weight_by(self.linear.weight)
            loss = linear_cross_entropy(
                hidden,
                weight,
                labels.reshape(hidden.shape[:-1]),
                bias=self.linear.bias,
                ignore_index=ignore_index,
                logit_scale=self.scale,
                logit_softcap=self.softcap,
                reduction="sum",
                num_items_in_batch=None if divisor == 1.0 else divisor,
            )
            losses.append(loss)
            # The model goes on with zeros in place of its logits, one a token, that are part of the graph: DDP
            # searches it for unused parameters.
            return hidden.new_zeros(*hidden.shape[:-1], 1) + loss * 0.0

        with _instead(self.linear, loss_instead):
            zeros = logits_in(run())
        if len(losses) != 1:
            raise RuntimeError(f"the output projection was called {len(losses)} times in one forward, expected once")
        return losses[0] + zeros.float().sum()  # backward comes in by the model's output, where FSDP waits for it


@dataclass(frozen=True)
class NoHead:
    """Why the logits of a model are needed."""

    reason: str


def find_head(model: nn.Module) -> Head | NoHead:
    """The head of a language model, tried on a few tokens. The model is left as it was, random generators included.

    Three small forwards: one with known numbers in place of the projection's output, which shows `f`; one as it is,
    and one with the loss in the projection, whose losses must agree.
    """
    linear = _output_projection(model)
    if isinstance(linear, NoHead):
        return linear
    device = linear.weight.device
    rows = int(linear.weight.shape[0])
    ids = (torch.arange(TOKENS, device=device) % rows)[None]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model):
            head = _read_off(model, linear, ids)
            return head if isinstance(head, NoHead) else _tried(model, head, ids)
    except Exception as error:  # whatever a model may raise that is no plain language model; handed on as the reason
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return NoHead(f"{type(model).__name__} cannot be tried without its logits: {first_line}")


def untouched(linear: nn.Module) -> bool:
    """No hook, wrapper or adapter would be passed over if another function computed what this layer does."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(linear) is nn.Linear
        and "forward" not in vars(linear)
        and type(linear.weight) is nn.Parameter
        and not any(getattr(linear, name, None) for name in hooks)
    )


def _output_projection(model: nn.Module) -> nn.Linear | NoHead:
    compiled = [name for name, part in model.named_modules() if getattr(part, "_compiled_call_impl", None)]
    if compiled or hasattr(model, "_orig_mod"):
        return NoHead("the model is compiled, and its forward cannot be led another way")
    get: Any = getattr(model, "get_output_embeddings", None)
    linear = get() if callable(get) else None
    if linear is None:
        return NoHead(f"{type(model).__name__} names no output projection (get_output_embeddings)")
    if not untouched(linear):
        return NoHead(f"the output projection is a {type(linear).__name__} that is wrapped, hooked or quantized")
    return linear  # type: ignore[no-any-return]


@contextmanager
def _instead(linear: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Another forward for this one layer of this one model."""
    vars(linear)["forward"] = forward
    try:
        yield
    finally:
        del vars(linear)["forward"]


def logits_in(output: Any) -> Tensor:
    """The logits in what a model returned."""
    found: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found


def _read_off(model: nn.Module, linear: nn.Linear, ids: Tensor) -> Head | NoHead:
    """`f` from what it does to known numbers: slope at 0, value far out, and agreement everywhere."""
    rows = int(linear.weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    z = (torch.rand(1, TOKENS, rows, generator=generator) * 2.0 - 1.0) * WIDE
    z[..., 0], z[..., 1] = 2.0**-10, 1e6
    z = z.to(linear.weight.device)
    seen: list[torch.Size] = []

    def known(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape)
        return z.reshape(*hidden.shape[:-1], rows)

    with _instead(linear, known):
        logits = logits_in(model(input_ids=ids)).float()
    if len(seen) != 1 or logits.shape != z.shape:
        return NoHead(
            f"the output projection was called {len(seen)} times, and the logits are {tuple(logits.shape)}: expected "
            f"once, and {tuple(z.shape)}"
        )
    scale = float((logits[..., 0] / z[..., 0]).median())
    far = float((logits[..., 1]).median())
    softcap = None if abs(far) > 1e5 * abs(scale) else abs(far)
    head = Head(linear, 1.0 if abs(scale - 1.0) < 1e-6 else scale, softcap)
    if not torch.allclose(logits, head.logits(z), rtol=AGREEMENT, atol=AGREEMENT):
        return NoHead("the logits are neither a multiple of the output projection nor a soft cap of it")
    return head


def _tried(model: nn.Module, head: Head, ids: Tensor) -> Head | NoHead:
    logits = logits_in(model(input_ids=ids)).float()
    expected = nn.functional.cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="sum")
    found = head.summed_loss(lambda: model(input_ids=ids), ids, ignore_index=-100)
    bound = AGREEMENT if head.linear.weight.dtype in (torch.float32, torch.float64) else 1e-2
    if not torch.allclose(found.float(), expected, rtol=bound, atol=bound):
        return NoHead(
            f"on {TOKENS} tokens the loss was {float(found):.6g} in the head and {float(expected):.6g} outside"
        )
    return head
