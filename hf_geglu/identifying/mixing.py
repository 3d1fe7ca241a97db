"""What mixes neurons: the first operation in which one column of a branch moves several others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_geglu.identifying.replay import Askable, Key
from hf_geglu.identifying.wiring import draw


@dataclass(frozen=True, slots=True)
class Mixer:
    """An operation and where it stands."""

    name: str
    module: str
    """Path of the module that it belongs to, "" where it is the unit's own."""
    at: int
    """How many operations came before it."""


def first_mixer(unit: Askable, values: dict[Key, Tensor], source: Key) -> Mixer | None:
    """The first operation that mixes the neurons of a branch; None where none does."""
    before = unit.run(values, stepwise=True).steps
    width = values[source].shape[-1]
    found: Mixer | None = None
    for column in dict.fromkeys((0, width // 2, width - 1)):
        changed = values[source].clone()
        changed[:, column] = draw(unit, 17)[source][:, column]
        after = unit.run({**values, source: changed}, stepwise=True).steps
        for at, (one, other) in enumerate(zip(before, after, strict=False)):
            if one.y.shape != other.y.shape or one.name != other.name:
                break
            moved = one.y != other.y
            narrow = one.y.shape[-1] == 1 and width > 2 and bool(moved.any())
            if narrow or bool((moved.sum(dim=-1) > 1).any()):
                if found is None or at < found.at:
                    found = Mixer(one.name, one.module, at)
                break
    return found
