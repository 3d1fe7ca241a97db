"""What the config of a portable variant says: its sites, its class, and a tripwire for those who know nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from hf_geglu.auto import auto_map, registered_config_class
from hf_geglu.conversions import scale_at_run_time, value_offset
from hf_geglu.errors import PlanError
from hf_geglu.modeling_geglu import SCHEMA, TRIPWIRE, config_entry, renamed, set_config_entry, variant_model_class
from hf_geglu.native import activation_keys, changed_config
from hf_geglu.plan import Plan, SitePlan
from hf_geglu.sites.weights import is_stack, output_dim
from hf_geglu.skeleton import skeleton

_VITAL = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "num_hidden_layers", "num_layers", "vocab_size")
"""Entries that most classes cannot do without, tried first; every other number comes after them."""


def declare_config(config: Any, base_class: type, sites: list[dict[str, Any]], plan: Plan) -> None:
    """Turn a base config, in place, into that of a portable variant: class, tripwire, sites, remote code.

    Raises:
        PlanError: no entry of the config would keep the plain class from loading the variant as if it were its base.
    """
    base_config = type(config)
    keys = sorted({key for entry in plan.converted for key in activation_keys(config, entry.site.activation)})
    geglu = {
        "schema": SCHEMA,
        "variant": plan.variant,
        "config": {key: config_entry(config, key) for key in keys},
        "sites": sites,
    }
    saved = _saved_tripwire(config, base_class, keys, sites)
    if saved is not None:
        geglu["saved"] = {saved: config_entry(config, saved)}
    config.geglu = geglu
    for key in keys:
        set_config_entry(config, key, TRIPWIRE)
    config.auto_map = auto_map(base_config, base_class)
    config.architectures = [variant_model_class(base_class, base_config).__name__]
    config.__class__ = registered_config_class(base_config)
    vars(config).pop("model_type", None)  # what was read from a file keeps the base's on the instance


def _saved_tripwire(config: Any, base_class: type, keys: list[str], sites: list[dict[str, Any]]) -> str | None:
    """The entry that has to stop the plain class, where those that name the activation do not: a class may ignore
    them."""
    if keys and _stopped(config, base_class, dict.fromkeys(keys, TRIPWIRE)):
        return None
    vital = {name: rank for rank, name in enumerate(_VITAL)}
    for key in sorted(_numbers(config), key=lambda key: vital.get(key.rpartition(".")[2], len(vital))):
        if _stopped(config, base_class, {key: TRIPWIRE}):
            return key
    if any(site["up"] is not None for site in sites):
        return None  # the shapes of a packed projection stop it
    raise PlanError(
        f"{base_class.__name__} can be built whatever its config says, so nothing would keep it from loading the "
        "variant as if it were the base model; choose a variant that its config can name"
    )


def _stopped(config: Any, base_class: type, changes: Mapping[str, Any]) -> bool:
    try:
        skeleton(changed_config(config, changes), base_class)
    except Exception:  # any class stops in its own way
        return True
    return False


def _numbers(config: Any, prefix: str = "") -> Iterator[str]:
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _numbers(value, f"{prefix}{key}.")
        elif type(value) is int and not key.startswith("_") and not key.endswith(("_id", "_ids")):
            yield prefix + key


def site_entry(entry: SitePlan, model: nn.Module) -> dict[str, Any]:
    """What a variant's config records of a site: all that the run time needs to build the block in `model`'s class."""
    site, expands = entry.site, entry.conversion == "expand"
    recorded: dict[str, Any] = {
        "up": site.up if expands else None,
        "activation": site.activation_path,
        "gate": None if entry.keeps_activation else entry.scaling.gate,
        "width": entry.width,
    }
    if entry.fit is not None:
        recorded["fitted"] = True  # its numbers are in the weights alone, so that nothing leads back from them
    if site.activation_call is not None:
        recorded["call"] = site.activation_call
    scale = scale_at_run_time(site, entry.scaling)
    if scale is not None:
        recorded["scale"] = list(scale)
    if expands:
        recorded |= unit_settings(entry)
        if is_stack(site.projection):
            recorded["stack"] = output_dim(site.projection)
        saved = renamed(model, f"{site.up}.weight", backwards=True).removesuffix(".weight")
        if saved != site.up:  # the name in the file, by which another version of transformers finds the block
            recorded["saved"] = saved
    return recorded


def unit_settings(entry: SitePlan) -> dict[str, Any]:
    """The arguments of the `PackedGLU` of an expanded site, without those that are as usual."""
    site, offset = entry.site, value_offset(entry.site, entry.scaling)
    settings = {"dim": (site.dim, -1), "groups": (site.groups, 1), "offset": (offset, 0.0)}
    return {name: value for name, (value, usual) in settings.items() if value != usual}
