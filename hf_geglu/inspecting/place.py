"""A block as the inspection sees it: where its gate and its value are, and where the conversion put them.

Legend of suffixes: F neurons, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from hf_geglu.collapsing.origin import Origin, origins
from hf_geglu.conversions import Scaling, branch_outputs, value_offset
from hf_geglu.errors import SurgeryError
from hf_geglu.sites import Site, find_sites
from hf_geglu.sites.weights import bias_name, is_stack, output_dim, weight_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One block of a model."""

    site: Site
    """As found in the model as it is."""
    start: Scaling | None
    """What a conversion folded in, where it expanded this block."""
    groups: int
    offset: float

    @property
    def unit(self) -> float:
        """What counts as 1 in the gate's input."""
        return self.start.a if self.start is not None else 1.0

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a packed projection: which outputs are the gate, which the value, in the order of neurons."""
        if self.start is None:
            return branch_outputs(self.site)
        gate, value = torch.arange(2 * self.site.width).view(self.groups, 2, -1).unbind(1)
        return gate.reshape(-1), value.reshape(-1)


def places(model: nn.Module) -> tuple[Place, ...]:
    """Every FFN block that the finder sees in a model, with the start of its value branch where that is known."""
    expanded: Mapping[str, Origin] = {}
    with suppress(SurgeryError):  # no variant, or one that was gated from the start: no start is known
        expanded = {origin.site.up: origin for origin in origins(model)[0] if origin.fit is None}
    return tuple(_places(find_sites(model).sites, expanded))


def _places(sites: tuple[Site, ...], expanded: Mapping[str, Origin]) -> Iterator[Place]:
    for site in sites:
        origin = expanded.get(site.up)
        yield Place(
            site=site,
            start=None if origin is None else origin.scaling,
            groups=site.groups if origin is None else origin.site.groups,
            offset=site.value_offset if origin is None else value_offset(origin.site, origin.scaling),
        )


def gate_rows(model: nn.Module, place: Place) -> torch.Tensor | None:
    """Wg as (F, D); None where it cannot be read (quantised, adapters, stacks)."""
    site = place.site
    which = None if site.layout in ("separate", "dense") else place.outputs()[0]
    return _rows(model, site.gate, site, which)


def value_rows(model: nn.Module, place: Place) -> torch.Tensor | None:
    """Wv as (F, D); None for a dense block, or where it cannot be read."""
    site = place.site
    if site.layout == "dense":
        return None
    return _rows(model, site.up, site, None if site.layout == "separate" else place.outputs()[1])


def value_constants(model: nn.Module, place: Place) -> torch.Tensor | None:
    """bv with the block's own offset, (F,); None where there is no bias."""
    site = place.site
    name = bias_name(site.up, site.projection)
    bias = _parameter(model, name)
    if bias is None or site.layout == "dense":
        return None
    which = slice(None) if site.layout == "separate" else place.outputs()[1]
    return bias.detach().float().cpu()[which] + place.offset


def down_columns(model: nn.Module, place: Place) -> torch.Tensor | None:
    """|Wd_n| of each neuron, (F,); None where it cannot be read."""
    site = place.site
    weight = _parameter(model, weight_name(site.down, site.projection))
    if weight is None or is_stack(site.projection):
        return None
    wide = weight.detach().float().cpu()
    if site.projection == "conv1d":
        return wide.square().sum(1).sqrt()
    flat_OF = wide.flatten(1)
    groups = site.width // flat_OF.shape[1]  # of a grouped convolution: each group of outputs reads its own neurons
    return torch.unflatten(flat_OF, 0, (groups, -1)).square().sum(1).flatten().sqrt()


def _rows(model: nn.Module, path: str, site: Site, which: torch.Tensor | None) -> torch.Tensor | None:
    weight = _parameter(model, weight_name(path, site.projection))
    if weight is None or is_stack(site.projection):
        return None
    wide = weight.detach().float().cpu()
    rows_OD = wide.T if output_dim(site.projection) == 1 else wide.flatten(1)
    return rows_OD if which is None else rows_OD[which]


def _parameter(model: nn.Module, name: str) -> torch.Tensor | None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if "base_layer" in module._modules:  # an adapter beside it
        module = module.get_submodule("base_layer")
    found = module._parameters.get(attribute)
    if found is None or found.is_meta or not found.is_floating_point() or found.element_size() < 2:
        return None
    return found
