"""Causal attention by large products: no less accurate than torch's kernel, whatever the size of the scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_geglu.ops.attention import better_than_torch, causal_attention, plain_causal_attention


def parts(heads: int, held: int, tokens: int, width: int, size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(count: int) -> Tensor:  # as models have them: (B, T, H, d) seen as (B, H, T, d)
        return torch.randn(2, tokens, count, width, generator=generator).bfloat16().transpose(1, 2)

    return [size * normal(heads), size * normal(held), normal(held), normal(heads)]


def results(function: Any, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    answer = function(q, k, v)
    return [answer.detach(), *torch.autograd.grad(answer, (q, k, v), grad)]


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0], ids=lambda size: f"size {size:g}")
@pytest.mark.parametrize(
    ("heads", "held", "tokens", "width"), [(6, 2, 200, 64), (2, 2, 128, 64), (4, 1, 300, 40)], ids=str
)
def test_no_less_accurate_than_torch(heads: int, held: int, tokens: int, width: int, size: float) -> None:
    own = parts(heads, held, tokens, width, size)
    exact = results(lambda q, k, v: plain_causal_attention(q, k, v, width**-0.5), *(t.double() for t in own))
    torch_s = results(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), *own)
    for truth, other, found in zip(exact, torch_s, results(causal_attention, *own), strict=True):
        assert found.dtype == torch.bfloat16
        assert found.shape == truth.shape
        error, allowed = ((t.double() - truth).norm() for t in (found, other))
        assert error <= 2 * allowed, float(error / allowed)


def test_no_token_sees_a_later_one() -> None:
    q, k, v, _ = parts(2, 1, 160, 16, 1.0)
    before = causal_attention(q, k, v)
    k, v = k.clone(), v.clone()
    k[:, :, 150:], v[:, :, 150:] = 9.0, 9.0
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :, :150], after[:, :, :150])
    assert not torch.equal(before[:, :, 150:], after[:, :, 150:])


def test_a_second_derivative_is_that_of_the_formula() -> None:
    q, k, v, grad = (t.float() for t in parts(2, 1, 130, 8, 1.0))
    q = q.bfloat16().requires_grad_()
    answer = causal_attention(q, k.bfloat16(), v.bfloat16())
    (first,) = torch.autograd.grad(answer, q, grad.bfloat16(), create_graph=True)
    assert first.requires_grad
    (second,) = torch.autograd.grad(first.float().square().sum(), q)
    assert bool(second.isfinite().all())
    assert float(second.float().norm()) > 0


def test_only_where_it_was_measured() -> None:
    q, k, v, _ = parts(4, 2, 160, 64, 1.0)
    assert not better_than_torch(q.float(), k.float(), v.float())
    assert not better_than_torch(q[:, :, :1], k, v)  # decoding
    assert not better_than_torch(q[:, :, :64], k[:, :, :64], v[:, :, :64])
    assert better_than_torch(q, k, v) == better_than_torch(q.clone(), k, v)
