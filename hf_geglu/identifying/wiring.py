"""Which numbers meet in a unit: for every output, the columns of the branches that it moves with.

Found by moving the branches, not by gradients, so that a step or a detached branch counts too.

    N rows, K columns of a branch, F outputs, P questions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_geglu.identifying.replay import INPUT, Askable, Key

MANY = 256
"""Columns above which a sample of them is looked at."""
SAMPLED = 48
"""Columns in each part of a sample: the first ones, those after the middle (where a packed half starts), the last."""

Wire = tuple[Key, int]
"""A column of a branch."""


class NotWiredError(Exception):
    """The outputs are no functions of a few numbers each; the message says what they are."""


@dataclass(frozen=True, slots=True, eq=False)
class Wiring:
    """A target, and the wires of each output that is looked at."""

    target: Key
    step: int | None
    wires: dict[int, tuple[Wire, ...]]
    """Output -> its wires, sources in the order in which they ran, columns in rising order."""
    width: int
    base: dict[Key, Tensor]

    @property
    def branches(self) -> int:
        """How many numbers meet."""
        return len(next(iter(self.wires.values())))

    @property
    def sources(self) -> tuple[Key, ...]:
        """The branch of each wire."""
        return tuple(key for key, _ in next(iter(self.wires.values())))


def read_target(unit: Askable, values: dict[Key, Tensor], target: Key, step: int | None) -> Tensor | None:
    """What a target is under these values: an answer, what enters a projection, or what the step at that place gave."""
    if step is None:
        return unit.run(values).targets.get(target)
    steps = unit.run(values, stepwise=True).steps
    return steps[step].y if step < len(steps) else None


def draw(unit: Askable, seed: int) -> dict[Key, Tensor]:
    """Moderate numbers for every branch, each of which bfloat16 has."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (1.5 * torch.randn(value.shape, generator=generator)).bfloat16().double()
        for key, value in unit.sources.items()
    }


def feeding(unit: Askable, values: dict[Key, Tensor]) -> dict[Key, tuple[Key, ...]]:
    """For every target, the branches that move it."""
    before = unit.run(values).targets
    again = unit.run(values).targets
    for key, tensor in before.items():
        if key in again and not torch.equal(tensor, again[key]) and bool(tensor.isfinite().all()):
            raise NotWiredError("it answers differently when it is asked the same twice: random, or with a memory")
    fed: dict[Key, list[Key]] = {key: [] for key in before}
    other = draw(unit, 7)
    for source in unit.sources:
        after = unit.run({**values, source: other[source]}).targets
        for key, tensor in before.items():
            if key in after and after[key].shape == tensor.shape and not _equal(after[key], tensor):
                fed[key].append(source)
    return {key: tuple(sources) for key, sources in fed.items()}


def wire(
    unit: Askable, values: dict[Key, Tensor], target: Key, sources: Sequence[Key], step: int | None = None
) -> Wiring:
    """The wires of a target.

    Raises:
        NotWiredError: positions or neurons are mixed, or outputs differ in how many numbers they are made of.
    """
    base = read_target(unit, values, target, step)
    assert base is not None
    other = draw(unit, 11)
    for source in sources:
        _stay_in_place(unit, values, target, source, base, other, step)
    columns = {source: _looked_at(values[source].shape[-1]) for source in sources}
    # looked at from both signs, so that no half of a branch hides the other
    sides = (values, {**values, **{source: -values[source] for source in sources}})
    reached: dict[Wire, Tensor] = {}
    for side in sides:
        before = read_target(unit, side, target, step)
        assert before is not None
        for source in sources:
            for column in columns[source]:
                changed = side[source].clone()
                changed[:, column] = other[source][:, column]
                after = read_target(unit, {**side, source: changed}, target, step)
                assert after is not None
                moved = _moved(after, before).any(dim=0)
                known = reached.get((source, column))
                reached[source, column] = moved if known is None else moved | known
    found: dict[int, list[Wire]] = {}
    for one, moved in reached.items():
        for output in moved.nonzero()[:, 0].tolist():
            found.setdefault(output, []).append(one)
    if not found:
        raise NotWiredError("nothing that its projections say reaches the answer")
    for wires in found.values():
        for source in sources:
            count = sum(key == source for key, _ in wires)
            if count > 2:
                raise NotWiredError(f"neurons are mixed: {_name(source)}")
    counts = {len(wires) for wires in found.values()}
    if any(len(columns[source]) < values[source].shape[-1] for source in sources):
        # of a sample, some outputs are seen with one of their wires only
        found = {output: wires for output, wires in found.items() if len(wires) == max(counts)}
    elif len(counts) > 1:
        raise NotWiredError(f"its outputs are made of {' or '.join(map(str, sorted(counts)))} numbers each")
    return Wiring(target, step, {out: tuple(wires) for out, wires in sorted(found.items())}, base.shape[-1], values)


def _looked_at(width: int) -> list[int]:
    if width <= MANY:
        return list(range(width))
    parts = (range(SAMPLED), range(width // 2, width // 2 + SAMPLED), range(width - SAMPLED, width))
    return sorted({column for part in parts for column in part})


def _stay_in_place(
    unit: Askable,
    values: dict[Key, Tensor],
    target: Key,
    source: Key,
    base: Tensor,
    other: dict[Key, Tensor],
    step: int | None,
) -> None:
    """Raises where one position of a branch moves another position of the target."""
    rows = values[source].shape[0]
    for row in dict.fromkeys((0, rows - 1)):
        changed = values[source].clone()
        changed[row] = other[source][row]
        after = read_target(unit, {**values, source: changed}, target, step)
        assert after is not None
        moved = _moved(after, base).any(dim=1).nonzero()[:, 0].tolist()
        if any(at != row for at in moved):
            if rows == base.shape[0]:
                raise NotWiredError(
                    f"positions are mixed: one position of {_name(source)} moves {len(moved)} positions"
                    " (attention, a convolution, a pooling)"
                )
            raise NotWiredError(f"{rows} positions of {_name(source)} become {base.shape[0]}")


class Questions:
    """A wiring as a function: sets wires to numbers, and reads the outputs."""

    def __init__(self, unit: Askable, wiring: Wiring) -> None:
        self._unit, self._wiring = unit, wiring
        taken: set[Wire] = set()
        self.outputs: list[int] = []
        for output, wires in wiring.wires.items():
            if not taken.intersection(wires):
                taken.update(wires)
                self.outputs.append(output)
        self._rows = min(values.shape[0] for key, values in wiring.base.items() if key in wiring.sources)
        self._weights: Tensor | None = None

    def __call__(self, *wires_P: Tensor) -> Tensor:
        """The outputs (P,) where each branch has the numbers given for it, (P,)."""
        size = self._rows * len(self.outputs)
        parts = [self._ask([wire_P[at : at + size] for wire_P in wires_P]) for at in range(0, wires_P[0].numel(), size)]
        return torch.cat(parts)

    def uneven(self, *numbers: float) -> str | None:
        """Whether the same numbers give the same everywhere; where outputs differ by a factor each, they are evened
        out from now on. Returns what else they do."""
        size = self._rows * len(self.outputs)

        def everywhere(numbers: Sequence[float]) -> Tensor:
            asked = [torch.full((size,), one, dtype=torch.float64) for one in numbers]
            return self._ask(asked).reshape(self._rows, len(self.outputs))

        first = everywhere(numbers)
        if not _close(first, first[:1].expand_as(first)):
            return "positions do not all compute the same function"
        if _close(first, first[:, :1].expand_as(first)):
            return None
        second = everywhere([one * 0.5 for one in numbers])
        weights = first[0] / first[0, 0]
        if not _close(second[0], weights * second[0, 0]):
            return "each neuron computes a function of its own (learned numbers inside)"
        self._weights = weights
        return None

    @property
    def weighed(self) -> bool:
        """Whether each output is multiplied by a number of its own."""
        return self._weights is not None

    def divide(self, factor: float) -> None:
        """Take a factor that all outputs share out of what they are weighed with."""
        assert self._weights is not None
        self._weights = self._weights * factor

    def _ask(self, wires_P: list[Tensor]) -> Tensor:
        values = {key: self._wiring.base[key].clone() for key in self._wiring.sources}
        asked = wires_P[0].numel()
        size = self._rows * len(self.outputs)
        for branch, numbers in enumerate(wires_P):
            padded = torch.cat([numbers, numbers.new_ones(size - asked)]).reshape(self._rows, len(self.outputs))
            for at, output in enumerate(self.outputs):
                key, column = self._wiring.wires[output][branch]
                values[key][: self._rows, column] = padded[:, at]
        seen = read_target(self._unit, {**self._wiring.base, **values}, self._wiring.target, self._wiring.step)
        assert seen is not None
        chosen = seen[: self._rows, self.outputs]
        if self._weights is not None:
            chosen = chosen / self._weights
        return chosen.reshape(-1)[:asked]


def _moved(after: Tensor, before: Tensor) -> Tensor:
    """Where something changed; what is not finite on both sides did not."""
    if after.shape != before.shape:
        raise NotWiredError("the shape of what it makes depends on the numbers")
    return ~((after == before) | (after.isnan() & before.isnan()))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and not bool(_moved(a, b).any())


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def _name(source: Key) -> str:
    return "the input" if source == INPUT else source[1] or "the input"
