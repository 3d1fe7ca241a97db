"""The words of the kernels: what a gated block computes, without a tensor in sight.

Legend of suffixes, here and in the whole room: T tokens, D hidden size, F intermediate size, P packed size (2F).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from hf_geglu.errors import KernelError

Mode: TypeAlias = Literal["auto", "reference", "lean", "tiled"]
"""How a block is run. reference: plain torch. lean: saves x, gate and value. tiled: saves x, a tile of tokens at a
time. auto: the cheapest by `choose`."""

MODES: tuple[Mode, ...] = ("auto", "reference", "lean", "tiled")

Projection: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
"""Weight and bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """``down(activation(gate(x)) * (value(x) + offset))``: which activation, and how the weights lie."""

    activation: str
    """Name in transformers' ACT2FN; one of `hf_geglu.ops.formulas.FORMULAS`."""
    layout: Literal["separate", "packed", "interleaved"] = "separate"
    """Gate and value from two projections, from the halves of one, or from its even and odd outputs."""
    gate_half: Literal["first", "last"] = "first"
    """Of packed and interleaved ones, as in `hf_geglu.sites.Site`."""
    transposed: bool = False
    """Weights (in, out), as in GPT-2's Conv1D; else (out, in), as in nn.Linear."""
    offset: float = 0.0
    """Added to the value before the product."""


def as_rows(rows_TD: torch.Tensor, leading: Sequence[int]) -> torch.Tensor:
    """(T, D) as (..., D), which for autograd is no view: as torch's linear layers do, and FSDP expects."""
    answer: torch.Tensor = torch.ops.aten._unsafe_view.default(rows_TD, [*leading, rows_TD.shape[-1]])
    return answer


def split(packed_P: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, value) as views (..., F) of what a packed projection said."""
    if packed_P.shape[-1] % 2:
        raise KernelError(
            f"a packed projection has an even number of outputs, but this one has {packed_P.shape[-1]}; expected "
            "[gate | value] in one weight, or two projections and layout='separate'"
        )
    if form.layout == "interleaved":
        first, last = packed_P[..., 0::2], packed_P[..., 1::2]
    else:
        first, last = packed_P.chunk(2, dim=-1)
    return (first, last) if form.gate_half == "first" else (last, first)
