"""A model divided into the units whose weights come and go together: its layers, and what stands alone beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from hf_geglu.sites import Site

_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A module that is called as a whole."""

    path: str
    module: nn.Module
    layer: bool
    """False for what stands alone: embeddings, a final norm, a head."""

    def __contains__(self, path: str) -> bool:
        """Whether a module or parameter lies in it, by its name in the model."""
        return path == self.path or path.startswith(f"{self.path}.")


@dataclass(frozen=True, slots=True)
class Units:
    """All of a model's tensors belong to one of these, or to `beside`."""

    units: tuple[Unit, ...]
    beside: tuple[str, ...]
    """Paths of modules with layers below them that have parameters or buffers of their own: kept in memory."""

    def of(self, path: str) -> Unit:
        """The unit that a module lies in."""
        return next(unit for unit in self.units if path in unit)


def divide(model: nn.Module, sites: Sequence[Site]) -> Units:
    """Layers are the members of the outermost lists of modules, and the blocks of sites that lie in none.

    Args:
        model: to divide.
        sites: its FFN blocks; each lies in one layer.
    """
    layers: dict[str, nn.Module] = {}
    for path, member in _members(model, ""):
        if not any(member is other for other in layers.values()):  # one layer under two names
            layers[path] = member
    for site in sites:
        if not any(site.block == path or site.block.startswith(f"{path}.") for path in layers):
            layers[site.block] = model.get_submodule(site.block)
    units = [Unit(path, module, True) for path, module in layers.items()]
    beside: list[str] = []

    def rest(module: nn.Module, path: str) -> None:
        if path in layers or any(module is unit.module for unit in units):  # T5's embedding has three names
            return
        if _owns(module):
            if not any(layer.startswith(f"{path}.") or not path for layer in layers):
                units.append(Unit(path, module, False))
                return
            beside.append(path)
        for name, child in module.named_children():
            rest(child, f"{path}.{name}".strip("."))

    rest(model, "")
    return Units(tuple(units), tuple(beside))


def _members(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        below = f"{path}.{name}".strip(".")
        if isinstance(module, (*_LISTS, nn.Sequential)) and not isinstance(child, _LISTS):
            if any(True for _ in child.parameters()):
                yield below, child
        else:
            yield from _members(child, below)


def _owns(module: nn.Module) -> bool:
    saved = set(module._buffers) - module._non_persistent_buffers_set
    return any(p is not None for p in module._parameters.values()) or any(
        module._buffers[name] is not None for name in saved
    )
