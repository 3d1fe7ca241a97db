"""Makes the config of any model type small."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PretrainedConfig

from benchmarks.zoo.overrides import OVERRIDES
from benchmarks.zoo.rules import HEAD, HEADS, HIDDEN, small_depth, small_size, small_token

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_RECORDS = {"transformers_version", "dtype", "architectures"}
_DERIVED = _RECORDS | {
    "layer_types",
    "head_dim",
    "rope_parameters",
    "mlp_layer_types",
    "layers_block_type",
}
"""Fields that a config works out from others when it is made, so an old value must not be handed on."""

_DEEPEST = 4
"""Configs nest three deep at most (a composite, its text model, that one's vision tower)."""


@dataclass(frozen=True, slots=True)
class Shrinking:
    """One way of making a config small."""

    name: str
    hidden: int = 0
    """Hidden size to aim for; 0 keeps every width and shrinks the depth only."""
    heads: bool = False
    """Whether the numbers of heads shrink."""
    kinds: bool = False
    """Whether one layer of every kind is kept (linear and full attention, dense and sparse), not the first two."""


SHRINKINGS = (
    Shrinking("every size, every kind of layer", hidden=HIDDEN, heads=True, kinds=True),
    Shrinking("every size", hidden=HIDDEN, heads=True),
    Shrinking("every size but the heads", hidden=48),
    Shrinking("depth only"),
)
"""In the order in which they are tried: a type whose sizes constrain each other is built by a later one."""


def small_config(config_class: type, how: Shrinking) -> PretrainedConfig:
    """A small config of a class. Raises whatever the class says where the sizes do not fit each other."""
    told = overrides(config_class)
    return _shrink(_template(config_class, told), how, told)


def _template(config_class: Any, told: Mapping[str, Any]) -> PretrainedConfig:
    """A config of full size. What a small model is told may contradict that size, and configs check themselves."""
    template: PretrainedConfig
    try:
        template = config_class(**told)
    except Exception:
        template = config_class()
    return template


def overrides(config_class: type) -> dict[str, Any]:
    """What this type's config must be told."""
    return dict(OVERRIDES.get(getattr(config_class, "model_type", ""), {}))


def _shrink(template: PretrainedConfig, how: Shrinking, told: Mapping[str, Any], *, level: int = 0) -> PretrainedConfig:
    config_class = type(template)
    nested = dict(getattr(config_class, "sub_configs", None) or {})
    defaults = _defaults(config_class)
    keys: dict[str, Any] = {}
    for name in _fields(config_class):
        value = _read(template, name)
        if isinstance(value, PretrainedConfig):
            if level < _DEEPEST:
                keys[name] = _shrink(value, how, _told_inside(value, told.get(name)), level=level + 1)
        elif value is None or name in told or name in nested or name in _RECORDS:
            continue
        else:
            small = small_token(name, value)
            if small is None and how.hidden:
                small = small_size(name, value, hidden=how.hidden, heads=how.heads)
            elif small is None:
                small = small_depth(name, value)
            if small is not None:
                keys[name] = small
    if how.kinds:
        keys |= _agreeing(template, keys, told)
    keys |= _undeclared(template, how, told)
    keys |= _shortened_lists(template, keys, told, defaults, how)
    keys |= _own_values(template, keys, told, defaults)
    stages = _read(template, "out_features")
    if level and how.kinds and isinstance(stages, list) and "out_features" not in told:
        try:  # a backbone hands on the stages that the model around it reads, where it still has them
            return _made(config_class, {**told, **keys, "out_features": stages})
        except Exception:
            pass
    return _made(config_class, {**told, **keys})


def _made(config_class: Any, keys: Mapping[str, Any]) -> PretrainedConfig:
    """A config from its keys; transformers 4 wants nested ones as dictionaries."""
    config: PretrainedConfig
    try:
        config = config_class(**keys)
    except (TypeError, AttributeError):
        plain = {
            name: value.to_dict() if isinstance(value, PretrainedConfig) else value for name, value in keys.items()
        }
        config = config_class(**plain)
    return config


def _agreeing(template: PretrainedConfig, keys: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from other sizes: as many key-value heads as heads where keys are latent (DeepSeek's attention),
    rotary dimensions within a head, and the sections of a rotary embedding that share one out."""
    agreeing: dict[str, Any] = {}
    if _read(template, "kv_lora_rank") and "num_key_value_heads" in keys:
        agreeing["num_key_value_heads"] = keys.get("num_attention_heads", HEADS)
    if isinstance(_read(template, "rotary_dim"), int):
        agreeing["rotary_dim"] = HEAD // 2
    rope = _read(template, "rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("mrope_section"), list | tuple):
        half = int(HEAD * (rope.get("partial_rotary_factor") or 1.0)) // 2
        sections = len(rope["mrope_section"])
        shares = [half // sections + (index < half % sections) for index in range(sections)]
        agreeing["rope_parameters"] = {**rope, "mrope_section": shares}
    return {name: value for name, value in agreeing.items() if name not in told}


def _told_inside(config: PretrainedConfig, outer: object) -> dict[str, Any]:
    """What a nested config is told: by the type around it first, by its own type where that left the default."""
    own = overrides(type(config))
    if own:
        fresh = _template(type(config), {})
        own = {name: value for name, value in own.items() if _read(config, name) == _read(fresh, name)}
    return own | (outer if isinstance(outer, dict) else {})


def _undeclared(template: PretrainedConfig, how: Shrinking, told: Mapping[str, Any]) -> dict[str, Any]:
    """What the type around a nested config gave it beyond the fields of its class."""
    declared = {*_fields(type(template)), *vars(_template(type(template), told))}
    values = {
        name: value
        for name, value in vars(template).items()
        if name not in declared and not name.startswith("_") and isinstance(value, int | float | str)
    }
    return {
        name: small_size(name, value, hidden=how.hidden, heads=how.heads) or value if how.hidden else value
        for name, value in values.items()
    }


def _shortened_lists(
    template: PretrainedConfig,
    keys: Mapping[str, Any],
    told: Mapping[str, Any],
    defaults: Mapping[str, Any],
    how: Shrinking,
) -> dict[str, Any]:
    """Lists with one entry a layer, as long as there are layers now."""
    depth = next((name for name in _DEPTHS if name in keys), None)
    before = next((_read(template, name) for name in _DEPTHS if _read(template, name)), None)
    if not depth or not isinstance(before, int):
        return {}
    lists = {
        name: value
        for name in _fields(type(template))
        if isinstance(value := _read(template, name), list | tuple)
        and len(value) == before
        and name not in keys
        and name not in told
    }
    if how.kinds:
        kept = _one_of_each_kind(lists, keys[depth], before)
        return {depth: len(kept)} | {name: type(value)(value[index] for index in kept) for name, value in lists.items()}
    return {
        name: type(value)(value[: keys[depth]])
        for name, value in lists.items()
        if name != "layers_block_type" and defaults.get(name) is not None
    }


def _one_of_each_kind(lists: Mapping[str, Any], least: int, before: int) -> list[int]:
    """Layers that show every value of every list of names; at least so many."""
    kept: list[int] = []
    for value in lists.values():
        if all(isinstance(entry, str) for entry in value):
            for kind in dict.fromkeys(value):
                if not any(value[index] == kind for index in kept):
                    kept.append(list(value).index(kind))
    others = (index for index in range(before) if index not in kept)
    return sorted([*kept, *islice(others, max(least - len(kept), 0))])


def _own_values(
    template: PretrainedConfig, keys: Mapping[str, Any], told: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """What a nested config was given by the one around it, where that is not the class's default."""
    return {
        name: value
        for name, default in defaults.items()
        if name not in keys
        and name not in told
        and name not in _DERIVED
        and default is not None
        and isinstance(value := _read(template, name), int | float | str | bool)
        and value != default
    }


def _defaults(config_class: type) -> dict[str, Any]:
    if not dataclasses.is_dataclass(config_class):  # transformers 4
        return {}
    return {
        entry.name: entry.default
        for entry in dataclasses.fields(config_class)
        if entry.default is not dataclasses.MISSING
    }


def _fields(config_class: type) -> list[str]:
    if dataclasses.is_dataclass(config_class):
        return [entry.name for entry in dataclasses.fields(config_class)]
    parameters = inspect.signature(config_class.__init__).parameters  # type: ignore[misc]
    return [name for name in parameters if name not in ("self", "kwargs")]


def _read(config: PretrainedConfig, name: str) -> Any:
    """A field's value; some exist layer by layer only, and raise what they like when asked for as a whole."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None
