"""Gradients scaled down to a norm, where they are above it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hf_geglu.training.processes.sharding import whole

WHOLE_GRADIENTS = {"NO", "MULTI_CPU", "MULTI_GPU"}
"""Strategies of accelerate under which each process holds all of every gradient."""


def clip_gradients(model: nn.Module, limit: float, accelerator: Any) -> float:
    """Scale the gradients down to `limit` if their norm (Euclidean, over all of them) is above it; returns that norm.

    torch's and accelerate's own functions multiply by 1 where it is not, a pass over all gradients for nothing.
    """
    strategy = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if strategy not in WHOLE_GRADIENTS:
        return float(whole(accelerator.clip_grad_norm_(model.parameters(), limit)))
    accelerator.unscale_gradients()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    total = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    norm = float(total)
    if norm > limit:
        clip_grads_with_norm_(trained, limit, total)
    return norm
