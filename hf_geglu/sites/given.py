"""Sites named by hand are held to the same standard as those that were found: the block is run and must do as is
said."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from hf_geglu.errors import SiteError
from hf_geglu.modeling_geglu import get_attribute
from hf_geglu.sites.observe import observe
from hf_geglu.sites.placing import as_site
from hf_geglu.sites.projections import within
from hf_geglu.sites.site import FoundSites, Site, innermost
from hf_geglu.sites.twin import Mold

GivenSite = Site | Mapping[str, Any]
"""A whole `Site`, or some of its fields: `up` and `down` at least, `gate` too where it is a projection of its own. The
paths may have ``*`` for what differs between layers: ``{"up": "layers.*.ffn.w1", "down": "layers.*.ffn.w2"}``."""

_PATHS = ("block", "gate", "up", "down")


def read_sites(path: Path) -> list[dict[str, Any]]:
    """Sites out of a YAML or JSON file: a list of mappings as in `GivenSite`.

    Raises:
        SiteError: the file is something else.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SiteError(f"{path.name} cannot be read as YAML: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SiteError(
            f"{path.name} holds {type(entries).__name__}; expected a list of mappings such as "
            "'- {up: layers.*.ffn.w1, down: layers.*.ffn.w2}'"
        )
    return entries


def check_sites(model: nn.Module, sites: Sequence[GivenSite]) -> FoundSites:
    """The given sites, each completed and confirmed by a probe of its block.

    Raises:
        SiteError: A path is missing, the block cannot be run, or it does something else than the site says.
    """
    mold = Mold(model)
    named = (entry for given in sites for entry in _spelled_out(model, given))
    return FoundSites(tuple(_confirmed(model, entry, mold) for entry in named), ())


def _spelled_out(model: nn.Module, given: GivenSite) -> Iterator[Mapping[str, Any]]:
    """One entry for each place that the paths match, with every path in it."""
    if isinstance(given, Site):
        yield {field.name: getattr(given, field.name) for field in fields(Site)}
        return
    known = [field.name for field in fields(Site)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {near[0]!r}" if near else ""
            raise SiteError(f"{key!r} is no field of a site{hint}; expected {', '.join(known)}")
    if "up" not in given or "down" not in given:
        raise SiteError(f"the site {dict(given)!r} names no {'up' if 'up' not in given else 'down'} projection")
    pattern = re.compile("([^.]+)".join(re.escape(part) for part in given["up"].split("*")))
    names = [*(name for name, _ in model.named_modules()), *(name for name, _ in model.named_parameters())]
    matches = [match for match in map(pattern.fullmatch, names) if match]
    if not matches:
        raise SiteError(
            f"up={given['up']!r} matches nothing in this {type(model).__name__}; "
            f"give a path as in model.named_modules()."
        )
    for match in matches:
        filled = {key: _filled(given[key], match.groups()) for key in _PATHS if key in given}
        filled.setdefault("gate", filled["up"])
        filled.setdefault("block", innermost(filled[key] for key in ("gate", "up", "down")))
        yield {**given, **filled}


def _filled(pattern: str, captured: tuple[str, ...]) -> str:
    """The pattern with what was captured in the place of its stars."""
    first, *rest = pattern.split("*")
    return first + "".join(value + part for value, part in zip(captured, rest, strict=False))


def _confirmed(model: nn.Module, entry: Mapping[str, Any], mold: Mold) -> Site:
    for role in _PATHS:
        try:
            held = get_attribute(model, entry[role]) if entry[role] else model
        except AttributeError:
            held = None
        if held is None:
            raise SiteError(
                f"{role}={entry[role]!r} is no module of this {type(model).__name__}; "
                f"give a path as in model.named_modules()."
            )
    block = model.get_submodule(entry["block"])
    prefix = f"{entry['block']}." if entry["block"] else ""
    wanted = tuple(dict.fromkeys((entry["gate"], entry["up"], entry["down"])))
    relative = [path.removeprefix(prefix) for path in wanted]
    widths = [] if any(isinstance(get_attribute(model, path), nn.Module) for path in wanted) else _widths(model, wanted)
    probe = observe(block, stub_sets=_around(block, relative), mold=mold, widths=widths, by_hand=True)
    observed = [as_site(block, entry["block"], seen) for seen in probe.seen]
    here = next((one for one in observed if {one.gate, one.up, one.down} == set(wanted)), None)
    if here is None:
        shown = [f"{one.layout} {one.activation} from {one.up} to {one.down}" for one in observed]
        shown += [refusal.reason for refusal in probe.refused]
        shown += [f"the block could not be run: {probe.error}"] if probe.error else []
        raise SiteError(
            f"{entry['block'] or 'the model'} holds no FFN block made of {', '.join(wanted)}. "
            f"Observed: {'; '.join(shown) or 'nothing that feeds a projection'}. "
            f"Name the smallest module that calls these projections as `block`, or leave the place out."
        )
    wrong = [name for name in entry if name != "block" and getattr(here, name) != entry[name]]
    if wrong:
        told = ", ".join(f"{name}={entry[name]!r} (observed {getattr(here, name)!r})" for name in wrong)
        raise SiteError(f"The site at {entry['up']} is not as given: {told}. Correct these fields.")
    return here if here.block == entry["block"] else replace(here, block=entry["block"])


def _widths(model: nn.Module, parameters: Sequence[str]) -> list[int]:
    """Sizes that all these stacked matrices share: one of them is that of the hidden state."""
    first, *others = (get_attribute(model, path).shape[1:] for path in parameters)
    return [size for size in dict.fromkeys(first) if all(size in other for other in others)]


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
