"""The activations that can be named: a fixed list, so that packed units registered in ACT2FN are never taken for
one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from transformers.activations import ACT2FN

Elementwise = Callable[[torch.Tensor], torch.Tensor]

NAMES = (
    "gelu",
    "gelu_pytorch_tanh",
    "silu",
    "relu",
    "relu2",
    "quick_gelu",
    "tanh",
    "sigmoid",
    "linear",
    "gelu_10",
    "hardswish",
    "laplace",
    "leaky_relu",
    "mish",
    "relu6",
    "sqrtsoftplus",
)
"""One name for each function. "gelu" stands for gelu_python too; "gelu_pytorch_tanh" for gelu_new, gelu_fast,
gelu_accurate and gelu_python_tanh (their constants agree to 1e-9); "silu" for swish. The order breaks no ties: none of
the sixteen agrees with another on wide random input."""

SATURATING = frozenset({"tanh", "sigmoid", "laplace"})
"""Bounded functions: alone, without a gate, they make a pooler or a squeeze, not an FFN."""


@cache
def candidates() -> tuple[tuple[str, Elementwise], ...]:
    """Name and function of every activation in `NAMES` that this version of transformers has."""
    found: list[tuple[str, Elementwise]] = []
    for name in NAMES:
        if name in ACT2FN:
            activation: nn.Module = ACT2FN[name]
            found.append((name, activation.eval().forward))
    return tuple(found)
