"""PEFT: default target modules for variants, and adapters that know which base they were trained on.

PEFT itself cannot tell a variant from its unconverted base. Where an adapter touches a packed projection the shapes
differ and PEFT raises; where it touches attention alone everything fits, and it would run on another network without
a word. So beside an adapter of a variant goes `FILE`, the fingerprint of its base (`hf_geglu.fingerprint`), and
before an adapter with that file is put on a model the two are compared. Without this package nobody writes or reads
it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from hf_geglu.errors import AdapterError
from hf_geglu.fingerprint import Fingerprint, fingerprint
from hf_geglu.modeling_geglu import MODEL_TYPE_PREFIX, GegluMixin
from hf_geglu.neighbours.hooks import wrap

logger = logging.getLogger(__name__)

FILE = "geglu_base.json"
"""Beside ``adapter_config.json``: the fingerprint of the variant that the adapter was trained on."""


def register_targets(_: ModuleType) -> None:
    """Every table of default target modules has for "geglu_<type>" what it has for <type>: a variant keeps its
    names."""
    from peft.utils import constants

    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            for model_type, targets in list(table.items()):
                if not model_type.startswith(MODEL_TYPE_PREFIX):
                    table.setdefault(MODEL_TYPE_PREFIX + model_type, targets)


def watch_adapters(peft: ModuleType) -> None:
    """``PeftModel`` writes the fingerprint when it saves, and compares it before it loads."""
    for owner in (peft.PeftModel, peft.PeftMixedModel):
        wrap(owner, "save_pretrained", _recording)
        wrap(owner, "from_pretrained", _checking_class)
        wrap(owner, "load_adapter", _checking_instance)


def watch_integration(integration: ModuleType) -> None:
    """The same for adapters that transformers itself puts into a model (``model.load_adapter``)."""
    wrap(integration.PeftAdapterMixin, "load_adapter", _checking_model)
    wrap(GegluMixin, "save_pretrained", _recording_model)


def is_variant(model: nn.Module) -> bool:
    """Is this a portable variant, one that was converted in this process, or one from a folder with our manifest?

    Native variants look like any other model of their class; one that was saved without a manifest and loaded again is
    not recognised.
    """
    from hf_geglu.hub.manifest import MANIFEST  # late: this module is imported while transformers.modeling_utils is
    from hf_geglu.surgery import applied

    origin = getattr(model, "name_or_path", "")
    return (
        hasattr(getattr(model, "config", None), "geglu")
        or applied(model) is not None
        or (bool(origin) and Path(origin, MANIFEST).is_file())
    )


def record_base(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the fingerprint of `model` (a variant, adapters looked through) beside an adapter."""
    text = json.dumps(fingerprint(model).to_dict(), indent=2)
    (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")


def check_base(model: nn.Module, adapter: str | os.PathLike[str], **hub: Any) -> None:
    """Compare the fingerprint beside an adapter with `model`; an adapter without one is let through.

    Args:
        model: what the adapter is going to be put on.
        adapter: its folder or Hub id.
        **hub: `revision`, `token`, `subfolder`, `cache_dir`, `local_files_only`, for the Hub.

    Raises:
        AdapterError: it was trained on another model.
    """
    path = _recorded(adapter, **hub)
    if path is None:
        return
    expected = Fingerprint.from_dict(json.loads(path.read_text(encoding="utf-8")))
    difference = expected.difference(fingerprint(model))
    if difference:
        raise AdapterError(
            f"this adapter was trained on a GeGLU variant, and the {type(model).__name__} it is put on is not that "
            f"one: {difference}. Load the variant that adapter_config.json names as the base (an unconverted model: "
            f"convert it first, with the same plan), or delete {FILE} beside the adapter to use it all the same"
        )


def _recorded(adapter: str | os.PathLike[str], **hub: Any) -> Path | None:
    subfolder = hub.get("subfolder") or ""
    if os.path.isdir(adapter):
        path = Path(adapter, subfolder, FILE)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    known = {key: hub[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in hub}
    try:
        return Path(hf_hub_download(str(adapter), FILE, subfolder=subfolder or None, **known))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None  # an adapter without one; what else is wrong with the repository PEFT will say


def _recording(save: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_directory, *args, **kwargs)
        model = self.get_base_model()
        if kwargs.get("is_main_process", True) and is_variant(model):
            for name in kwargs.get("selected_adapters") or list(self.peft_config):
                record_base(model, save_directory if name == "default" else os.path.join(save_directory, name))
        return result

    return save_pretrained


def _recording_model(save: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True) and getattr(self, "_hf_peft_config_loaded", False):
            record_base(self, save_directory)
        return result

    return save_pretrained


def _checking_class(load: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        check_base(model, model_id, **kwargs)
        return load(cls, model, model_id, *args, **kwargs)

    return from_pretrained


def _checking_instance(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        check_base(self, model_id, **kwargs)
        return load(self, model_id, *args, **kwargs)

    return load_adapter


def _checking_model(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        if peft_model_id is not None:
            check_base(self, peft_model_id, **{**kwargs, **(kwargs.get("adapter_kwargs") or {})})
        return load(self, peft_model_id, *args, **kwargs)

    return load_adapter
