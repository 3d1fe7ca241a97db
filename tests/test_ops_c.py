"""The unit's kernels in C: as exact as plain torch for every activation and layout, and a way on where they cannot be
compiled."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hf_geglu import ops
from hf_geglu.errors import KernelError
from hf_geglu.ops import c_kernels, choose, compiled, formulas, pointwise, reference

here = pytest.mark.skipif(
    c_kernels.why_not("cpu", torch.float32) is not None, reason=str(c_kernels.why_not("cpu", torch.float32))
)
DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = sorted(formulas.FORMULAS)


def _tensors(dtype, tokens, width, *, packed=False, spread=3.0):
    """Gate, value and the gradient of their answer; halves of one tensor, or apart."""
    generator = torch.Generator().manual_seed(tokens)
    gate, value = (spread * torch.randn(tokens, 2 * width, generator=generator)).to(dtype).chunk(2, dim=-1)
    grad = torch.randn(tokens, width, generator=generator).to(dtype)
    return (gate, value, grad) if packed else (gate.contiguous(), value.contiguous(), grad)


def _plain(tensors, activation, precision):
    leaves = [tensor.detach().to(precision).requires_grad_() for tensor in tensors[:2]]
    answer = reference.unit(*leaves, activation, 0.5)
    return [*torch.autograd.grad(answer, leaves, tensors[2].to(precision)), answer.detach()]


def _held(ours, plain, exact):
    for a, b, e in zip(ours, plain, exact, strict=True):
        error, allowed = ((each.double() - e).norm() for each in (a, b))
        assert error <= 2 * allowed + 1e-7 * e.norm()


@here
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_as_exact_as_plain_torch(activation, dtype):
    for tokens, width, packed in ((5, 33, False), (64, 48, True), (3, 9000, True), (1, 1, False)):
        tensors = _tensors(dtype, tokens, width, packed=packed)
        gate, value, grad = tensors
        plain, exact = (_plain(tensors, activation, precision) for precision in (dtype, torch.float64))
        before = [tensor.clone() for tensor in tensors]
        beside = torch.empty(tokens, width, dtype=dtype), torch.empty(tokens, width, dtype=dtype)
        pointwise.backward(gate, value, grad, activation, 0.5, beside, "c")
        hidden = pointwise.forward(gate, value, activation, 0.5, "c")
        assert hidden.is_contiguous()
        assert all(map(torch.equal, tensors, before))
        _held([*beside, hidden], plain, exact)
        pointwise.backward_(gate, value, grad, activation, 0.5, "c")
        _held(tensors, plain, exact)


@here
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_far_out_and_not_numbers_come_out_as_in_torch(activation, dtype):
    far = [1e4, -1e4, 1e30, -3e38, 1e-40, -1e-30, 0.0, -0.0, -6.0, -13.0, -20.0, 88.0, -88.0, -104.0, torch.nan]
    gate = torch.tensor([far + [torch.inf] * (activation != "gelu")]).to(dtype)  # Phi(inf) is 1 here, and NaN in torch
    found, expected = (
        unit(gate, torch.ones_like(gate), activation)
        for unit in (lambda *args: pointwise.forward(*args, 0.0, "c"), reference.unit)
    )
    assert torch.allclose(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-6, equal_nan=True)
    hidden, value = torch.full_like(gate, torch.nan), torch.ones_like(gate)
    pointwise.backward_(gate, value, hidden, activation, 0.0, "c")
    assert value.isnan().all()


@here
def test_rounding_to_16_bits_is_to_the_nearest_and_to_even():
    bits = torch.arange(0x3F80 << 16, (0x3F80 << 16) + (4 << 16), 1 << 11, dtype=torch.int32)
    numbers = bits.view(torch.float32)  # between neighbours in bfloat16, ties among them
    for factor in (1.0, -1.0):
        exact = [(number, factor) for number in numbers.tolist()]
        gate = torch.ones(1, 1, dtype=torch.bfloat16)
        found = [pointwise.forward(gate, gate * 0, "linear", a * b, "c").item() for a, b in exact]
        assert found == (numbers * factor).bfloat16().tolist()


@here
def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(c_kernels, "ENOUGH", 64)
    threads = torch.get_num_threads()
    answers = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            tensors = _tensors(torch.bfloat16, 7, 5000, packed=True)
            pointwise.backward_(*tensors, "gelu", 0.0, "c")
            answers.append(tensors)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *answers))


@here
def test_rows_may_be_further_apart_than_32_bits_count():
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # of which a few pages are touched
    tensors = [far.as_strided((3, 16), (2**30, 1), at) for at in (0, 16, 32)]
    for tensor, numbers in zip(tensors, _tensors(torch.bfloat16, 3, 16), strict=True):
        tensor.copy_(numbers)
    near = [tensor.clone() for tensor in tensors]
    for three in (tensors, near):
        pointwise.backward_(*three, "silu", 0.0, "c")
    assert all(map(torch.equal, tensors, near))


@here
def test_there_is_one_pool_of_threads():
    """Two would wait for each other's processors: a kernel with an OpenMP of its own beside torch's."""
    code = (
        "import torch; from hf_geglu.ops import pointwise; torch.set_num_threads(2); g = torch.ones(8, 9000);"
        "pointwise.forward(g, g, 'relu', 0.0, 'c'); lines = open('/proc/self/maps').read().splitlines();"
        "print(len({line.split()[-1] for line in lines if 'omp' in line.split()[-1].rpartition('/')[2]}))"
    )
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert int(answer.stdout) <= 1


@here
def test_they_run_by_themselves_and_what_does_not_fit_goes_another_way(monkeypatch):
    asked = []
    run = c_kernels._run
    monkeypatch.setattr(c_kernels, "_run", lambda which, *rest: asked.append(which) or run(which, *rest))
    form = ops.Form(activation="gelu")
    weights = [(torch.randn(*shape) / 4, None) for shape in ((33, 8), (33, 8), (8, 33))]
    x = torch.randn(5, 8, requires_grad=True)
    answer = ops.ffn(x, *weights, form=form, mode="lean")
    answer.sum().backward()
    assert asked == ["forward", "backward_in_place"]
    assert torch.allclose(answer, ops.ffn(x.detach(), *weights, form=form, mode="reference"), atol=1e-5)
    gate, value, _ = _tensors(torch.float32, 4, 6)
    other = gate.t().contiguous().t()  # columns are contiguous, rows are not
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert torch.allclose(ops.glu(other, value, "gelu"), ops.glu(gate, value, "gelu"), atol=1e-6)
    assert asked[2:] == ["forward"]
    for tensors, why in (((other, value), "rows"), ((gate.double(), value.double()), "float64")):
        with pytest.raises(KernelError, match=why):
            ops.glu(*tensors, "gelu", backend="c")


def test_without_a_c_compiler_torch_s_runs_and_one_warning_says_why(monkeypatch):
    monkeypatch.setattr(c_kernels, "_UNAVAILABLE", [])
    monkeypatch.setattr(c_kernels, "_LIBRARIES", {})
    monkeypatch.setattr(c_kernels, "_KERNELS", {})
    monkeypatch.setattr(c_kernels, "compiler", lambda: sys.executable)  # it does not understand our flags
    monkeypatch.setattr(sys, "platform", "linux")
    gate, value, _ = _tensors(torch.float32, 4, 6)
    asked = []
    monkeypatch.setattr(compiled, "_run", lambda which, *_: asked.append(which))
    with pytest.warns(RuntimeWarning, match="goes on with torch's compiler: CalledProcessError"):
        answer = ops.glu(gate, value, "gelu")
    ops.glu(gate, value, "silu")  # a second warning would be an error here
    assert asked == ["forward", "forward"]
    assert torch.allclose(answer, reference.unit(gate, value, "gelu"), atol=1e-6)
    with pytest.raises(KernelError, match="does not run in C: CalledProcessError"):
        ops.glu(gate, value, "gelu", backend="c")


def test_they_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("HF_GEGLU_NO_C", "1")
    assert "turns them off" in c_kernels.why_not("cpu", torch.float32)
    monkeypatch.delenv("HF_GEGLU_NO_C")
    monkeypatch.setattr(c_kernels, "compiler", lambda: None)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "no C compiler" in c_kernels.why_not("cpu", torch.bfloat16)
    assert "float16" in c_kernels.why_not("cpu", torch.float16)
    assert "cuda" in c_kernels.why_not("cuda", torch.float32)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in c_kernels.why_not("cpu", torch.float32)


def test_smaller_blocks_are_worth_it_where_a_call_is_cheap(monkeypatch):
    call = choose.Call(
        tokens=512, width=3072, dtype=torch.bfloat16, device_type="cpu", activation="gelu", differentiated=True
    )
    monkeypatch.setattr(compiled, "why_not", lambda _: None)
    for why, expected in ((None, "lean"), ("no C compiler", "reference")):
        monkeypatch.setattr(c_kernels, "why_not", lambda *_, why=why: why)
        assert choose.choose(call) == expected
        assert choose.choose(replace(call, tokens=128)) == "reference"
        assert choose.choose(replace(call, tokens=1024)) == "lean"
        assert choose.choose(replace(call, differentiated=False)) == "reference"
