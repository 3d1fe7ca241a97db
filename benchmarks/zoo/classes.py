"""Which model class belongs to a model type."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from benchmarks.zoo.overrides import CLASSES


def model_class(model_type: str, config_class: type) -> type[nn.Module] | None:
    """The smallest whole model of a type; None where transformers has none.

    In this order: what the zoo says (types whose model is another's), what AutoModel makes of it, the class of the
    modelling file whose config is this one (a base model before a head), what any Auto class makes of it, and a plain
    module that is built from that config alone (prompt encoders, parts of towers).
    """
    if model_type in CLASSES:
        module_name, _, name = CLASSES[model_type].rpartition(".")
        return getattr(importlib.import_module(f"transformers.{module_name}".rstrip(".")), name, None)
    base = _mapped(modeling_auto.MODEL_MAPPING_NAMES, model_type)
    if base is not None and getattr(base, "config_class", None) is config_class:
        return base
    module = _modelling_module(config_class)
    if module is not None:
        own = [cls for cls in _classes(module) if _configured_by(cls, config_class)]
        if own:
            return max(own, key=_completeness)
    for name in dir(modeling_auto):
        if name.endswith("MAPPING_NAMES"):
            mapped = _mapped(getattr(modeling_auto, name), model_type)
            if mapped is not None and getattr(mapped, "config_class", None) is config_class:
                return mapped
    if base is not None or module is None:
        return base
    parts = [cls for cls in _classes(module) if _built_from(cls, config_class)]
    return max(parts, key=lambda cls: (_is_whole(cls), len(cls.__name__)), default=None)


def _mapped(mapping: Any, model_type: str) -> type[nn.Module] | None:
    entry = mapping.get(model_type) if hasattr(mapping, "get") else None
    name = entry[0] if isinstance(entry, tuple | list) else entry
    return None if name is None else getattr(transformers, name, None)


def _modelling_module(config_class: type) -> ModuleType | None:
    try:
        return importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None


def _classes(module: ModuleType) -> list[type[nn.Module]]:
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    ]


def _configured_by(cls: type[nn.Module], config_class: type) -> bool:
    return (
        issubclass(cls, PreTrainedModel)
        and not cls.__name__.endswith("PreTrainedModel")
        and getattr(cls, "config_class", None) is config_class
    )


def _completeness(cls: type[nn.Module]) -> tuple[bool, bool, int]:
    name = cls.__name__
    return name.endswith("Model"), "For" in name, -len(name)


def _is_whole(cls: type[nn.Module]) -> bool:
    return cls.__name__.endswith(("Model", "Encoder", "Decoder"))


def _built_from(cls: type[nn.Module], config_class: type) -> bool:
    """Whether the constructor takes such a config and can do with nothing else."""
    try:
        parameters = list(inspect.signature(cls).parameters.values())
    except ValueError:
        return False
    if not parameters or any(
        one.default is one.empty and one.kind <= one.POSITIONAL_OR_KEYWORD for one in parameters[1:]
    ):
        return False
    return parameters[0].annotation in (config_class, config_class.__name__)
