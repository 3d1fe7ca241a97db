"""Where a block's output is added to the stream around it, found by moving that output and looking what moves with it.

A narrow block can make up for the errors of the blocks before it if what it is fitted to is not its own old output, but
what the *sum* was in the original. Before a norm (GPT-2, Llama) the sum is what the layer returns, after one (BERT) it
is what the norm is given; a class may add anywhere. So the output is moved by noise, and the first tensor on its way
that moves by exactly that noise, and is not the output itself, is the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hf_geglu.distance import cast
from hf_geglu.inputs import Inputs
from hf_geglu.modes import evaluating

TOLERANCE = 1e-3
"""Largest deviation from a plain sum, relative to the noise: rounding of float32 is 1e-6 of the sum."""


@dataclass(frozen=True, slots=True)
class Sum:
    """A tensor in a model's forward: what a module is given first, or what it returns (first)."""

    module: str
    end: Literal["input", "output"]


def find_sums(model: nn.Module, batch: Inputs, downs: Sequence[str]) -> dict[str, Sum]:
    """The sum that each of these down projections is added into; those that are not added anywhere are left out.

    Args:
        model: is run twice for every projection, in float32 or better.
        batch: keyword arguments of one forward, best a small one.
        downs: paths of the down projections.
    """
    found = {}
    with evaluating(model), torch.no_grad():
        for down in downs:
            first = _watch(model, batch, down, None)
            noise = torch.randn(first[0][2].shape, generator=torch.Generator().manual_seed(0)).to(first[0][2])
            noise = noise * first[0][2].std()
            second = _watch(model, batch, down, noise)
            place = _first_sum(first, second, noise)
            if place is not None:
                found[down] = place
    return found


Event = tuple[str, Literal["input", "output"], torch.Tensor]


def _watch(model: nn.Module, batch: Inputs, down: str, noise: torch.Tensor | None) -> list[Event]:
    """What modules are given and return from that projection on, itself first. Several calls: the last one."""
    events: list[Event] = []
    shape: list[torch.Size] = []

    def moved(module: nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
        events.clear()
        shape[:] = [result.shape]
        result = result if noise is None else result + noise
        events.append((down, "output", result.detach().clone()))
        return result

    def seen(path: str, end: Literal["input", "output"], value: Any) -> None:
        tensor = first_tensor(value)
        if shape and tensor is not None and tensor.shape == shape[0]:
            events.append((path, end, tensor.detach().clone()))

    handles = [model.get_submodule(down).register_forward_hook(moved)]
    for path, module in model.named_modules():
        if path != down:
            handles.append(module.register_forward_pre_hook(lambda _, args, path=path: seen(path, "input", args)))
            handles.append(module.register_forward_hook(lambda _, __, out, path=path: seen(path, "output", out)))
    try:
        model(**cast(batch, model))
    finally:
        for handle in handles:
            handle.remove()
    return events


def first_tensor(value: Any) -> torch.Tensor | None:
    """What a module is given first, or returns: a tensor, or the first entry of a tuple."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, torch.Tensor) else None


def _first_sum(first: Sequence[Event], second: Sequence[Event], noise: torch.Tensor) -> Sum | None:
    own, size = first[0][2], noise.norm()
    for (path, end, before), (_, _, after) in zip(first[1:], second[1:], strict=False):
        if (before - own).norm() <= TOLERANCE * own.norm():
            continue  # the output itself, as dropout hands it on
        if (after - before - noise).norm() <= TOLERANCE * size:
            return Sum(path, end)
    return None


class Stop(Exception):
    """Enough was seen of this forward."""


@contextmanager
def hooked(model: nn.Module, place: Sum, take: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Inside, `take` is given the sum at every forward; what it returns stands in for it."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        tensor = first_tensor(args)
        instead = None if tensor is None else take(tensor)
        return None if instead is None else (instead, *args[1:])

    def after(module: nn.Module, args: Any, result: Any) -> Any:
        tensor = first_tensor(result)
        instead = None if tensor is None else take(tensor)
        if instead is None:
            return None
        return instead if isinstance(result, torch.Tensor) else type(result)([instead, *result[1:]])

    module = model.get_submodule(place.module)
    handle = module.register_forward_pre_hook(before) if place.end == "input" else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
