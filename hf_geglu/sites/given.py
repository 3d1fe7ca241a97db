"""Sites named by hand are held to the same standard as those that were found: the block is run and must do as is
said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from torch import nn

from hf_geglu.errors import SiteError
from hf_geglu.sites.find import as_site
from hf_geglu.sites.observe import observe
from hf_geglu.sites.projections import within
from hf_geglu.sites.site import FoundSites, Site
from hf_geglu.sites.twin import Mold


def check_sites(model: nn.Module, sites: Sequence[Site]) -> FoundSites:
    """The given sites, each confirmed by a probe of its block.

    Raises:
        SiteError: A path is missing, the block cannot be run, or it does something else than the site says.
    """
    mold = Mold(model)
    for site in sites:
        _check(model, site, mold)
    return FoundSites(tuple(sites), ())


def _check(model: nn.Module, site: Site, mold: Mold) -> None:
    for role in ("block", "gate", "up", "down"):
        try:
            model.get_submodule(getattr(site, role))
        except AttributeError:
            raise SiteError(
                f"{role}={getattr(site, role)!r} is no module of this {type(model).__name__}; "
                f"give a path as in model.named_modules()."
            ) from None
    block = model.get_submodule(site.block)
    prefix = f"{site.block}." if site.block else ""
    wanted = tuple(dict.fromkeys((site.gate, site.up, site.down)))
    probe = observe(block, stub_sets=_around(block, [path.removeprefix(prefix) for path in wanted]), mold=mold)
    observed = [as_site(block, site.block, seen) for seen in probe.seen]
    here = next((one for one in observed if {one.gate, one.up, one.down} == set(wanted)), None)
    if here is None:
        shown = [f"{one.layout} {one.activation} from {one.up} to {one.down}" for one in observed]
        shown += [refusal.reason for refusal in probe.refused]
        shown += [f"the block could not be run: {probe.error}"] if probe.error else []
        raise SiteError(
            f"{site.block or 'the model'} holds no FFN block made of {', '.join(wanted)}. "
            f"Observed: {'; '.join(shown) or 'nothing that feeds a projection'}. "
            f"Name the smallest module that calls these projections as `block`, or leave the place out."
        )
    wrong = [field.name for field in fields(Site) if getattr(site, field.name) != getattr(here, field.name)]
    if wrong:
        told = ", ".join(f"{name}={getattr(site, name)!r} (observed {getattr(here, name)!r})" for name in wrong)
        raise SiteError(f"The site at {site.up} is not as given: {told}. Correct these fields.")


def _around(block: nn.Module, projections: list[str]) -> list[tuple[str, ...]]:
    """Stub every child of the block that holds none of the given projections but several others; failing that,
    nothing."""
    stubs = tuple(
        name
        for name, child in block._modules.items()
        if child is not None
        and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        and len(within(child)) > 1
        and not any(path.startswith(f"{name}.") for path in projections)
    )
    return [stubs, ()] if stubs else [()]
