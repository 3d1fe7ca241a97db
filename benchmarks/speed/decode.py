"""Decoding: a gated block for few tokens at a time.

Few tokens cost what reading the weights costs, so a block whose weights stay in a cache says nothing about a model.
Hence a row of blocks that takes `ROW` bytes, run one after the other as a model runs its layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import hf_geglu
from benchmarks.speed.block import EAGER, llama_block
from benchmarks.speed.clock import interleaved, ratios

ROW = 128 * 2**20
OURS, PACKED = "ours, auto", "ours, decode"


def rows(
    hidden: int, width: int, dtype: torch.dtype, activation: str, size: int
) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """The same blocks, each of the row computed in different ways, by name."""
    count = max(1, round(size / (3 * hidden * width * dtype.itemsize)))
    one = llama_block(hidden, width, activation).to(dtype)
    eager = [copy.deepcopy(one) for _ in range(count)]
    found: dict[str, list[Callable[[Tensor], Tensor]]] = {EAGER: [*eager]}
    both = [torch.cat([block.gate_proj.weight, block.up_proj.weight]) for block in eager]  # type: ignore[union-attr,list-item]
    found["one product for both"] = [
        lambda x, w=weight, b=block: _one_product(x, w, b) for weight, block in zip(both, eager, strict=True)
    ]
    found["torch.compile"] = [torch.compile(block) for block in eager]
    for name, decode in ((OURS, False), (PACKED, True)):
        own = nn.Sequential(*(copy.deepcopy(block) for block in eager))
        hf_geglu.optimize(own, decode=decode)
        found[name] = [*own]
    return found


def _one_product(x_TD: Tensor, weight: Tensor, block: Any) -> Tensor:
    gate_TF, value_TF = functional.linear(x_TD, weight).chunk(2, dim=-1)
    answer: Tensor = block.down_proj(block.act_fn(gate_TF) * value_TF)
    return answer


@torch.no_grad()
def measure(
    *, hidden: int, width: int, tokens: list[int], dtype: str, activation: str, seconds: float, row: int = ROW
) -> dict[str, Any]:
    """By number of tokens: time over eager HF, and the error against float64 over that of eager HF."""
    kind = getattr(torch, dtype)
    found = rows(hidden, width, kind, activation, row)
    exact = llama_block(hidden, width, activation).to(kind).double()
    generator = torch.Generator().manual_seed(1)
    result: dict[str, Any] = {"time over eager": {}, "error over eager": {}}
    for _ in range(2):  # packs
        x = torch.randn(1, 1, hidden, generator=generator).to(kind)
        [block(x) for block in found[PACKED]]
    for number in tokens:
        x = torch.randn(1, number, hidden, generator=generator).to(kind)
        runs = {name: lambda blocks=blocks, x=x: [block(x) for block in blocks] for name, blocks in found.items()}
        times = interleaved(runs, device="cpu", seconds=seconds, rounds=(5, 41))
        result["time over eager"][str(number)] = ratios(times, over=EAGER)
        truth = exact(x.double())
        error = {name: float((blocks[0](x).double() - truth).norm() / truth.norm()) for name, blocks in found.items()}
        result["error over eager"][str(number)] = {name: round(own / error[EAGER], 3) for name, own in error.items()}
    return result
