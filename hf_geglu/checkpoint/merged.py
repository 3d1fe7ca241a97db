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

    def change(self, part: Stored, rewrite: Rewrite, model: Any) -> Change | None:
        """What a change of a merged parameter means for one of the tensors it is made of; None for nothing.

        Raises:
            PlanError: the change is no scaling, or scales the numbers of one stored tensor differently.
        """
        if rewrite.old_shape != rewrite.new_shape:
            raise self._impossible(rewrite.name, "they would be expanded")
        sizes = sorted({size for tensor in self.parts for size in tensor.shape})
        small = {size: 2 * (number + 1) for number, size in enumerate(sizes)}
        marks = [
            torch.full([small[size] for size in tensor.shape], float(number), dtype=torch.float64)
            for number, tensor in enumerate(self.parts)
        ]
        try:
            marked = _convert(self.first, self.parts, self.goes, marks, model)[rewrite.name]
            factors = rewrite.function(torch.ones_like(marked))
        except Exception as error:  # operations that need true sizes, or a config
            raise self._impossible(rewrite.name, f"their numbers cannot be followed ({error})") from error
        own = torch.unique(factors[marked == float(self.parts.index(part))])
        if not torch.isin(marked, torch.arange(len(self.parts), dtype=torch.float64)).all() or len(own) != 1:
            raise self._impossible(rewrite.name, "the branches lie mixed in them")
        factor = own.item()
        return None if factor == 1.0 else Change(partial(product, factor=factor), None)

    def _impossible(self, parameter: str, why: str) -> PlanError:
        return PlanError(
            f"{parameter} is put together from {len(self.parts)} tensors of the checkpoint when it is loaded, and "
            f"{why}, so they cannot be converted one by one. Convert in memory instead: "
            "hf_geglu.from_pretrained(...), then save_pretrained; or leave the layer out with `layers=`"
        )


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
