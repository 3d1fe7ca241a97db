"""Stacks: matrices of several experts that lie in one parameter, (experts, out, in) or the other way round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from hf_geglu.sites.projections import read_port


@dataclass(slots=True, eq=False)
class Stacks:
    """The stacks of one module that have not been seen at work yet."""

    path: str
    """Of the module that holds them, itself or in children of one stack each."""
    shapes: dict[str, tuple[int, ...]]
    """Of the parameters, by their paths below the module."""
    errors: list[str] = field(default_factory=list)
    """Why the blocks around them, from inside out, could not be run or showed nothing."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Sizes that all the matrices share: one of them is that of the hidden state."""
        first, *others = (shape[1:] for shape in self.shapes.values())
        return tuple(dict.fromkeys(size for size in first if all(size in other for other in others)))

    @property
    def experts(self) -> int:
        """How many there are; some blocks want as many tokens."""
        return next(iter(self.shapes.values()))[0]

    def __str__(self) -> str:
        return ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())


def stacks_of(module: nn.Module, path: str) -> Stacks | None:
    """Two parameters of three dimensions that count the same experts, in a module or in children that hold one each;
    or three of two dimensions and one shape, in which the experts lie one after the other. None where there are
    none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, holder in _holders(module):
        stacks = {n: tuple(p.shape) for n, p in holder._parameters.items() if p is not None and p.ndim == 3}
        if holder is module or len(stacks) == 1:
            shapes.update((f"{name}.{n}" if name else n, shape) for n, shape in stacks.items())
    shapes = {name: shape for name, shape in shapes.items() if min(shape[1:]) > 1}
    if len(shapes) < 2:
        shapes = {n: tuple(p.shape) for n, p in module._parameters.items() if p is not None and p.ndim == 2}
        shapes = shapes if len(shapes) > 2 and len(set(shapes.values())) == 1 else {}
    # in one module the counts may differ: LongCat's experts that do nothing have rows in one parameter only
    together = all("." not in name for name in shapes) or len({shape[0] for shape in shapes.values()}) == 1
    if len(shapes) < 2 or not together:
        return None
    return Stacks(path, shapes)


def _holders(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "", module
    for name, child in module._modules.items():
        if child is not None and not child._modules and read_port(child) is None:
            yield name, child
