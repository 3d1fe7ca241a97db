"""RMS norm: equal to transformers', no less accurate, and x alone kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_geglu.ops import norm
from hf_geglu.ops.norm import plain_rms_norm, rms_norm

EPS = 1e-5


@pytest.fixture(params=["compiled", "plain"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(norm, "_PLAIN", {"forward", "backward"})


def results(function: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2))
    weight = (1.0 + 0.3 * torch.randn(shape[-1], dtype=torch.float64, generator=generator)).to(dtype)
    if function is None:
        x, grad, weight, function = x.double(), grad.double(), weight.double(), plain_rms_norm
    x, weight = (3.0 * x).requires_grad_(), weight.requires_grad_()
    y = function(x, weight, EPS)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    module = LlamaRMSNorm(x.shape[-1], eps=eps)
    return torch.func.functional_call(module, {"weight": weight}, (x,))


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("shape", [(2, 9, 40), (33, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_accurate_than_transformers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    truth, theirs, own = (results(function, dtype, shape) for function in (None, llama, rms_norm))
    for exact, other, found in zip(truth, theirs, own, strict=True):
        assert found.dtype == other.dtype == dtype
        error, allowed = ((t.double() - exact).norm() for t in (found, other))
        assert error <= 2 * allowed + 1e-6 * exact.norm()
    if dtype == torch.float64:
        torch.testing.assert_close(own, truth, rtol=1e-12, atol=1e-12)


def test_only_x_is_kept() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, weight = torch.randn(64, 48).bfloat16().requires_grad_(), torch.ones(48).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rms_norm(x, weight, EPS)
    assert sum(kept.values()) == 64 * 48 * 2 + 48 * 2 + 64 * 4  # x, the weight, and a number a token


def test_derivatives_of_any_order() -> None:
    x, weight = torch.randn(3, 8).double().requires_grad_(), torch.randn(8).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: rms_norm(a, b, EPS), (x, weight))


def test_frozen_and_empty() -> None:
    x, weight = torch.randn(3, 8).requires_grad_(), torch.randn(8)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert rms_norm(x[:0], weight, EPS).shape == (0, 8)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so once, and the results are those of the formula."""
    monkeypatch.setattr(norm, "_PLAIN", set())
    norm._kernel.cache_clear()

    def broken(*args: Any, **kwargs: Any) -> Any:
        def fail(*args: Any) -> Any:
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    try:
        with pytest.warns(RuntimeWarning, match="no compiler here"):
            first = results(rms_norm, torch.float32, (5, 8))
        torch.testing.assert_close(first, results(plain_rms_norm, torch.float32, (5, 8)))
    finally:
        norm._kernel.cache_clear()
