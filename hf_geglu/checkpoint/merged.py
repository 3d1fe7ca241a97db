"""Parameters that transformers 5 puts together from several stored tensors, or takes apart: experts, fused projections.

A stored tensor of these is copied, or scaled for itself where a conversion only scales: which of its numbers get which
factor is found by sending marked tensors of a few numbers through the same operations.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hf_geglu.checkpoint.layout import Change
from hf_geglu.checkpoint.rules import Arrival
from hf_geglu.checkpoint.stored import Stored
from hf_geglu.conversions import Rewrite
from hf_geglu.conversions.precision import product
from hf_geglu.errors import PlanError, WeightsError


@dataclass(frozen=True, slots=True)
class Merged:
    """Stored tensors that become parameters together."""

    first: str
    """The parameter by which the group is known."""
    parameters: tuple[str, ...]
    parts: tuple[Stored, ...]
    goes: Mapping[str, Arrival]

    def changes(self, rewrite: Rewrite, model: Any) -> dict[str, Change]:
        """What a change of a merged parameter means for the tensors it is made of, by their names; those that stay as
        they are have no entry.

        Every number is marked by the tensor and the row that it lies in, so that one factor for each row is found:
        conversions have one for all, or one for each neuron.

        Raises:
            PlanError: the change is no scaling, or scales the numbers of a stored row differently.
        """
        if rewrite.old_shape != rewrite.new_shape:
            raise self._impossible(rewrite.name, "they would be expanded")
        true: set[int] = set()
        if not rewrite.even and rewrite.dim is not None:  # numbers of each neuron must meet their neurons
            true = {rewrite.old_shape[0], rewrite.old_shape[rewrite.dim], rewrite.old_shape[rewrite.dim] // 2}
        sizes = sorted({size for tensor in self.parts for size in tensor.shape})
        small = {size: size if size in true else 2 * (number + 1) for number, size in enumerate(sizes)}
        marks, at = [], [0]
        for tensor in self.parts:
            shape = [small[size] for size in tensor.shape]
            rows = torch.arange(at[-1], at[-1] + shape[0], dtype=torch.float64)
            marks.append(rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone())
            at.append(at[-1] + shape[0])
        try:
            marked = _convert(self.first, self.parts, self.goes, marks, model)[rewrite.name]
            shift = rewrite.function(torch.zeros_like(marked))
            factors = rewrite.function(torch.ones_like(marked)) - shift
        except Exception as error:  # operations that need true sizes, or a config
            raise self._impossible(rewrite.name, f"their numbers cannot be followed ({error})") from error
        if bool(shift.any()):
            raise self._impossible(rewrite.name, "they would be shifted")
        return {
            part.name: change
            for part, start, stop in zip(self.parts, at, at[1:], strict=False)
            if (change := self._change(rewrite, marked, factors, start, stop)) is not None
        }

    def _change(
        self, rewrite: Rewrite, marked: torch.Tensor, factors: torch.Tensor, start: int, stop: int
    ) -> Change | None:
        """The change of the tensor whose rows bear the marks `start` to `stop`."""
        mine = (marked >= start) & (marked < stop)
        rows, own = (marked[mine] - start).long(), factors[mine]
        count = stop - start
        most = torch.full((count,), -torch.inf, dtype=own.dtype).scatter_reduce(0, rows, own, "amax")
        least = torch.full((count,), torch.inf, dtype=own.dtype).scatter_reduce(0, rows, own, "amin")
        if not torch.equal(marked, marked.round()) or not torch.equal(most, least):
            raise self._impossible(rewrite.name, "the branches lie mixed in them")
        if bool((most == most[0]).all()):
            factor = most[0].item()
            return None if factor == 1.0 else Change(partial(product, factor=factor), None)
        return Change(
            partial(product, factor=most), 0, rows=lambda first, last: partial(product, factor=most[first:last])
        )

    def _impossible(self, parameter: str, why: str) -> PlanError:
        return PlanError(
            f"{parameter} is put together from {len(self.parts)} tensors of the checkpoint when it is loaded, and "
            f"{why}, so they cannot be converted one by one. Convert in memory instead: "
            "hf_geglu.from_pretrained(...), then save_pretrained; or leave the layer out with `layers=`"
        )

    def read(self, tensors: Sequence[torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """The parameters, made of the parts as loading makes them.

        Args:
            tensors: the parts, in order.
            model: without weights.
        """
        return _convert(self.first, self.parts, self.goes, tensors, model)


def merges(model: Any, stored: Sequence[Stored], goes: Mapping[str, Arrival]) -> tuple[Merged, ...]:
    """The groups of stored tensors that become parameters together. None of them before transformers 5.

    Raises:
        WeightsError: the stored tensors do not fit together, or not into the model.
    """
    groups: dict[str, list[Stored]] = {}
    for tensor in stored:
        arrival = goes.get(tensor.name)
        if arrival is not None and arrival.converter is not None:
            groups.setdefault(arrival.parameter, []).append(tensor)
    known = model.state_dict()
    found = []
    for first, parts in groups.items():
        ghosts = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in parts]
        try:
            made = _convert(first, parts, goes, ghosts, model)
        except Exception as error:  # any operation of transformers on tensors that do not fit
            raise WeightsError(
                f"the {len(parts)} tensors that make {first} do not fit together ({error}); download them again"
            ) from error
        for name, whole in made.items():
            if name not in known or known[name].shape != whole.shape:
                shape = tuple(known[name].shape) if name in known else "no such parameter"
                raise WeightsError(
                    f"the checkpoint gives {name} the shape {tuple(whole.shape)}, the model has {shape}; config.json "
                    "and weights do not belong together, or some are missing"
                )
        found.append(Merged(first, tuple(made), tuple(parts), goes))
    return tuple(found)


def _convert(
    first: str, parts: Sequence[Stored], goes: Mapping[str, Arrival], tensors: Sequence[torch.Tensor], model: Any
) -> dict[str, torch.Tensor]:
    """Send tensors through the operations that loading would send those parts through."""
    converter = copy.deepcopy(goes[parts[0].name].converter)
    order = {tensor.name: value for tensor, value in zip(parts, tensors, strict=True)}
    for name, arrival in goes.items():  # in the order of loading
        if name in order:
            converter.add_tensor(first, name, arrival.pattern, order[name])
    made = converter.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
