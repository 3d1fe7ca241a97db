"""When two blocks may share one probe: the same classes, shapes and settings all the way down."""

from __future__ import annotations

import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

_VALUES = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    torch.dtype,
    types.FunctionType,
    types.BuiltinFunctionType,
)
_POSITION = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "idx"})
"""Attributes that only count the layers; a layer that behaves differently carries more than its number."""
_BOOKKEEPING = frozenset(nn.Module().__dict__)


class Signatures:
    """Signatures of the modules of one model, each computed once."""

    def __init__(self) -> None:
        self._known: dict[int, Hashable] = {}

    def of(self, module: nn.Module) -> Hashable:
        """Equal for two modules whose probes must show the same; unequal where that is not certain."""
        known = self._known.get(id(module))
        if known is None:
            known = self._known[id(module)] = (
                type(module),
                tuple((name, _shape(tensor)) for name, tensor in module._parameters.items()),
                tuple((name, _shape(tensor)) for name, tensor in module._buffers.items()),
                tuple(
                    (name, _value(value, module))
                    for name, value in module.__dict__.items()
                    if name not in _BOOKKEEPING and name not in _POSITION
                ),
                tuple((name, None if child is None else self.of(child)) for name, child in module._modules.items()),
            )
        return known


def _shape(tensor: torch.Tensor | None) -> Hashable:
    return None if tensor is None else (tuple(tensor.shape), tensor.is_floating_point())


def _value(value: Any, owner: nn.Module) -> Hashable:
    """The value itself where it is plain; a bound method by its function; anything else by its identity."""
    if isinstance(value, _VALUES):
        return (type(value), value)
    if isinstance(value, (tuple, list)) and all(isinstance(item, _VALUES) for item in value):
        return (type(value), tuple(value))
    if isinstance(value, types.MethodType) and value.__self__ is owner:
        return (types.MethodType, value.__func__)
    return (type(value), id(value))
