"""The intermediate size: how many neurons each block is to have, and which config entries say so.

The entries are found out by building the model from the changed config and looking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from hf_geglu.errors import PlanError
from hf_geglu.native import changed_config
from hf_geglu.sites import Site, find_sites
from hf_geglu.sites.weights import is_stack
from hf_geglu.skeleton import base_architecture, skeleton
from hf_geglu.width import Width, narrow_width


def width_changes(config: Any, model: nn.Module, wanted: Mapping[int, int], model_class: Any = None) -> dict[str, int]:
    """The entries of a config, dotted, with which its model has other intermediate sizes.

    Args:
        config: of the model; not changed.
        model: of that config, with or without weights.
        wanted: the new width of every width there is; the same one where nothing changes.
        model_class: to build; the bare model of the config by default.

    Returns:
        Entries and their new values; empty where every width stays.

    Raises:
        PlanError: no entry, and no two, do it.
    """
    if all(old == new for old, new in wanted.items()):
        return {}
    sites = find_sites(model).sites
    tried: list[str] = []
    for changes in _candidates(config, wanted):
        shown = ", ".join(f"{key}={value}" for key, value in changes.items())
        try:
            changed = changed_config(config, changes)
            twin = skeleton(changed, model_class or base_architecture(changed))
            observed = [site.width for site in find_sites(twin).sites]
        except Exception as error:  # an entry of that value that means something else; any class refuses in its own way
            tried.append(f"{shown} cannot be built ({error})")
            continue
        if observed == [wanted[site.width] for site in sites]:
            return changes
        tried.append(f"{shown} gives the widths {sorted(set(observed))}")
    raise PlanError(
        f"no entry of {type(config).__name__} sets the intermediate sizes {sorted(wanted)} to "
        f"{[wanted[old] for old in sorted(wanted)]}; tried: {'; '.join(tried) or 'none has that value'}. "
        "Set them in the config yourself and call geglu_config with width='same'"
    )


def _candidates(config: Any, wanted: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    """Config entries that may set the width: those with its value, and those that stand empty for a default."""
    same = {key: wanted[value] for key, value in _entries(config) if isinstance(value, int) and value in wanted}
    for key, value in same.items():
        yield {key: value}
    if same:
        yield same
    named = {key: value for key, value in same.items() if any(part in key for part in ("ff", "inter", "inner", "mlp"))}
    if named and named != same:
        yield named
    if len(set(wanted.values())) == 1:
        new = next(iter(wanted.values()))
        for key, value in _entries(config):
            if value is None and any(part in key for part in ("ff", "inter", "inner", "mlp")):
                yield {key: new}


def _entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    from transformers import PretrainedConfig

    for key, value in sorted(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            yield from _entries(value, f"{prefix}{key}.")
        elif not isinstance(value, bool):
            yield prefix + key, value


def narrow_widths(found: Sequence[Site], selected: Sequence[Site], width: Width) -> dict[str, int]:
    """How many neurons each selected block keeps, by its `up`.

    Args:
        found: every block of the model.
        selected: those that are to be converted.
        width: what was asked for.

    Raises:
        PlanError: a model whose blocks would then differ, which no config can say, or a block that cannot be narrowed;
            with the way out.
    """
    wanted = {site.up: narrow_width(width, site.width, gated=site.gated) for site in selected}
    if all(wanted[site.up] == site.width for site in selected):
        return wanted
    way_out = "; say width='same'"
    sizes = sorted({site.width for site in found})
    if len(sizes) > 1:
        raise PlanError(
            f"the FFN blocks of this model have {len(sizes)} different widths ({', '.join(map(str, sizes[:4]))}...), "
            f"and only a model whose blocks are alike can be made narrower{way_out}"
        )
    if len(selected) < len(found):
        left = next(site.up for site in found if site not in selected)
        raise PlanError(
            f"width={width!r} with {len(found) - len(selected)} blocks left out ({left} first): a config has one "
            f"intermediate size for all layers, so all of them become narrower or none{way_out}, or leave out `layers=`"
        )
    for site in selected:
        reason = _stays_wide(site)
        if reason:
            raise PlanError(f"{site.up} {reason}, and keeps its width{way_out}")
    return wanted


def _stays_wide(site: Site) -> str:
    if is_stack(site.projection):
        return "holds stacked experts, each of which would need tokens of its own"
    if site.projection == "pointwise" or site.groups > 1:
        return "is a convolution"
    if site.limit is not None or site.value_offset:
        return "clamps or shifts its branches"
    return ""
