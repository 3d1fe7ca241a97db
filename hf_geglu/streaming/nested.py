"""What modules take and return: tensors in tuples, lists and dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hf_geglu.errors import StreamError

Nested = Any
"""A tensor, None, a number, a word, or tuples, lists and dictionaries of them."""


def tensors_in(value: Nested) -> Iterator[torch.Tensor]:
    """All tensors, in order. Whatever is none of these things is passed over."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)


def with_tensors(value: Nested, change: Callable[[torch.Tensor], torch.Tensor]) -> Nested:
    """The same with every tensor exchanged."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(with_tensors(inner, change) for inner in value)
    if type(value) is dict:
        return {name: with_tensors(inner, change) for name, inner in value.items()}
    return value


def shape_of(value: Nested) -> Any:
    """What `rebuilt` makes the same again from, given the tensors; plain JSON.

    Raises:
        StreamError: something else is among what is nested.
    """
    if isinstance(value, torch.Tensor):
        return "tensor"
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [shape_of(inner) for inner in value]}
    if type(value) is dict:
        return {"dict": {str(name): shape_of(inner) for name, inner in value.items()}}
    raise StreamError(
        f"a layer returns a {type(value).__name__}, which cannot be kept on disk; expected tensors, tuples, lists and "
        "dictionaries. Calibrate in memory instead: hf_geglu.convert(model, calibration=...)"
    )


def rebuilt(shape: Any, tensors: Sequence[torch.Tensor]) -> Nested:
    """What `shape_of` was given."""
    rest = iter(tensors)

    def build(node: Any) -> Nested:
        if node == "tensor":
            return next(rest)
        ((kind, content),) = node.items()
        if kind == "value":
            return content
        if kind == "dict":
            return {name: build(inner) for name, inner in content.items()}
        return (tuple if kind == "tuple" else list)(build(inner) for inner in content)

    return build(shape)
