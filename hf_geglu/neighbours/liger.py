"""Liger Kernel: its FFN kernels compute SwiGLU (silu) or GeGLU in the tanh form, whatever the model computes.

``use_liger_kernel=True`` on a Llama with ``hidden_act="gelu"`` silently installs SwiGLU; on an erf Gemma, tanh
(linkedin/Liger-Kernel, `apply_liger_kernel_to_llama`, `LigerGEGLUMLP`). Every function of Liger that patches a model
has a switch for its FFN kernel. Where that kernel computes something else than the model does, the switch is turned
off and said so; whoever asked for the kernel by name gets an error. Liger's other kernels (norms, rotary, loss) stay
on.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from transformers.activations import ACT2FN

from hf_geglu.errors import KernelError
from hf_geglu.modeling_geglu import MODEL_TYPE_PREFIX
from hf_geglu.neighbours.hooks import wrap

logger = logging.getLogger(__name__)

KERNELS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "relu_squared": "relu2"}
"""Liger's switches for FFN kernels, and the activation that each computes."""

_DENSE = frozenset({"relu_squared"})
"""Switches for blocks without a gate; a vision tower's dense blocks are not what `swiglu` is about."""

_PREFIX = "apply_liger_kernel_to_"


def guard_functions(monkey_patch: ModuleType) -> None:
    """Every ``apply_liger_kernel_to_<type>``, also where Liger's table by model type keeps it: Trainer goes through
    that."""
    for name in [name for name in vars(monkey_patch) if name.startswith(_PREFIX)]:
        wrap(monkey_patch, name, _guarded)
    table = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    for model_type, function in list(table.items()):
        table[model_type] = getattr(monkey_patch, function.__name__, function)
    wrap(monkey_patch, "_apply_liger_kernel_to_instance", _telling)


def guard_auto_class(auto_model: ModuleType) -> None:
    """``AutoLigerKernelForCausalLM`` patches classes before there is a model: its config says what that will
    compute."""
    wrap(auto_model.AutoLigerKernelForCausalLM, "from_pretrained", _guarded_loading)
    wrap(auto_model.AutoLigerKernelForCausalLM, "from_config", _guarded_building)


def guard_geglu_block(geglu: ModuleType) -> None:
    """``LigerGEGLUMLP`` takes any activation and computes tanh; its sister for SwiGLU refuses others by itself."""
    wrap(geglu.LigerGEGLUMLP, "__init__", _guarded_block)


def fitting(function: Callable[..., Any], model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments for a function of Liger's, FFN kernels that `model` does not compute turned off.

    Args:
        function: one of Liger's ``apply_liger_kernel_to_<type>``.
        model: what it will patch.
        asked: the keyword arguments that were given.

    Raises:
        KernelError: such a kernel was asked for by name.
    """
    changed = dict(asked)
    for switch, parameter in inspect.signature(function).parameters.items():
        computed = KERNELS.get(switch)
        if computed is None or not asked.get(switch, parameter.default):
            continue
        others = sorted(_activations(model, dense=switch in _DENSE) - {computed})
        if not others:
            continue
        says = (
            f"Liger's kernel `{switch}` computes {computed}, but this {type(model).__name__} computes "
            f"{', '.join(others)} in its FFN blocks"
        )
        if asked.get(switch):
            raise KernelError(f"{says}: expected {switch}=False, since the kernel would make it another network")
        logger.warning("%s; it is left off (%s=False), Liger's other kernels are applied", says, switch)
        changed[switch] = False
    return changed


def _activations(model: Any, *, dense: bool) -> set[str]:
    """What the dense or the gated FFN blocks of a model compute, found by running them."""
    from hf_geglu.sites import find_sites

    return {site.activation for site in find_sites(model).sites if (site.layout == "dense") == dense}


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs)
        model = bound.arguments.get("model")
        if model is None:  # classes are patched, before there is a model; see guard_auto_class, guard_geglu_block
            return function(*args, **kwargs)
        return function(**fitting(function, model, dict(bound.arguments)))

    return apply


def _telling(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Liger knows no portable variant and leaves it alone, without a word."""

    def apply_to_instance(model: Any, **kwargs: Any) -> Any:
        model_type = getattr(getattr(model, "config", None), "model_type", "")
        if model_type.startswith(MODEL_TYPE_PREFIX):
            logger.warning("Liger has no kernels for %s, a portable GeGLU variant; none of it is applied", model_type)
        return apply(model=model, **kwargs)

    return apply_to_instance


def _guarded_loading(load: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers import AutoConfig

        config = kwargs.get("config") or AutoConfig.from_pretrained(
            pretrained_model_name_or_path, **{key: kwargs[key] for key in _HUB if key in kwargs}
        )
        return load(cls, pretrained_model_name_or_path, *args, **_for_config(config, kwargs))

    return from_pretrained


def _guarded_building(build: Callable[..., Any]) -> Callable[..., Any]:
    def from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        return build(cls, config, **_for_config(config, kwargs))

    return from_config


_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code")


def _for_config(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    from hf_geglu.skeleton import architecture, skeleton

    function = MODEL_TYPE_TO_APPLY_LIGER_FN.get(config.model_type)
    if function is None:
        return kwargs
    return fitting(function, skeleton(config, architecture(config)), kwargs)


def _is_tanh_gelu(name: str) -> bool:
    z = torch.linspace(-5, 5, 101)
    return bool(torch.allclose(ACT2FN[name](z), ACT2FN["gelu_pytorch_tanh"](z), atol=1e-6))


def _guarded_block(init: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stated = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        if stated is not None and not _is_tanh_gelu(stated):
            raise KernelError(
                f"Liger's GeGLU block computes the tanh form, but this {type(config).__name__} states {stated!r}: "
                "expected geglu=False in apply_liger_kernel_to_..., since the kernel would make it another network"
            )
        init(self, config, *args, **kwargs)

    return __init__
