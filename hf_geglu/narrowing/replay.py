"""Runs a model layer by layer over many batches, each layer once, while the layers behind are still to be changed.

What a layer is called with is recorded in one whole forward. Where every layer is called once, in order, and is given
what the one before it returned, the hidden states between layers are all that has to be kept. Where a model is not
built like that, every look at a site runs the model from its start to that site.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from hf_geglu.distance import cast
from hf_geglu.inputs import Inputs
from hf_geglu.narrowing.sums import Stop, first_tensor

_NUMBERED = re.compile(r"^(.*\.|)(\d+)(?:\.|$)")


class Replay:
    """Forwards of one model over the same batches, to one layer after the other.

    Attributes:
        chained: whether the layers form the chain described above.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Inputs], blocks: Sequence[str]) -> None:
        """Record what the layers are called with; nothing of ours may be hooked into the model yet.

        Args:
            model: may be changed between visits, behind the layers that were visited.
            batches: keyword arguments of forwards.
            blocks: paths of modules inside the layers that will be visited, in order.
        """
        self.model = model
        cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self.batches = [{**cache, **cast(batch, model)} for batch in batches]
        self._layers = _layers(model, blocks)
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._states: list[torch.Tensor] = []
        self._at = 0
        first = self._record(self.batches[0]) if self._layers else None
        self.chained = first is not None
        if first is None:
            return
        # where all layers are called alike, the first one's call tells the others', and no forward need be whole
        alike = all(_same(without_first(call), without_first(first[0])) for call in first)
        for batch in self.batches:
            calls = self._record(batch, only_first=alike)
            if calls is None:
                self.chained = False
                return
            self._states.append(first_of(calls[0]))
            self._calls.append([without_first(call) for call in calls] * (len(self._layers) if alike else 1))

    def visit(self, block: str, see: Callable[[int], None]) -> None:
        """Run every batch through the layer that holds `block`; hooks that are on the model see it, and may raise
        `Stop`.

        Args:
            block: not before the one of the last visit.
            see: is called with the number of the batch after each.
        """
        layer = self._layer_of(block) if self.chained else None
        if layer is None:
            for number, batch in enumerate(self.batches):
                with suppress(Stop):
                    self.model(**batch)
                see(number)
            return
        self._advance(layer)
        for number in range(len(self.batches)):
            with suppress(Stop):
                self._run(layer, number)
            see(number)

    def _layer_of(self, block: str) -> int | None:
        holders = (n for n, (path, _) in enumerate(self._layers) if f"{block}.".startswith(f"{path}."))
        return next(holders, None)

    def _advance(self, layer: int) -> None:
        for number in range(len(self.batches)):
            for each in range(self._at, layer):
                result = first_tensor(self._run(each, number))
                assert result is not None
                self._states[number] = result
        self._at = max(self._at, layer)

    def _run(self, layer: int, number: int) -> Any:
        args, kwargs = self._calls[number][layer]
        return self._layers[layer][1](self._states[number], *args, **kwargs)

    def _record(
        self, batch: Inputs, *, only_first: bool = False
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]] | None:
        """What each layer is called with, None where they are no chain."""
        calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
        results: list[torch.Tensor | None] = []

        def before(number: int) -> Callable[..., None]:
            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.append((number, args, dict(kwargs)))
                if only_first:
                    raise Stop

            return record

        def after(_: nn.Module, __: Any, result: Any) -> None:
            results.append(first_tensor(result))

        handles = []
        for number, (_, module) in enumerate(self._layers):
            handles.append(module.register_forward_pre_hook(before(number), with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            with suppress(Stop):
                self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        if only_first:
            return [(args, kwargs) for _, args, kwargs in calls]
        if [number for number, _, _ in calls] != list(range(len(self._layers))):
            return None
        for (_, args, kwargs), result in zip(calls[1:], results, strict=False):
            if result is None or first_of((args, kwargs)) is not result:
                return None
        return [(args, kwargs) for _, args, kwargs in calls]


def first_of(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The first argument of a call, by position or else the hidden states by name."""
    args, kwargs = call
    return args[0] if args else kwargs.get("hidden_states")


def without_first(call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The others."""
    args, kwargs = call
    return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states" or args}


def _same(one: tuple[tuple[Any, ...], dict[str, Any]], other: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Whether two calls were given the very same objects."""
    if len(one[0]) != len(other[0]) or one[1].keys() != other[1].keys():
        return False
    pairs = [*zip(one[0], other[0], strict=True), *((one[1][name], other[1][name]) for name in one[1])]
    return all(a is b or (isinstance(a, bool | int | float | str) and a == b) for a, b in pairs)


def _layers(model: nn.Module, blocks: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """All members of the list of modules that the blocks lie in; none where they lie in several lists or in no list."""
    matches = [_NUMBERED.match(path) for path in blocks]
    stems = {match.group(1) for match in matches if match is not None}
    if len(stems) != 1 or None in matches:
        return []
    stem = stems.pop().removesuffix(".")
    held = model.get_submodule(stem)
    return [(f"{stem}.{name}" if stem else name, module) for name, module in held.named_children()]
