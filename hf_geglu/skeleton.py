"""A model without weights: built from its config on the meta device, to look at what a plan would change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from hf_geglu import modeling_geglu
from hf_geglu.auto import auto_classes
from hf_geglu.errors import PlanError


def architecture(config: Any) -> Any:
    """The class to load a checkpoint of this config with: the one it was saved from, or else the first Auto class that
    has one for it.

    Raises:
        PlanError: transformers has none.
    """
    for name in config.architectures or ():
        if name.startswith(modeling_geglu.CLASS_PREFIX):
            return getattr(modeling_geglu, name)
        if hasattr(transformers, name):
            return getattr(transformers, name)
    remote = [name for name in getattr(config, "auto_map", None) or () if name.startswith("AutoModel")]
    if remote:
        return getattr(transformers, max(remote, key=len))  # a head rather than the bare AutoModel
    return base_architecture(config)


def base_architecture(config: Any) -> Any:
    """The model without a head, or the first head where the architecture has no model without one.

    Raises:
        PlanError: transformers has neither.
    """
    heads = auto_classes(config.model_type)
    name = heads.get("AutoModel") or next(iter(heads.values()), None)
    if name is None:
        raise PlanError(
            f"transformers {transformers.__version__} has no model class for the model type {config.model_type!r}; "
            "upgrade it, or load the model yourself and call hf_geglu.convert(model)"
        )
    return modeling_geglu.base_class(name)


def skeleton(config: Any, model_class: Any, *, buffers: bool = False, **kwargs: Any) -> nn.Module:
    """A model of that class without weights. Neither `config` nor any random state is changed.

    Args:
        config: of the model.
        model_class: a model class, or an Auto class.
        buffers: compute those that a constructor computes (frequencies of rotary positions), as loading would.
        **kwargs: for an Auto class's `from_config` (`trust_remote_code`).
    """
    build = getattr(model_class, "from_config", None) or getattr(model_class, "_from_config", None) or model_class
    with torch.random.fork_rng(devices=[]), _buffers_only() if buffers else torch.device("meta"):
        model = build(copy.deepcopy(config), **kwargs)
    assert isinstance(model, nn.Module)
    return model


class _EmptyIsNowhere(TorchFunctionMode):
    """What is made without numbers, as weights are, takes no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _buffers_only() -> Iterator[None]:
    """Parameters go to the meta device as soon as they are made, buffers stay."""

    def forget(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(forget)  # type: ignore[arg-type] # it may give another one
    try:
        with _EmptyIsNowhere():
            yield
    finally:
        hook.remove()
