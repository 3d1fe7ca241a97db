"""What a checkpoint's config says, believed only as far as its tensors bear it out.

A config is read before any weight, by code that builds whatever it asks for. So numbers that no honest config has are
caught before transformers sees them, and a model that wants many more parameters than the checkpoint holds is not built
to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hf_geglu.checkpoint.rules import note_dtype
from hf_geglu.checkpoint.stored import Stored
from hf_geglu.errors import HfGegluError, PlanError, WeightsError
from hf_geglu.files.header import read_json
from hf_geglu.skeleton import architecture, skeleton

_COUNTS = ("layer", "block", "depth", "expert", "stage", "head", "group", "level", "codebook")
_SPARE = 1000
"""How many parameters more than tensors a model may have: tied ones, and heads that the checkpoint lacks."""


def read_config(folder: Path, stored: Sequence[Stored], *, trust_remote_code: bool) -> Any:
    """The config of a checkpoint.

    Raises:
        WeightsError: there is none, it is damaged, or it counts more layers than there are tensors.
        PlanError: transformers cannot read it, the checkpoint is quantised or holds a variant already.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder.name} has no config.json; expected the folder that save_pretrained wrote")
    content = read_json(path)
    if not isinstance(content, dict):
        raise WeightsError("config.json is damaged: it is no JSON object; download the checkpoint again")
    _check_counts(content, most=len(stored) + _SPARE)
    if content.get("quantization_config"):
        raise PlanError(
            "the checkpoint is quantised (config.json has a quantization_config); convert the model in bfloat16 or "
            "float32 and quantise the variant"
        )
    if "geglu" in content:
        raise PlanError("this checkpoint is a GeGLU variant already; convert its base model")
    if content.get("transformers_weights"):
        raise PlanError(
            "config.json names a weights file of its own (transformers_weights); convert in memory instead: "
            "hf_geglu.from_pretrained(...), then save_pretrained"
        )
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # every config class refuses nonsense in its own way
        raise PlanError(f"transformers cannot read config.json: {_short(error)}") from error


def _check_counts(node: Any, *, most: int, key: str = "") -> None:
    if isinstance(node, dict):
        for name, value in node.items():
            _check_counts(value, most=most, key=name)
    elif isinstance(node, list):
        for value in node:
            _check_counts(value, most=most, key=key)
    elif type(node) is int and (abs(node) >= 2**31 or (abs(node) > most and any(word in key for word in _COUNTS))):
        raise WeightsError(
            f"config.json says {key} = {str(node)[:40]}, but the checkpoint holds {most - _SPARE:,} tensors; it is "
            "damaged or not of this checkpoint"
        )


def resolve_dtype(config: Any, dtype: str | torch.dtype, stored: Sequence[Stored]) -> torch.dtype:
    """The dtype that ``from_pretrained(dtype=dtype)`` would load in; also set in `config`, as there.

    Args:
        config: of the checkpoint; changed.
        dtype: "auto" for the config's, or else that of the first floating tensor; or a name; or a dtype.
        stored: the tensors.

    Raises:
        PlanError: it is no floating dtype of 16 bits or more.
    """
    wanted: Any = dtype
    if wanted == "auto":
        wanted = getattr(config, "dtype", None) or next(
            (tensor.dtype for tensor in stored if tensor.dtype.is_floating_point), None
        )
    resolved = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point or resolved.itemsize < 2:
        raise PlanError(f"dtype={str(wanted)[:40]!r}; expected 'auto', 'float32', 'bfloat16' or 'float16'")
    note_dtype(config, resolved, asked=dtype != "auto")
    return resolved


def build(config: Any, model_class: Any, stored: Sequence[Stored], *, trust_remote_code: bool) -> nn.Module:
    """The weightless model that a config describes, unless it asks for much more than the checkpoint holds.

    Args:
        config: of the checkpoint.
        model_class: class to build; None for the one that the config names.
        stored: the checkpoint's tensors.
        trust_remote_code: run modelling code of the checkpoint.

    Raises:
        PlanError: it cannot be built.
        WeightsError: it has far more parameters than the checkpoint has tensors.
    """
    try:
        kind = architecture(config) if model_class is None else model_class
        kwargs = {"trust_remote_code": True} if trust_remote_code and hasattr(kind, "from_config") else {}
        with _at_most(2 * len(stored) + _SPARE, len(stored)):
            return skeleton(config, kind, **kwargs)
    except HfGegluError:
        raise
    except Exception as error:  # any class may refuse any config in its own way
        raise PlanError(f"transformers cannot build the model that config.json describes: {_short(error)}") from error


@contextmanager
def _at_most(parameters: int, tensors: int) -> Iterator[None]:
    left = parameters

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise WeightsError(
                f"config.json describes a model of more than {parameters:,} parameters, but the checkpoint holds "
                f"{tensors:,} tensors; it is damaged or not of this checkpoint"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
