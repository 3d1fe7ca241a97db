"""Which parameters of a model a checkpoint holds, which of them are one and the same, and which it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_geglu.checkpoint.rules import Arrival, ties_whatever_is_stored
from hf_geglu.checkpoint.stored import Stored, same_numbers
from hf_geglu.errors import WeightsError


def held(base: nn.Module, stored: Sequence[Stored], goes: Mapping[str, Arrival]) -> dict[str, Stored]:
    """Parameter -> the stored tensor that it is, in the order of storage. Merged ones are left out.

    Raises:
        WeightsError: shapes differ (config and weights do not belong together), or weights are no floating numbers.
    """
    known = base.state_dict()
    found = {}
    for tensor in stored:
        arrival = goes.get(tensor.name)
        if arrival is None or arrival.converter is not None:
            continue
        shape = tuple(known[arrival.parameter].shape)
        if shape != tensor.shape:
            raise WeightsError(
                f"{tensor.name} in {tensor.file} has the shape {tensor.shape}, but {type(base).__name__} of this "
                f"config.json has {shape} at {arrival.parameter}; config and weights do not belong together"
            )
        wants_floats = known[arrival.parameter].dtype.is_floating_point
        if wants_floats and (not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2):
            raise WeightsError(
                f"{tensor.name} in {tensor.file} is stored as {tensor.dtype}, as quantised weights are; expected "
                "float32, bfloat16 or float16. Convert the model that was quantised, and quantise the variant"
            )
        found[arrival.parameter] = tensor
    return found


def tied(base: nn.Module, parameters: Mapping[str, Stored]) -> dict[str, str]:
    """Every parameter that shares its numbers with others -> the one whose stored tensor speaks for them.

    One that is stored with other numbers than the one it should be tied to is not tied, as in transformers 5.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    found = {}
    for group in groups.values():
        present = [name for name in group if name in parameters]
        if len(group) == 1 or not present:
            continue
        leader = present[0]
        for name in group:
            if name not in present or ties_whatever_is_stored() or same_numbers(parameters[leader], parameters[name]):
                found[name] = leader
    return found


def lacking(base: Any, there: Iterable[str]) -> tuple[str, ...]:
    """Parameters without numbers: heads and poolers that loading makes up, before and after.

    Raises:
        WeightsError: others are lacking too, so the checkpoint is not complete.
    """
    ignored = [re.compile(pattern) for pattern in getattr(base, "_keys_to_ignore_on_load_missing", None) or ()]
    known = set(there)
    missing = [
        name for name in base.state_dict() if name not in known and not any(rule.search(name) for rule in ignored)
    ]
    whole, prefix = base.base_model is base, f"{base.base_model_prefix}."
    # poolers are the one part of base models that checkpoints leave out by custom
    needed = [name for name in missing if (whole or name.startswith(prefix)) and "pooler" not in name]
    if needed:
        raise WeightsError(
            f"the checkpoint lacks {len(needed)} tensors of {type(base).__name__}, for example {needed[0]!r}, and "
            "transformers would make them up; check that it is complete and that the class fits it"
        )
    return tuple(missing)
