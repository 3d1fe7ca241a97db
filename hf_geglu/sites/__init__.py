"""Finding FFN blocks by what they do: each small module is run on synthetic input and its projections are followed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_geglu.inputs import Inputs
from hf_geglu.sites.find import search
from hf_geglu.sites.given import GivenSite, check_sites, read_sites
from hf_geglu.sites.site import FoundSites, Rejection, Site

__all__ = ["FoundSites", "GivenSite", "Rejection", "Site", "find_sites", "read_sites"]


def find_sites(
    model: nn.Module, *, sites: Sequence[GivenSite] | None = None, inputs: Inputs | None = None
) -> FoundSites:
    """Find every FFN block of a model by behaviour, without running the model or reading a weight.

    Works on any device and dtype (the meta device too) and leaves the model, its hooks and all random generators as
    they were.

    Args:
        model: Any module; usually a Transformers model.
        sites: Sites named by hand, for an architecture the search does not understand: whole `Site` objects, or
            mappings with the paths of their projections, ``{"up": "layers.*.ffn.w1", "down": "layers.*.ffn.w2"}``, and
            ``"gate"`` where it is a projection of its own. The same probe completes and checks them, and they are
            returned instead of a search.
        inputs: Keyword arguments of one forward. A block that no synthetic arguments fit is run with those that a twin
            of the model gives it on these inputs; without them, on what the config suggests. Only their shapes and
            kinds matter. For what the search leaves undecided ("could not be run alone").

    Raises:
        SiteError: A site given by hand is not what it is said to be; the message names what was observed.
    """
    return search(model, inputs) if sites is None else check_sites(model, sites)
