"""Causal attention in bfloat16 on a CPU by large products: `causal_attention(query, key, value, scale)`.

    B = batch, H = heads, K = heads of keys and values (H = K G), T = tokens, Q = tokens of a tile of queries, d = width

torch's kernel for a CPU multiplies small tiles, at a third of the speed that its products would have in oneDNN; 40 % of
a step of SmolLM2-135M (1 x 1024 tokens) is spent there. Here a tile of queries meets all keys before it in one
product, and the heads that share a key (grouped-query attention, arXiv:2305.13245) are rows of the same product.

oneDNN rounds its result to bfloat16, and a score of 16 would be off by 1/32. So the products compute differences: three
more columns on the queries hold the row's maximum (in the backward, on the gradients, the row's <dO, O>) to 24 bits,
ones on the keys. What is rounded is small exactly where the probability is large: |x| e^x <= 0.37 of a unit. As in
FlashAttention (arXiv:2205.14135) the backward computes the probabilities again, there without their sums: the rows of
the gradient are divided instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

TILE = 128
"""Queries of a tile: half of a tile's last block is computed for nothing, a smaller one loses speed."""

FEWEST_TOKENS = 128
"""Below, torch's kernel was as fast."""


def better_than_torch(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this was measured to be faster than torch's kernel: bfloat16 on a CPU that multiplies it (AVX-512, not
    AMX), a whole sequence of enough tokens."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.ndim == key.ndim == 4
        and key.shape == value.shape
        and query.shape[2] == key.shape[2] >= FEWEST_TOKENS
        and query.shape[3] == key.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and _multiplies_bfloat16()
    )


def _multiplies_bfloat16() -> bool:
    asked: Any = torch.cpu
    return bool(asked._is_avx512_bf16_supported() and not asked._is_amx_tile_supported())


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale query key' + causal mask) value, (B, H, T, d); key and value are (B, K, T, d).

    `scale` is d^(-1/2) by default. Differentiable any number of times: beyond the first torch computes it.
    """
    run: Any = _CausalAttention
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    answer: Tensor = run.apply(query, key, value, scale)
    return answer


def plain_causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The formula, operation by operation."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return torch.softmax(scores.masked_fill(later, -math.inf), -1) @ value


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            answer, *rows = _forward(query, key, value, scale)
        ctx.save_for_backward(query, key, value, answer, *rows)
        ctx.scale = scale
        return answer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, answer, *rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate this again
            wanted = [t for t, n in zip((query, key, value), ctx.needs_input_grad, strict=False) if n]
            again = plain_causal_attention(query, key, value, ctx.scale)
            found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None)
        with torch.autocast(query.device.type, enabled=False):
            return (*_backward(query, key, value, answer, rows, grad, ctx.scale), None)


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The answer; of each row the maximum of its scores, unscaled, and the sum of its odds, (BK, G, T, 1)."""
    batch, heads, tokens, width = query.shape
    # As the output projection will read it, (B, T, H, d): otherwise both would be kept for the backward.
    answer = torch.empty((batch, tokens, heads, width), dtype=query.dtype, device=query.device).transpose(1, 2)
    answer_BKGTd = torch.unflatten(answer, 1, (key.shape[1], -1))
    rows = (batch * key.shape[1], heads // key.shape[1], tokens, 1)
    tops, sums = (torch.empty(rows, dtype=torch.float32, device=query.device) for _ in range(2))
    q_NGTd, k_NTd, v_NTd = (
        _grouped(query, key.shape[1]),
        key.reshape(-1, tokens, width),
        value.reshape(-1, tokens, width),
    )
    k_NTe = _with_ones(k_NTd)
    for start in range(0, tokens, TILE):
        end = min(start + TILE, tokens)
        q_NRd = q_NGTd[:, :, start:end].flatten(1, 2)
        scores_NRS = torch.bmm(q_NRd, k_NTd[:, :end].mT)
        top_NR1 = _hide_later(scores_NRS, start, end).amax(-1, keepdim=True).float()
        q_NRe = torch.cat([q_NRd, _in_three(-top_NR1)], -1)
        odds_NRS = _hide_later(torch.bmm(q_NRe, k_NTe[:, :end].mT), start, end).mul_(scale).exp_()
        sum_NR1 = odds_NRS.sum(-1, keepdim=True, dtype=torch.float32)
        found_NRd = torch.bmm(odds_NRS, v_NTd[:, :end]).float().div_(sum_NR1)
        answer_BKGTd[:, :, :, start:end] = found_NRd.view(*answer_BKGTd.shape[:3], end - start, width)
        tops[:, :, start:end], sums[:, :, start:end] = (
            torch.unflatten(t, 1, (-1, end - start)) for t in (top_NR1, sum_NR1)
        )
    return answer, tops, sums


def _backward(
    query: Tensor, key: Tensor, value: Tensor, answer: Tensor, rows: list[Tensor], grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = query.shape[2:]
    held = key.shape[1]
    tops, sums = rows
    share_NGTd = _grouped(grad, held) / sums
    delta_NGT1 = (share_NGTd * _grouped(answer, held)).sum(-1, keepdim=True)
    q_NGTe = torch.cat([_grouped(query, held), _in_three(-tops)], -1)
    grad_NGTe = torch.cat([share_NGTd.bfloat16(), _in_three(-delta_NGT1)], -1)
    k_NTd = key.reshape(-1, tokens, width)
    k_NTe, v_NTe = _with_ones(k_NTd), _with_ones(value.reshape(-1, tokens, width))
    grad_q = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_q_NGTd = grad_q.view((*q_NGTe.shape[:3], width))
    grad_k, grad_v = (torch.zeros(k_NTd.shape, dtype=torch.float32, device=key.device) for _ in range(2))
    for start in range(0, tokens, TILE):
        end = min(start + TILE, tokens)
        q_NRe, grad_NRe = q_NGTe[:, :, start:end].flatten(1, 2), grad_NGTe[:, :, start:end].flatten(1, 2)
        odds_NRS = _hide_later(torch.bmm(q_NRe, k_NTe[:, :end].mT), start, end).mul_(scale).exp_()
        slope_NRS = torch.bmm(grad_NRe, v_NTe[:, :end].mT).mul_(odds_NRS).mul_(scale)
        grad_v[:, :end] += torch.bmm(odds_NRS.mT, grad_NRe[..., :width])
        grad_q_NGTd[:, :, start:end] = torch.unflatten(torch.bmm(slope_NRS, k_NTd[:, :end]), 1, (-1, end - start))
        grad_k[:, :end] += torch.bmm(slope_NRS.mT, q_NRe[..., :width])
    return grad_q, grad_k.to(key.dtype).view(key.shape), grad_v.to(value.dtype).view(value.shape)


def _grouped(tensor: Tensor, held: int) -> Tensor:
    """(B, H, T, ...) as (BK, G, T, ...)."""
    batch, heads = tensor.shape[:2]
    return tensor.reshape(batch * held, heads // held, *tensor.shape[2:])


def _with_ones(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor.new_ones(*tensor.shape[:-1], 3)], -1)


def _in_three(number: Tensor) -> Tensor:
    """A float32 number as the sum of three in bfloat16, beside each other."""
    first = number.bfloat16()
    second = (number - first.float()).bfloat16()
    third = (number - first.float() - second.float()).bfloat16()
    return torch.cat([first, second, third], -1)


def _hide_later(scores_NRS: Tensor, start: int, end: int) -> Tensor:
    """In place: keys after the query do not count. Only the last keys of a tile's row can be."""
    rows = end - start
    later = torch.ones(rows, rows, dtype=torch.bool, device=scores_NRS.device).triu(1)
    torch.unflatten(scores_NRS, 1, (-1, rows))[..., start:].masked_fill_(later, -math.inf)
    return scores_NRS
