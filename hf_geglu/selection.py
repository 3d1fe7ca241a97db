"""`layers=`: which sites of a model a conversion is about."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from hf_geglu.errors import SelectionError
from hf_geglu.sites import Site

Selector = int | str
Layers = Selector | Iterable[Selector] | None

_RANGE = re.compile(r"(-?\d+)\s*(-|:)\s*(-?\d+)")
_INDEX = re.compile(r"-?\d+")


def select(sites: Sequence[Site], layers: Layers) -> tuple[Site, ...]:
    """The sites that `layers` names, in the model's own order.

    Args:
        sites: all of a model's sites.
        layers: None for all; an index (negative ones count from the last layer); a range "2-5" (both ends included) or
            "2:6" (the end excluded, as in Python); a glob on the site's path such as ``"*.encoder.layer.1*"``; "
            "several of
            these, in a list or separated by commas. In a model of several towers an index names that layer in each.

    Raises:
        SelectionError: a selector that matches nothing or cannot be read; says what there is.
    """
    if layers is None:
        return tuple(sites)
    chosen: set[int] = set()
    for selector in _selectors(layers):
        matches = [number for number, site in enumerate(sites) if _matches(site, selector, sites)]
        if not matches:
            raise SelectionError(f"layers={selector!r} matches none of the {len(sites)} FFN sites; {_available(sites)}")
        chosen.update(matches)
    if not chosen:
        raise SelectionError(f"layers={layers!r} selects nothing; leave it out to convert every layer")
    return tuple(sites[number] for number in sorted(chosen))


def _selectors(layers: Selector | Iterable[Selector]) -> Iterable[Selector]:
    for item in [layers] if isinstance(layers, int | str) else layers:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise SelectionError(
                f"layers={item!r} is a {type(item).__name__}; expected an index, a range such as '2-5', or a glob on "
                "a path"
            )
        yield from [part.strip() for part in item.split(",")] if isinstance(item, str) else [item]


def _matches(site: Site, selector: Selector, sites: Sequence[Site]) -> bool:
    if isinstance(selector, int):
        selector = str(selector)
    indices = [other.layer for other in sites if other.layer is not None]
    count = max(indices, default=-1) + 1

    def absolute(text: str) -> int:
        return int(text) + count if text.startswith("-") else int(text)

    if bounds := _RANGE.fullmatch(selector):
        first, last = absolute(bounds[1]), absolute(bounds[3]) + (bounds[2] == "-")
        return site.layer is not None and first <= site.layer < last
    if _INDEX.fullmatch(selector):
        return site.layer == absolute(selector)
    return any(fnmatch.fnmatchcase(path, selector) for path in (site.block, site.gate, site.up, site.down))


def _available(sites: Sequence[Site]) -> str:
    indices = sorted({site.layer for site in sites if site.layer is not None})
    if indices:
        return f"layers {indices[0]} to {indices[-1]} have one, for example {sites[0].up!r}"
    return f"there are: {', '.join(repr(site.up) for site in sites[:4])}"
