"""The config and the class of a variant with fewer converted blocks, or with none: then they are the base's again."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

from hf_geglu.modeling_geglu import CLASS_PREFIX, MODEL_TYPE_PREFIX, set_config_entry


def base_class_of(model: nn.Module) -> type[nn.Module]:
    """The class that a portable variant's class was made of."""
    kind = type(model)
    bases = [base for base in kind.__bases__ if kind.__name__ == CLASS_PREFIX + base.__name__]
    assert len(bases) == 1, kind.__mro__
    return bases[0]


def base_config(config: Any) -> Any:
    """The config of the base: a copy of a variant's with the base's class, its own activation and no sites."""
    return _undeclare(copy.deepcopy(config))


def _undeclare(config: Any) -> Any:
    """Turn a variant's config into the base's, in place. What `declaration.declare_config` did, backwards."""
    for key, value in config.geglu.get("config", {}).items():
        set_config_entry(config, key, value)
    kind = type(config)
    assert str(kind.model_type).startswith(MODEL_TYPE_PREFIX)
    config.__class__ = kind.__mro__[1]
    for entry in ("geglu", "auto_map"):
        vars(config).pop(entry, None)
    names = config.architectures or ()
    config.architectures = [name.removeprefix(CLASS_PREFIX) for name in names] or None
    return config


def collapsed_config(config: Any, gone: Collection[int], *, whole: bool, memo: dict[int, Any]) -> Any:
    """A copy of a variant's config without those of its sites; the base's where none is left.

    Args:
        config: of the variant.
        gone: indices into ``config.geglu["sites"]``.
        whole: nothing stays converted in this class. (Its config may still list the sites of another tower.)
        memo: of the copy, by which nested configs are found again.
    """
    new = copy.deepcopy(config, memo)
    if whole:
        return _undeclare(new)
    new.geglu = {**new.geglu, "sites": [site for index, site in enumerate(new.geglu["sites"]) if index not in gone]}
    return new
