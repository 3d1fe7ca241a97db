"""The unit's compiled kernels. Few of them, since each has to be compiled (torch keeps them on disk between runs)."""

import shutil

import pytest
import torch

from hf_geglu import ops
from hf_geglu.ops import compiled, pointwise, reference

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


def _tensors(dtype, tokens, width, *, packed):
    generator = torch.Generator().manual_seed(tokens)
    if packed:
        both = torch.randn(tokens, 2 * width, generator=generator).to(dtype)
        gate, value = both.chunk(2, dim=-1)
    else:
        gate, value = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
    return gate, value, torch.randn(tokens, width, generator=generator).to(dtype)


def _held(ours, plain, exact):
    for a, b, e in zip(ours, plain, exact, strict=True):
        error, allowed = ((each.double() - e).norm() for each in (a, b))
        assert error <= 2 * allowed + 2e-7 * e.norm()


@pytest.mark.parametrize(
    ("activation", "dtype", "packed"),
    [
        ("gelu", torch.bfloat16, False),
        ("gelu", torch.float32, True),
        ("gelu_pytorch_tanh", torch.float32, False),
        ("silu", torch.bfloat16, True),
    ],
)
def test_kernels_are_as_exact_as_plain_torch(activation, dtype, packed):
    for tokens, width in ((5, 33), (64, 48)):
        gate, value, grad = _tensors(dtype, tokens, width, packed=packed)

        def plain(precision, given=(gate, value, grad)):
            leaves = [tensor.detach().to(precision).requires_grad_() for tensor in given[:2]]
            answer = reference.unit(*leaves, activation, 0.5)
            return [*torch.autograd.grad(answer, leaves, given[2].to(precision)), answer.detach()]

        exact, torch_s = plain(torch.float64), plain(dtype)
        answer = pointwise.forward(gate, value, activation, 0.5, "compiled")
        assert answer.is_contiguous()
        pointwise.backward_(gate, value, grad, activation, 0.5, "compiled")
        _held((gate, value, grad), torch_s, exact)
        _held([answer], torch_s[2:], exact[2:])
    assert compiled.why_not("cpu") is None


def test_gradients_beside_leave_everything_else_alone():
    gate, value, grad = _tensors(torch.float32, 6, 16, packed=True)
    before = [tensor.clone() for tensor in (gate, value, grad)]
    out = torch.empty_like(gate), torch.empty_like(gate)
    pointwise.backward(gate, value, grad, "gelu", 0.0, out, "compiled")
    expected = torch.empty_like(gate), torch.empty_like(gate)
    pointwise.backward(gate, value, grad, "gelu", 0.0, expected, "eager")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(out, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((gate, value, grad), before, strict=True))


def test_one_kernel_serves_every_number_of_tokens():
    kernel = compiled._kernel.cache_info().currsize
    from torch._dynamo.utils import counters

    pointwise.forward(*_tensors(torch.bfloat16, 8, 24, packed=False)[:2], "gelu", 0.5, "compiled")
    kernels, graphs = compiled._kernel.cache_info().currsize, counters["stats"]["unique_graphs"]
    for tokens, width in ((9, 24), (300, 24), (17, 31)):
        pointwise.forward(*_tensors(torch.bfloat16, tokens, width, packed=False)[:2], "gelu", 0.5, "compiled")
    assert compiled._kernel.cache_info().currsize == kernels >= kernel
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_block_in_auto_mode_runs_by_compiled_kernels(monkeypatch):
    from hf_geglu.ops import choose

    monkeypatch.setenv("HF_GEGLU_NO_C", "1")
    monkeypatch.setattr(choose, "ENOUGH_BY_TORCH_S_COMPILER", 0)
    monkeypatch.setattr(choose, "ENOUGH_ELEMENTS", 0)
    asked = []
    run = compiled._run
    monkeypatch.setattr(compiled, "_run", lambda which, *rest: asked.append(which) or run(which, *rest))
    form = ops.Form(activation="gelu")
    weights = [(torch.randn(*shape) / 4, None) for shape in ((33, 8), (33, 8), (8, 33))]
    x = torch.randn(5, 8, requires_grad=True)
    answer = ops.ffn(x, *weights, form=form)
    answer.sum().backward()
    assert asked == ["forward", "backward_"]
    expected = ops.ffn(x.detach(), *weights, form=form, mode="reference")
    assert torch.allclose(answer, expected, atol=1e-5)
