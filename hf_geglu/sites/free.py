"""Projections that no block has been found for yet, and what may still be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_geglu.sites.projections import Port, leads_on

PATIENCE = 2
"""A projection that a run did not explain is left to one block further up; above that come whole encoders."""

MOST = 3
"""An FFN block has at most so many projections; one with more that cannot be run is not tried again from outside."""


@dataclass(slots=True, eq=False)
class Free:
    """A projection that no block has been found for yet."""

    path: str
    port: Port
    doubts: int = 0
    """How many blocks around it have been left behind since one of them was run, or could not be, to no avail."""
    probed: set[int] = field(default_factory=set)
    """Blocks that ran and showed no link from this projection to another one inside."""


@dataclass(frozen=True, slots=True, eq=False)
class Unrun:
    """A block that no synthetic arguments fit, with the projections that are open in it."""

    path: str
    free: tuple[Free, ...]
    reason: str | None
    """What is said of it unless it is understood after all."""
    shadowed: bool
    """Whether one inside it has these projections too; then that one's reason counts as long as it stands."""

    @property
    def paths(self) -> frozenset[str]:
        """Of its open projections."""
        return frozenset(one.path for one in self.free)

    def open_below(self) -> tuple[str, ...]:
        """The same as paths below the block, in their order."""
        prefix = f"{self.path}." if self.path else ""
        return tuple(one.path.removeprefix(prefix) for one in self.free)


def still_open(free: list[Free]) -> list[Free]:
    """What the next block up may still explain: once in doubt, a projection gets that one more chance."""
    kept = [one for one in free if one.doubts < PATIENCE]
    for one in kept:
        one.doubts += one.doubts > 0
    return kept


def why_open(error: str | None, free: list[Free]) -> str | None:
    """What is to be said of these projections, unless a block further up explains them: why they are undecided, or why
    they can be no FFN block, whatever is computed; None where that need not be said.

    Args:
        error: why the block that holds them could not be run, None where it was and showed no link.
        free: the projections.
    """
    if error is not None and not _attention_shaped(free):
        if not _could_be_a_block(free):
            return "could not be run, but no two of its projections lead back to a width without mixing positions"
        return f"could not be run alone on synthetic input: {error}"
    if error is None and len(free) <= MOST and any(_there_and_back(a.port, b.port) for a in free for b in free):
        return "ran, but nothing that one of its projections says reaches another"
    return None


def unseen_pairs(free: Sequence[Free]) -> bool:
    """Whether one projection could feed another, and no block that ran has shown otherwise."""
    return any(
        a is not b and leads_on(a.port, b.port) and not (a.probed & b.probed) and not _only_convolves(a.port, b.port)
        for a in free
        for b in free
    )


def _only_convolves(first: Port, second: Port) -> bool:
    """Convolutions wider than 1 that do not lead back to the width they started from are no block of any kind."""
    return "convolution" in (first.form, second.form) and first.d_in != second.d_out


def _could_be_a_block(free: Sequence[Free]) -> bool:
    """Whether some two of them are not known to be apart and would be taken for up and down if an activation lay
    between: they lead back to the width they start from, and neither is a convolution over positions."""
    return any(
        a is not b
        and leads_on(a.port, b.port)
        and a.port.d_in == b.port.d_out
        and "convolution" not in (a.port.form, b.port.form)
        and not (a.probed & b.probed)
        for a in free
        for b in free
    )


def _there_and_back(first: Port, second: Port) -> bool:
    """Whether two projections lead to another width and back, as only those of a block do."""
    return leads_on(first, second) and first.d_in == second.d_out != first.d_out


def _attention_shaped(free: list[Free]) -> bool:
    """Four projections of which three read the same width and one returns to it: queries, keys, values and output.

    A block with two or three might be an FFN, and is reported when it cannot be run; this one cannot be.
    """
    *inputs, output = [one.port for one in free]
    return len(inputs) == 3 and {port.d_in for port in inputs} == {output.d_out} and output.d_in == inputs[0].d_out
