"""How torch computes while narrow models are made: what it does by default can cost several times as much.

On one CPU with AVX-512 (torch 2.13): a float32 product 80 ms by default and 39 ms through oneDNN, with the same
rounding (3e-7); the gradient of bfloat16 attention over 30 to 100 tokens 101 ms by the flash kernel and 5 ms in plain
products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_geglu.inputs import Inputs

SHORT = 512
"""Tokens of a sequence up to which attention may keep all pairs of them."""


@contextmanager
def quick(batches: Sequence[Inputs], device: torch.device) -> Iterator[None]:
    """Inside, on a CPU and for sequences that are not long, float32 products go through oneDNN, which may make them of
    bfloat16 pieces summed in float32 where the machine is quicker at that, and attention is plain products (the flash
    kernel is slow with such products inside). Elsewhere nothing changes."""
    lengths = [value.shape[1] for batch in batches for value in batch.values() if _is_matrix(value)]
    if device.type != "cpu" or max(lengths, default=SHORT + 1) > SHORT:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _is_matrix(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2
