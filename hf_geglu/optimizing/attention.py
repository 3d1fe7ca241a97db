"""`hf_geglu.ops.causal_attention` in the attention modules of a model, for the calls that it was measured for.

Transformers looks the attention function of a module up in its config at every call. An optimised module sees its
config through a view, in which "sdpa" is called by another name. The config itself, the masks that are made from it,
and whoever shares it are untouched; `set_attn_implementation` goes on working.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_geglu.ops.attention import FEWEST_TOKENS, better_than_torch, causal_attention
from hf_geglu.optimizing.plain import watched

NAME = "hf_geglu_causal"
_OTHER_WISHES = ("position_bias", "cache", "softcap", "output_attentions")
"""Arguments that transformers' function for "sdpa" heeds or refuses besides those that it names."""


class ConfigView:
    """A config in which the attention function "sdpa" is ours; everything else is the config's own."""

    def __init__(self, config: Any) -> None:
        object.__setattr__(self, "_hf_geglu_config", config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_hf_geglu_config":  # asked for while a copy is being made
            raise AttributeError(name)
        value = getattr(self._hf_geglu_config, name)
        return NAME if name == "_attn_implementation" and value == "sdpa" else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._hf_geglu_config, name, value)


def install_attention(model: nn.Module) -> int:
    """In every causal attention module that asks its config which function to call; returns in how many."""
    found = [module for module in model.modules() if _asks_its_config(module)]
    for module in found:
        module.config = ConfigView(module.config)  # type: ignore[assignment]
    return len(found)


def remove_attention(model: nn.Module) -> None:
    """Give the modules their config back."""
    for module in model.modules():
        view = vars(module).get("config")
        if isinstance(view, ConfigView):
            module.config = view._hf_geglu_config


def _asks_its_config(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)  # transformers 4 wraps it
    return (
        not isinstance(module, PreTrainedModel)
        and getattr(vars(module).get("config"), "_attn_implementation", None) == "sdpa"
        and getattr(module, "is_causal", None) is True
        and code is not None
        and "ALL_ATTENTION_FUNCTIONS" in code.co_names
    )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' function for "sdpa", which gets every other call."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if (
        causal is True
        and attention_mask is None
        and query.shape[2] >= FEWEST_TOKENS
        and not dropout
        and not torch.compiler.is_compiling()
        and watched() is None
        and all(kwargs.get(name) is None or kwargs[name] is False for name in _OTHER_WISHES)
        and better_than_torch(query, key, value)
    ):
        return causal_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None
    answer: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return answer


AttentionInterface.register(NAME, attention_forward)
