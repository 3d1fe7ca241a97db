"""Whose weights are in memory: those of the units that are held, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from hf_geglu.errors import StreamError
from hf_geglu.streaming.units import Unit, Units

Read = Callable[[Sequence[str]], Mapping[str, torch.Tensor]]
"""Takes names of parameters and saved buffers of the model, and reads those that the checkpoint holds."""


class Residency:
    """Reads the tensors of units into the model, and puts the empty ones back.

    Args:
        model: whose parameters are on the meta device, and whose buffers are computed.
        units: of the model.
        read: where tensors come from.

    Raises:
        StreamError: the model computes buffers that are neither saved nor to be had.
    """

    def __init__(self, model: nn.Module, units: Units, read: Read) -> None:
        self.model, self.units, self._read = model, units, read
        for path in units.beside:
            self._fill(model.get_submodule(path), path, recurse=False)
        for name, buffer in model.named_buffers():
            owner, _, key = name.rpartition(".")
            if buffer.is_meta and key in model.get_submodule(owner)._non_persistent_buffers_set:
                raise StreamError(
                    f"{name} of {type(model).__name__} is not saved and was not computed when the model was built; "
                    "calibrate in memory instead: hf_geglu.convert(model, calibration=...)"
                )

        self._alone = {
            id(tensor): f"{unit.path}.{name}".strip(".")
            for unit in units.units
            if not unit.layer
            for name, tensor in (*unit.module.named_parameters(), *unit.module.named_buffers())
        }
        self._fetched: dict[str, torch.Tensor] = {}

    def fetched(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The numbers of an empty tensor of a unit that stands alone; None for one of a layer. They stay in memory."""
        name = self._alone.get(id(tensor))
        if name is None:
            return None
        if name not in self._fetched:
            found = self._read([name]).get(name)
            self._fetched[name] = self._made_up(name, tensor) if found is None else found
        return self._fetched[name]

    @contextmanager
    def holding(self, unit: Unit) -> Iterator[None]:
        """The weights of a unit are in memory inside."""
        empty = self._fill(unit.module, unit.path, recurse=True)
        try:
            yield
        finally:
            for table, key, before in empty:
                table[key] = before

    def _fill(
        self, module: nn.Module, path: str, *, recurse: bool
    ) -> list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor | None]]:
        places = {}
        for inner, owner in module.named_modules() if recurse else [("", module)]:
            for table in (owner._parameters, owner._buffers):
                for key, tensor in table.items():
                    if tensor is not None and key not in owner._non_persistent_buffers_set:
                        places[".".join(filter(None, [path, inner, key]))] = (table, key, tensor)
        found = self._read(list(places))
        empty = []
        for name, (table, key, before) in places.items():
            tensor = found.get(name)
            if tensor is None and not before.is_meta:  # a buffer that is computed when the model is built
                continue
            if tensor is None:
                tensor = self._made_up(name, before)
            new = nn.Parameter(tensor, requires_grad=False) if isinstance(before, nn.Parameter) else tensor
            empty.append((table, key, before))
            table[key] = new  # type: ignore[assignment]
        return empty  # type: ignore[return-value]

    def _made_up(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """What the checkpoint lacks: a pooler says nothing; a head would say something else each time."""
        if "pooler" in name:
            return torch.zeros(like.shape, dtype=like.dtype)
        raise StreamError(
            f"the checkpoint does not hold {name} of {type(self.model).__name__}, and its outputs weigh what an error "
            "costs; name the class that the checkpoint was saved from: model_class=..."
        )
