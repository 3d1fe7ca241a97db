"""How the columns of gate and value lie beside each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_geglu.identifying.replay import Key
from hf_geglu.identifying.wiring import Wiring


@dataclass(frozen=True, slots=True)
class Layout:
    """Its name, and what is odd about it."""

    name: str
    difference: str | None = None


def layout_of(wiring: Wiring, values: dict[Key, Tensor]) -> Layout:
    """Read off which columns meet in which output."""
    sources = wiring.sources
    if wiring.branches != 2:
        return Layout("dense" if wiring.branches == 1 else f"{wiring.branches} branches")
    pairs = {output: (wires[0][1], wires[1][1]) for output, wires in wiring.wires.items()}
    if sources[0] == sources[1]:
        width = values[sources[0]].shape[-1]
        half = width // 2
        if all(pair == (output, output + half) for output, pair in pairs.items()):
            return Layout("packed")
        if all(pair == (2 * output, 2 * output + 1) for output, pair in pairs.items()):
            return Layout("interleaved")
        distances = {right - left for left, right in pairs.values()}
        if len(distances) == 1 and width % (2 * min(distances)) == 0:
            return Layout(f"packed in groups of {min(distances)}")
        return Layout("packed otherwise", "gate and value of different neurons are paired: a permutation between them")
    widths = [values[source].shape[-1] for source in sources]
    if len(set(widths)) > 1:
        shared = max(widths) // min(widths)
        return Layout(
            f"one gate for {shared} neurons",
            f"{shared} neurons share one number of {sources[widths.index(min(widths))][1]}: no gate of their own each",
        )
    if all(left == right for left, right in pairs.values()):
        return Layout("separate")
    return Layout("separate otherwise", "gate and value of different neurons are paired: a permutation between them")
