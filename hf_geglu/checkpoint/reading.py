"""Reads parameters of a checkpoint by the names that the model has for them, with the numbers that loading gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hf_geglu.checkpoint.blueprint import Blueprint
from hf_geglu.checkpoint.merged import Merged
from hf_geglu.checkpoint.rules import loaded_dtypes
from hf_geglu.checkpoint.stored import Stored
from hf_geglu.conversions.precision import all_finite
from hf_geglu.errors import WeightsError


class Reader:
    """Takes names, gives tensors; of those that the checkpoint lacks there is none.

    Args:
        drawn: of an open checkpoint.
    """

    def __init__(self, drawn: Blueprint) -> None:
        self._drawn = drawn
        self._loaded = loaded_dtypes(drawn.base, drawn.dtype)
        self._merged: dict[str, Merged] = {name: group for group in drawn.merged for name in group.parameters}

    def __call__(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Raises WeightsError where a tensor holds NaN or infinity."""
        found: dict[str, torch.Tensor] = {}
        wanted = set(names)
        for name in names:
            if name in found:
                continue
            stored = self._drawn.parameters.get(name) or self._drawn.parameters.get(self._drawn.tied.get(name, name))
            if stored is not None:
                found[name] = _read(stored, self._loaded(name, stored.dtype))
            elif name in self._merged:
                group = self._merged[name]
                parts = [_read(part, self._loaded(group.first, part.dtype)) for part in group.parts]
                made = group.read(parts, self._drawn.base)
                found |= {each: tensor for each, tensor in made.items() if each in wanted}
        return found


def _read(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    tensor = stored.whole()
    if tensor.is_floating_point() and not all_finite(tensor):
        raise WeightsError(
            f"{stored.name} in {stored.file} holds NaN or infinite values; nothing was converted. Check where the "
            "checkpoint comes from"
        )
    return tensor.to(dtype)
