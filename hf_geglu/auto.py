"""Makes the Auto classes know the variants' model types, each at the moment it is asked for.

A variant of any of transformers' 800 model types may be loaded, and importing them all would take seconds. So
``CONFIG_MAPPING`` resolves "geglu_<type>" on demand: that one container is private to transformers and touched only
here. What follows (which model class belongs to that config) is registered through the Auto classes' public `register`.
Without this module `auto_map` in the checkpoint's config still works, with ``trust_remote_code=True``.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from hf_geglu import modeling_geglu
from hf_geglu.modeling_geglu import MODEL_TYPE_PREFIX, variant_config_class, variant_model_class

logger = logging.getLogger(__name__)
_LOCK = threading.RLock()


class _VariantConfigs(dict[str, Any]):
    """The registered configs, plus one for every "geglu_<type>" whose base type transformers knows."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or _base_type(model_type) is not None

    def __missing__(self, model_type: str) -> Any:
        base_type = _base_type(model_type)
        if base_type is None:
            raise KeyError(model_type)
        with _LOCK:
            return registered_config_class(_configurations().CONFIG_MAPPING[base_type])


def _configurations() -> Any:
    # late: the import of that module asks for `register`, which could not be there yet
    from transformers.models.auto import configuration_auto

    return configuration_auto


def _base_type(model_type: object) -> str | None:
    if not isinstance(model_type, str) or not model_type.startswith(MODEL_TYPE_PREFIX):
        return None
    base_type = model_type.removeprefix(MODEL_TYPE_PREFIX)
    return base_type if base_type in _configurations().CONFIG_MAPPING_NAMES else None


def register(configurations: Any = None) -> None:
    """Teach ``AutoConfig`` the variants' model types. Idempotent and thread-safe. The argument is transformers' module
    `configuration_auto`, where its import is what asks for this."""
    with _LOCK:
        mapping = (configurations or _configurations()).CONFIG_MAPPING
        known = getattr(mapping, "_extra_content", None)
        if isinstance(known, _VariantConfigs):
            return
        if not isinstance(known, dict):
            logger.warning(
                "this version of transformers keeps its config mapping in another way; variants that hf_geglu saved "
                "load with trust_remote_code=True only"
            )
            return
        mapping._extra_content = _VariantConfigs(known)


def registered_config_class(base: Any) -> Any:
    """The config class of variants of `base`, known to the Auto classes from now on."""
    with _LOCK:
        config_class = variant_config_class(base)
        if base.model_type in _configurations().CONFIG_MAPPING_NAMES:
            _configurations().AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            _register_models(config_class)
        return config_class


def auto_classes(model_type: str) -> dict[str, str]:
    """Which class each Auto class has for a base model type: ``{"AutoModelForMaskedLM": "BertForMaskedLM", ...}``."""
    return {
        name: entry if isinstance(entry, str) else entry[0]
        for name, auto in _auto_model_classes().items()
        if (entry := auto._model_mapping._model_mapping.get(model_type)) is not None
    }


def auto_map(config_class: type, model_class: type) -> dict[str, str]:
    """``config.auto_map`` of a variant: where the file that travels with it has the class for each Auto class."""
    prefix = f"modeling_geglu.{modeling_geglu.CLASS_PREFIX}"
    heads = auto_classes(config_class.model_type) or {"AutoModel": model_class.__name__}  # type: ignore[attr-defined]
    return {"AutoConfig": prefix + config_class.__name__} | {
        auto: prefix + name for auto, name in sorted(heads.items())
    }


def _auto_model_classes() -> dict[str, Any]:
    from transformers.models.auto import modeling_auto

    return {
        name: auto
        for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None
    }


def _register_models(config_class: Any) -> None:
    """Every head that the Auto classes have for the base gets its variant."""
    base_config = config_class.__mro__[1]
    autos = _auto_model_classes()
    for name, class_name in auto_classes(base_config.model_type).items():
        base = modeling_geglu.base_class(class_name)
        autos[name].register(config_class, variant_model_class(base, base_config), exist_ok=True)
