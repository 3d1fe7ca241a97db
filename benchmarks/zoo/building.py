"""Builds a small random model of any model type of the installed transformers, without a download."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from benchmarks.zoo.classes import model_class
from benchmarks.zoo.overrides import COMPOSED, NOT_BUILT
from benchmarks.zoo.shrinking import SHRINKINGS, Shrinking, overrides, small_config
from benchmarks.zoo.weights import randomise

LARGEST = 130_000_000
"""Parameters above which a model is not given memory: 0.5 GB in float32."""


class NotBuiltError(ValueError):
    """A model type that the zoo cannot build here; the message has the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A model of the zoo."""

    model: nn.Module
    model_type: str
    shrinking: str
    """Which way of making the config small worked, or "none"."""
    device: str
    """cpu, or meta where even the smallest config has more than `LARGEST` parameters."""

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def model_types() -> list[str]:
    """Every model type of the installed transformers, in alphabetical order."""
    return sorted(CONFIG_MAPPING_NAMES)


def build(model_type: str) -> Built:
    """A small model with random weights, the same ones at every call, in float32 and eval mode.

    Ways of shrinking are tried in the order of `SHRINKINGS`, last the default config; the first one that fits in memory
    wins, and where none does, the first one that can be built on the meta device.

    Raises:
        NotBuiltError: unknown type, no model class, a package that is not installed, or a config that no rule makes
            consistent; the message says what the last attempt met.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        raise NotBuiltError(f"transformers has no model type {model_type!r}")
    if model_type in NOT_BUILT:
        raise NotBuiltError(NOT_BUILT[model_type])
    config_class = CONFIG_MAPPING[model_type]
    try:
        cls = model_class(model_type, config_class)
    except ImportError as error:  # a class that needs an absent package says so when it is touched
        raise NotBuiltError(" ".join(str(error).split())) from error
    if cls is None:
        raise NotBuiltError("transformers has a config of this type but no model class")
    failures: list[str] = []
    on_meta: Built | None = None
    for name, config in _configs(model_type, config_class, failures):
        try:
            model = _instance(cls, config, "meta")
            size = sum(parameter.numel() for parameter in model.parameters())
            if size > LARGEST:
                on_meta = on_meta or Built(model=model, model_type=model_type, shrinking=name, device="meta")
                continue
            # the config is made anew: a model may have written into the one it was built from
            model = _instance(cls, _again(config), "cpu").float()
            randomise(model)
            return Built(model=model, model_type=model_type, shrinking=name, device="cpu")
        except Exception as error:  # whatever a constructor has against its sizes; the next way may do
            failures.append(f"{name}: {type(error).__name__}: {error}")
    if on_meta is not None:
        return on_meta
    raise NotBuiltError(" | ".join(dict.fromkeys(" ".join(failure.split())[:300] for failure in failures)))


def _configs(model_type: str, config_class: Any, failures: list[str]) -> Iterator[tuple[str, PretrainedConfig]]:
    if model_type in COMPOSED:
        maker, first, second = COMPOSED[model_type]
        parts = (small_config(CONFIG_MAPPING[part], SHRINKINGS[0]) for part in (first, second))
        yield SHRINKINGS[0].name, getattr(config_class, maker)(*parts)
        return
    for how in (*SHRINKINGS, None):
        try:
            config = _default(config_class) if how is None else small_config(config_class, how)
        except Exception as error:  # configs check themselves, each in its own way
            failures.append(f"{_name(how)}: {type(error).__name__}: {error}")
        else:
            yield _name(how), config


def _default(config_class: Any) -> PretrainedConfig:
    config: PretrainedConfig = config_class(**overrides(config_class))
    return config


def _name(how: Shrinking | None) -> str:
    return "none" if how is None else how.name


def _again(config: PretrainedConfig) -> PretrainedConfig:
    return type(config).from_dict(config.to_dict())


def _instance(cls: Any, config: PretrainedConfig, device: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model: nn.Module = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    return model.eval()
