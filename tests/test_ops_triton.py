"""Triton's kernels, through Triton's interpreter: no GPU needed, only `pip install triton`.

The interpreter is chosen before a kernel is made, hence a process of its own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs `pip install triton`")

JOB = """
import itertools, torch
from hf_geglu import ops
from hf_geglu.ops import eager, formulas, triton_kernels

assert triton_kernels.BLOCK == 1024
T, F = 3, 1030  # two programs a token, the second nearly empty
worst = 0.0
for activation, dtype, layout in itertools.product(
    sorted(formulas.FORMULAS), (torch.float32, torch.bfloat16, torch.float16), ("packed", "interleaved")
):
    generator = torch.Generator().manual_seed(0)
    packed, grad = (torch.randn(T, n, generator=generator).to(dtype) for n in (2 * F, F))
    form = ops.Form(activation=activation, layout=layout)
    gate, value = ops.split(packed, form)  # strided
    offset = 0.5

    def close(a, b):
        assert a.dtype == b.dtype == dtype
        assert torch.allclose(a.float(), b.float(), rtol=2 * torch.finfo(dtype).eps, atol=2e-6), (activation, dtype)

    close(triton_kernels.forward(gate, value, activation, offset), eager.forward(gate, value, activation, offset))

    found, expected = [(torch.empty_like(grad), torch.empty_like(grad)) for _ in range(2)]
    triton_kernels.backward(gate, value, grad, activation, offset, found)
    eager.backward(gate, value, grad, activation, offset, expected)
    [close(a, b) for a, b in zip(found, expected)]

    (p1, h1), (p2, h2) = [(packed.clone(), grad.clone()) for _ in range(2)]
    triton_kernels.backward_(*ops.split(p1, form), h1, activation, offset)
    eager.backward_(*ops.split(p2, form), h2, activation, offset)
    close(p1, p2), close(h1, h2)

# more elements than 32 bits count: rows so far apart that only a few pages of memory are ever touched
far = torch.empty(2 ** 31 + 64, dtype=torch.bfloat16)
gate, value, grad = (far.as_strided((3, 16), (2 ** 30, 1), at) for at in (0, 16, 32))
for tensor in (gate, value, grad):
    tensor.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
near = [tensor.clone() for tensor in (gate, value, grad)]
triton_kernels.backward_(gate, value, grad, "silu", 0.0)
eager.backward_(*near, "silu", 0.0)
assert all(torch.allclose(a, b, rtol=2e-2) for a, b in zip((gate, value, grad), near))

# behind the public function too, differentiated
a, b = [torch.randn(2, 3, 5, requires_grad=True) for _ in range(2)]
units = [ops.glu(a, b, "gelu", backend=name) for name in ("triton", "eager")]
answers = [torch.autograd.grad(unit.square().sum(), (a, b)) for unit in units]
assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(*answers))
print("equal")
"""


def test_kernels_equal_plain_torch():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "equal", result.stderr[-3000:]


BESIDE_LIGER = """
import torch, triton, triton.language as tl
import liger_kernel.ops.geglu as liger
from hf_geglu import ops

@triton.jit
def tanh(x):  # the interpreter knows no CUDA libraries; the rest of the kernels is Liger's own
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0

liger.tanh = tanh
gate, value, grad = [torch.randn(3, 1030, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

def run(unit, dtype):
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (gate, value)]
    answer = unit(*[1.0 * leaf for leaf in leaves])  # Liger writes gradients over its inputs
    return [answer.detach(), *torch.autograd.grad(answer, leaves, grad.to(dtype, copy=True))]

theirs = run(liger.LigerGELUMulFunction.apply, torch.float32)
ours = run(lambda g, v: ops.glu(g, v, "gelu_pytorch_tanh", backend="triton"), torch.float32)
exact = run(lambda g, v: torch.nn.functional.gelu(g, approximate="tanh") * v, torch.float64)
for a, b, e in zip(ours, theirs, exact):
    assert torch.allclose(a, b, rtol=1e-6, atol=2e-6)
    assert (a - e).norm() <= 1.2 * (b - e).norm()
print("equal")
"""


def test_kernels_equal_those_of_liger():
    """The tanh form in float32, which is what of Liger's GEGLU the interpreter can run: its bfloat16 product cannot."""
    pytest.importorskip("liger_kernel", reason="needs `pip install liger-kernel`")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", BESIDE_LIGER], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "equal", result.stderr[-3000:]


def test_without_gpu_or_interpreter_the_name_is_refused():
    import torch

    from hf_geglu import ops
    from hf_geglu.errors import KernelError

    with pytest.raises(KernelError, match="do not run on cpu; expected a machine"):
        ops.glu(torch.randn(2, 2), torch.randn(2, 2), "gelu", backend="triton")
