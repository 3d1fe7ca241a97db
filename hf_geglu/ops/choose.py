"""Which way a block is run, by rule from measurements (`benchmarks/speed.py`): never one that is slower than the module
itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from hf_geglu.ops import c_kernels, compiled, onednn, pointwise
from hf_geglu.ops.decode import MOST_TOKENS

Choice: TypeAlias = Literal["reference", "lean", "tiled"]

ENOUGH_ELEMENTS = 1 << 18
"""Tokens x intermediate size below which a block that is called as a whole costs more than it saves."""

ENOUGH_WHERE_TORCH_IS_QUICK = 1 << 20
"""The same on a CPU, for activations that torch's own kernels compute well."""

ENOUGH_BY_TORCH_S_COMPILER = 3 << 20
"""And where the kernels are those of torch's compiler (0.2 ms a call) instead of those in C."""

ENOUGH_WEIGHTS = 1 << 19
"""Weights of a block from which on reading them is what few tokens cost, so that packed ones are quicker."""

SLOW_ALONE = frozenset({"gelu_pytorch_tanh", "quick_gelu", "relu2"})
"""Activations that a CPU computes much more slowly through torch's own kernels than through a compiled one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is known of one call before it is made."""

    tokens: int
    width: int
    """Intermediate size."""
    dtype: torch.dtype
    device_type: str
    activation: str
    differentiated: bool
    """Whether something is to be saved for a backward pass."""


def choose(call: Call) -> Choice:
    """The cheapest way for that call."""
    if _by_other_products(call):
        return "lean" if call.tokens * call.width >= ENOUGH_ELEMENTS else "reference"
    quick = call.device_type == "cpu" and call.activation not in SLOW_ALONE
    enough = ENOUGH_ELEMENTS
    if quick:
        in_c = c_kernels.why_not(call.device_type, call.dtype) is None
        enough = ENOUGH_WHERE_TORCH_IS_QUICK if in_c else ENOUGH_BY_TORCH_S_COMPILER
    if call.tokens * call.width < enough or not _has_kernel(call):
        return "reference"
    if quick and not call.differentiated:
        return "reference"  # torch's two kernels, one after the other, are as quick as one
    return "lean"


def _by_other_products(call: Call) -> bool:
    """Whether the products themselves are quicker in a block than in its modules, which then matters most."""
    if call.device_type != "cpu" or call.dtype != torch.float32 or not _has_kernel(call):
        return False
    return onednn.pays()


def always_too_small(tokens: int, width: int) -> bool:
    """Whether `choose` would answer "reference" whatever else is known of the call."""
    return tokens * width < ENOUGH_ELEMENTS


def packing_pays(tokens: int, hidden: int, width: int) -> bool:
    """Whether a call of so many tokens is quicker through packed weights (`hf_geglu.ops.decode`), which cost as much
    memory again as the weights. At one thread, over the module: bfloat16 0.46 to 0.60 for 1 to 4 tokens, 0.6 to 0.7 for
    8, 0.88 for 64; float32 0.5 to 0.8 for one token, 0.3 to 0.5 for more."""
    return 0 < tokens <= MOST_TOKENS and 3 * hidden * width >= ENOUGH_WEIGHTS


def _has_kernel(call: Call) -> bool:
    """Whether the unit is one kernel there: without one the block is slower than plain torch, however little it
    saves."""
    if call.dtype == torch.float64 or call.device_type not in ("cpu", "cuda"):
        return False
    if call.device_type == "cuda" and pointwise.triton_missing() is None:
        return True
    if c_kernels.why_not(call.device_type, call.dtype) is None:
        return True
    return compiled.why_not(call.device_type) is None
