"""``model.push_to_hub`` of a variant goes the way of `hf_geglu.push`: checked, with its papers, private unless told
otherwise, downloaded again and verified. Other models are pushed by transformers as ever."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from hf_geglu.neighbours.hooks import wrap


def watch_push(modeling_utils: ModuleType) -> None:
    """Wrap the method of transformers' ``PreTrainedModel``."""
    wrap(modeling_utils.PreTrainedModel, "push_to_hub", _routed)


def _routed(original: Callable[..., Any]) -> Callable[..., Any]:
    def push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        from hf_geglu.hub.push import is_variant, push_model

        if not is_variant(self):
            return original(self, repo_id, *args, **kwargs)
        return push_model(self, repo_id, *args, **kwargs)

    return push_to_hub
