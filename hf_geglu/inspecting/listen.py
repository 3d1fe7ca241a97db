"""Hears what goes through the blocks of a model, without changing what comes out; the hooks always come off.

Legend of suffixes: N tokens of one call of a block, F neurons, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_geglu.functional import ACTIVATIONS, activation
from hf_geglu.inspecting.place import Place


@dataclass(slots=True, eq=False)
class Heard:
    """One call of a block, tokens that are no padding only."""

    gate_NF: torch.Tensor
    """z, what goes into the activation."""
    open_NF: torch.Tensor
    """f(z)."""
    value_NF: torch.Tensor | None
    """v, with the block's own offset; None for a dense block."""
    hidden_NF: torch.Tensor
    """h, what the down projection is given."""
    output_NO: torch.Tensor
    """y, what it answers."""
    down: Callable[[torch.Tensor], torch.Tensor]
    """What it would answer to other (N, F)."""


Take = Callable[[Place, Heard], None]


@dataclass(slots=True, eq=False)
class Ear:
    """The hooks of one forward after the other."""

    take: Take
    mask: torch.Tensor | None = None
    """(B, T), true where a token is no padding; set before each forward."""
    unheard: dict[str, str] = field(default_factory=dict)
    """Why a block could not be listened to, by its path."""
    _gates: dict[str, torch.Tensor] = field(default_factory=dict)
    _values: dict[str, torch.Tensor] = field(default_factory=dict)
    _busy: bool = False

    def hooks(self, model: nn.Module, place: Place) -> Iterator[Any]:
        """Put on those of one block."""
        site = place.site
        if site.activation not in ACTIVATIONS:
            self.unheard[site.up] = f"there is no formula for its activation {site.activation!r}"
            return
        if site.layout == "separate":
            yield model.get_submodule(site.gate).register_forward_hook(self._keep(self._gates, site.up))
            yield model.get_submodule(site.up).register_forward_hook(self._keep(self._values, site.up))
        else:
            yield model.get_submodule(site.up).register_forward_hook(self._keep(self._gates, site.up))
        yield model.get_submodule(site.down).register_forward_hook(self._hear(place))

    def _keep(self, where: dict[str, torch.Tensor], path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not self._busy and isinstance(output, torch.Tensor):
                where[path] = output.detach()

        return hook

    def _hear(self, place: Place) -> Callable[..., None]:
        path = place.site.up

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._busy:
                return
            packed, value = self._gates.pop(path, None), self._values.pop(path, None)
            if packed is None or not args or not isinstance(args[0], torch.Tensor):
                self.unheard[path] = "its projections were called in another order than gate, value, down"
                return
            self._busy = True
            try:
                self.take(place, self._parts(place, module, packed, value, args[0].detach(), output.detach()))
            finally:
                self._busy = False

        return hook

    def _parts(
        self,
        place: Place,
        module: nn.Module,
        packed: torch.Tensor,
        value: torch.Tensor | None,
        hidden: torch.Tensor,
        output: torch.Tensor,
    ) -> Heard:
        site = place.site
        if site.layout in ("packed", "interleaved"):
            gate_at, value_at = (which.to(packed.device) for which in place.outputs())
            packed, value = packed.index_select(site.dim, gate_at), packed.index_select(site.dim, value_at)
        flat = [None if each is None else self._flat(each, site.dim) for each in (packed, value, hidden, output)]
        gate_NF, value_NF, hidden_NF, output_NO = flat
        assert gate_NF is not None
        assert hidden_NF is not None
        assert output_NO is not None
        if site.limit is not None:
            gate_NF = gate_NF.clamp(max=site.limit)
            value_NF = None if value_NF is None else value_NF.clamp(-site.limit, site.limit)
        if value_NF is not None and place.offset:
            value_NF = value_NF + place.offset

        def down(other_NF: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor
            if site.dim == -1:
                answer = module(other_NF.to(hidden.dtype))
                return answer
            spatial = other_NF.to(hidden.dtype).T.reshape(1, -1, len(other_NF), *[1] * (hidden.dim() - 3))
            answer = module(spatial)
            return answer.reshape(output_NO.shape[1], -1).T

        opened = activation(site.activation)(gate_NF.float())
        return Heard(gate_NF, opened, value_NF, hidden_NF, output_NO, down)

    def _flat(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        last = tensor if dim == -1 else tensor.movedim(dim, -1)
        rows = last.reshape(-1, last.shape[-1])
        if self.mask is None or self.mask.numel() != len(rows):
            return rows
        return rows[self.mask.to(rows.device).flatten()]


@contextmanager
def listening(model: nn.Module, places: Sequence[Place], take: Take) -> Iterator[Ear]:
    """Inside, every call of a block is handed to `take`; afterwards no hook is left, whatever happened."""
    ear = Ear(take)
    handles: list[Any] = []
    try:
        for place in places:
            handles.extend(ear.hooks(model, place))
        yield ear
    finally:
        for handle in handles:
            handle.remove()
