"""The kernels against plain torch: every implementation, layout, activation and dtype; what they keep, and how they
behave inside autograd. torch's compiler does nothing here (`test_ops_compiled.py` has it run)."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_geglu import functional, ops
from hf_geglu.errors import KernelError
from hf_geglu.ops import block, choose, compiled, decode, eager, formulas, onednn, products, reference

D, F, T = 12, 20, 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = sorted(formulas.FORMULAS)
LAYOUTS = [("separate", "first"), ("packed", "first"), ("packed", "last"), ("interleaved", "first")]


def _weights(form, dtype, *, bias=True, d=D, f=F, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def projection(outputs, inputs):
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        weight = weight.t().contiguous() if form.transposed else weight
        return (weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype) if bias else None)

    if form.layout == "separate":
        return projection(f, d), projection(f, d), projection(d, f)
    return None, projection(2 * f, d), projection(d, f)


def _leaves(x, weights, dtype):
    """Copies that gradients can be taken of, in another precision."""
    flat = [x, *(tensor for each in weights for tensor in (each or (None, None)))]
    copies = [None if tensor is None else tensor.to(dtype).requires_grad_() for tensor in flat]
    x, *rest = copies
    pairs = [(rest[at], rest[at + 1]) for at in (0, 2, 4)]
    return x, [None if pair[0] is None else pair for pair in pairs], [leaf for leaf in copies if leaf is not None]


def _run(x, weights, form, dtype, **how):
    """Answer and all gradients, for the same answer's gradient."""
    x, projections, leaves = _leaves(x, weights, dtype)
    answer = ops.ffn(x, *projections, form=form, **how)
    grad = torch.randn(answer.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)
    return [answer.detach(), *torch.autograd.grad(answer, leaves, grad.to(dtype))]


def _errors(answers, exact):
    return [((a.double() - e).norm() / e.norm().clamp_min(1e-30)).item() for a, e in zip(answers, exact, strict=True)]


def _held(fast, plain, exact):
    """Not more than twice the error of plain torch, by construction of both."""
    for ours, theirs in zip(_errors(fast, exact), _errors(plain, exact), strict=True):
        assert ours <= 2 * theirs + 1e-7, (ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formulas_and_their_derivatives_are_those_of_the_library(activation):
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    expected = functional.activation(activation)(z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    for one_exponential, bound in ((False, 1e-12), (True, 2e-7 if activation == "gelu" else 1e-12)):
        value, derivative = formulas.formula(activation, one_exponential=one_exponential)(z.detach())
        assert (value - expected).abs().max() <= 12 * bound
        assert (derivative - slope).abs()[z.detach() != 0].max() <= 12 * bound
    wide = torch.tensor([-1e4, 1e4])
    assert torch.isfinite(torch.stack(formulas.formula(activation)(wide))).all()


@pytest.mark.parametrize(("layout", "half"), LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["lean", "tiled"])
def test_a_block_is_as_exact_as_plain_torch(monkeypatch, layout, half, transposed, dtype, mode):
    monkeypatch.setattr(block, "LEAST", 1)  # so that the tiled block has its 8 tiles
    for activation, bias in itertools.product(ACTIVATIONS, [True, False]):
        form = ops.Form(activation=activation, layout=layout, gate_half=half, transposed=transposed, offset=0.5 * bias)
        weights = _weights(form, dtype, bias=bias)
        x = torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(1)).to(dtype)
        exact = _run(x, weights, form, torch.float64, mode="reference")
        plain = _run(x, weights, form, dtype, mode="reference")
        _held(_run(x, weights, form, dtype, mode=mode, backend="eager"), plain, exact)


@pytest.mark.parametrize("mode", ["reference", "lean", "tiled"])
def test_a_block_is_the_formula(mode):
    form = ops.Form(activation="gelu")
    gate, up, down = _weights(form, torch.float64)
    x = torch.randn(3, 4, D, dtype=torch.float64)
    expected = functional.ffn(x, gate, up, down, "gelu")
    assert torch.allclose(ops.ffn(x, gate, up, down, form=form, mode=mode, backend="eager"), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_unit_alone(dtype, activation):
    gate, value, grad = (torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2, 3))
    form = ops.Form(activation=activation, layout="packed", gate_half="last", offset=0.25)

    def run(unit, dtype):
        leaves = [gate.to(dtype).requires_grad_(), value.to(dtype).requires_grad_()]
        answer = unit(*leaves)
        return [answer.detach(), *torch.autograd.grad(answer, leaves, grad.to(dtype))]

    exact = run(lambda g, v: reference.unit(g, v, activation, 0.25), torch.float64)
    plain = run(lambda g, v: reference.unit(g, v, activation, 0.25), dtype)
    _held(run(lambda g, v: ops.glu(g, v, activation, offset=0.25, backend="eager"), dtype), plain, exact)
    packed = run(lambda g, v: ops.packed_glu(torch.cat([v, g], -1), form, backend="eager"), dtype)
    _held(packed, plain, exact)


def test_any_strides_and_any_number_of_tokens():
    form = ops.Form(activation="gelu")
    weights = _weights(form, torch.float64)
    x = torch.randn(D, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    assert not x.is_contiguous()
    for mode in ("lean", "tiled"):
        for given in (x, x[:, ::2], x[:1, :1], x[0], x[:, :0], x[:0]):
            expected = _run(given, weights, form, torch.float64, mode="reference")
            answers = _run(given, weights, form, torch.float64, mode=mode, backend="eager")
            assert all(torch.allclose(a, e, atol=1e-12) for a, e in zip(answers, expected, strict=True))


class _Saved:
    """Elements saved for a backward pass, weights not counted, each storage once."""

    def __init__(self, weights):
        self.known = {tensor.data_ptr() for each in weights if each for tensor in each if tensor is not None}
        self.elements = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        return self.hooks.__enter__() or self

    def _pack(self, tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.known:
            self.known.add(pointer)
            self.elements += tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("layout", ["separate", "packed"])
@pytest.mark.parametrize(("mode", "units"), [("lean", 2), ("tiled", 0), ("reference", 4)])
def test_what_is_saved(layout, mode, units):
    form = ops.Form(activation="gelu", layout=layout)
    x, projections, _ = _leaves(torch.randn(T, D), _weights(form, torch.float32, bias=False), torch.float32)
    with _Saved(projections) as saved:
        ops.ffn(x, *projections, form=form, mode=mode, backend="eager")
    if mode == "reference":
        assert saved.elements >= units * T * F + T * D
    else:
        assert saved.elements == units * T * F + T * D


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self, *present):
        super().__init__()
        self.live = self.peak = 0
        self.present = present
        self.known = {tensor.untyped_storage()._cdata for tensor in present}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self._made(storage, storage._cdata, storage.nbytes())
        return result

    def _made(self, storage, key, size):
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize(("mode", "most"), [("tiled", 1.6), ("lean", 3.6)])
def test_peak_of_forward_and_backward(monkeypatch, mode, most):
    """In units of tokens x intermediate: input, gradients and everything in between, weights not counted, nor the
    answer, which nobody keeps. Shapes in the proportions of 8192 tokens, 768 and 3072."""
    d, f, t = 384, 1536, 4096
    monkeypatch.setattr(eager, "PIECE", 1 << 13)  # in proportion too
    products.copies_pay("cpu", torch.bfloat16)  # its measurement is made once, and not here
    form = ops.Form(activation="gelu")
    weights = _weights(form, torch.bfloat16, bias=False, d=d, f=f)
    _, projections, leaves = _leaves(torch.zeros(1, d), weights, torch.bfloat16)
    noise = torch.randn(t, d).to(torch.bfloat16)
    with _Peak(noise, *leaves) as peak:
        x = torch.randn(t, d, dtype=torch.bfloat16, requires_grad=True)
        (ops.ffn(x, *projections, form=form, mode=mode, backend="eager") * noise).sum().backward()
    assert all(leaf.grad is not None for leaf in (x, *leaves[1:]))
    assert peak.peak / (2 * t * f) <= most


def test_frozen_weights_get_no_products(monkeypatch):
    asked = []
    add = block.Sums.add_product
    monkeypatch.setattr(
        block.Sums, "add_product", lambda self, name, *a, **k: asked.append(name) or add(self, name, *a, **k)
    )
    form = ops.Form(activation="gelu")
    x, (gate, up, down), _ = _leaves(torch.randn(T, D), _weights(form, torch.float64), torch.float64)
    for tensor in (*gate, *up, down[1]):
        tensor.requires_grad_(False)
    answer = ops.ffn(x, gate, up, down, form=form, mode="lean", backend="eager")
    answer.sum().backward()
    assert asked == ["down"]
    assert gate[0].grad is None
    assert x.grad is not None
    assert down[0].grad is not None


@pytest.mark.parametrize("mode", ["lean", "tiled"])
def test_a_kept_graph_runs_twice(mode):
    form = ops.Form(activation="gelu", layout="packed")
    x, projections, leaves = _leaves(torch.randn(T, D), _weights(form, torch.float64), torch.float64)
    answer = ops.ffn(x, *projections, form=form, mode=mode, backend="eager").square().sum()
    first = torch.autograd.grad(answer, leaves, retain_graph=True)
    second = torch.autograd.grad(answer, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", ["lean", "tiled"])
@pytest.mark.parametrize("layout", ["separate", "packed"])
def test_gradients_of_gradients(mode, layout):
    form = ops.Form(activation="gelu", layout=layout)
    weights = _weights(form, torch.float64, d=3, f=4)
    _, _, leaves = _leaves(torch.randn(2, 3), weights, torch.float64)

    def run(x, *flat):
        gate = (flat[0], flat[1]) if layout == "separate" else None
        return ops.ffn(x, gate, flat[-4:-2], flat[-2:], form=form, mode=mode, backend="eager")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_gradients_of_gradients_of_the_unit():
    leaves = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradgradcheck(lambda g, v: ops.glu(g, v, "silu", backend="eager"), leaves)


@pytest.mark.parametrize("mode", ["lean", "tiled"])
def test_dropout_draws_what_the_module_would(mode):
    form = ops.Form(activation="gelu")
    x, (gate, up, down), leaves = _leaves(torch.randn(T, D), _weights(form, torch.float64), torch.float64)

    def composed():
        hidden = reference.unit(torch.nn.functional.linear(x, *gate), torch.nn.functional.linear(x, *up), "gelu")
        return torch.nn.functional.linear(torch.nn.Dropout(0.3)(hidden), *down)

    def fused():
        return ops.ffn(x, gate, up, down, form=form, dropout=0.3, mode=mode, backend="eager")

    answers = []
    for run in (composed, fused):
        torch.manual_seed(3)
        answer = run()
        after = torch.rand(3)  # the generator has moved by as much
        answers.append([answer.detach(), *torch.autograd.grad(answer.square().sum(), leaves), after])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*answers, strict=True))


@pytest.mark.parametrize("mode", ["lean", "tiled"])
def test_autocast_computes_in_its_type(mode):
    form = ops.Form(activation="gelu")
    x, projections, leaves = _leaves(torch.randn(T, D), _weights(form, torch.float32), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = ops.ffn(x, *projections, form=form, mode=mode, backend="eager")
        plain = ops.ffn(x, *projections, form=form, mode="reference")
    assert answer.dtype == plain.dtype == torch.bfloat16
    found = torch.autograd.grad(answer.float().sum(), leaves)
    expected = torch.autograd.grad(plain.float().sum(), leaves)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    assert all((a - b).norm() <= 0.02 * b.norm() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    form = ops.Form(activation="gelu")
    x, projections, leaves = _leaves(torch.randn(T, D), _weights(form, torch.float64), torch.float64)

    def run(x):
        return ops.ffn(x, *projections, form=form, dropout=0.2, mode="lean", backend="eager")

    found = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        for leaf in leaves:
            leaf.grad = None
        call(x).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("layout", ["separate", "packed"])
@pytest.mark.parametrize("mode", ["lean", "tiled"])
def test_custom_operators_are_sound(monkeypatch, layout, mode):
    """Schema, fake implementation and autograd registration, as torch itself checks them."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    form = ops.Form(activation="gelu", layout=layout)
    x, projections, _ = _leaves(torch.randn(T, D), _weights(form, torch.float64), torch.float64)
    flat = block.Weights(*projections).flat()
    settings = ("gelu", layout, "first", False, 0.0, mode == "tiled")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_geglu.block.default, (x, *flat, *settings), test_utils=checks)


@pytest.mark.parametrize("mode", ["lean", "tiled"])
def test_the_compiler_takes_the_block_whole(monkeypatch, mode):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # read by us only: the unit inside is not compiled again
    form = ops.Form(activation="gelu", layout="packed")
    x, projections, leaves = _leaves(torch.randn(2, T, D), _weights(form, torch.float64), torch.float64)

    def run(x):
        return 2 * ops.ffn(x, *projections, form=form, mode=mode)

    traced = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    expected = run(x)
    assert torch.allclose(traced, expected, atol=1e-12)
    found = torch.autograd.grad(traced.square().sum(), leaves)
    assert all(
        torch.allclose(a, b, atol=1e-10)
        for a, b in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True)
    )


def _ffn(**changes):
    form = ops.Form(activation="gelu")
    gate, up, down = _weights(form, torch.float32)
    given = {"x": torch.randn(T, D), "gate": gate, "up": up, "down": down, "form": form, **changes}
    return ops.ffn(given.pop("x"), given.pop("gate"), given.pop("up"), given.pop("down"), **given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "fast"}, "unknown mode 'fast'; expected one of: auto"),
        ({"form": ops.Form(activation="mish")}, "no kernel for the activation 'mish'; expected one of: gelu"),
        ({"gate": None}, "there is no gate; expected gate=None for packed"),
        ({"x": torch.randn(T, D + 1)}, "x has 13 features"),
        ({"down": (torch.randn(D, F + 1), None)}, "do not fit together: 21 neurons"),
        ({"x": torch.randn(T, D, dtype=torch.float64)}, "different dtypes"),
    ],
)
def test_what_does_not_fit_is_refused(changes, says):
    with pytest.raises(KernelError, match=says):
        _ffn(**changes)


def test_a_unit_refuses_what_does_not_fit():
    with pytest.raises(KernelError, match="gate and value differ"):
        ops.glu(torch.randn(3), torch.randn(4), "gelu")
    with pytest.raises(KernelError, match="this one has 5"):
        ops.packed_glu(torch.randn(2, 5), ops.Form(activation="gelu", layout="packed"))
    with pytest.raises(KernelError, match="unknown backend"):
        ops.glu(torch.randn(2, 4), torch.randn(2, 4), "gelu", backend="cuda")


def test_without_a_compiler_it_goes_on_and_says_why_once(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no g++ here")

    monkeypatch.setenv("HF_GEGLU_NO_C", "1")
    monkeypatch.setattr(compiled, "_UNAVAILABLE", {})
    monkeypatch.setattr(compiled, "_kernel", lambda *_: broken)
    gate, value = torch.randn(4, 6), torch.randn(4, 6)
    with pytest.warns(RuntimeWarning, match="goes on without.*no g\\+\\+ here"):
        answer = ops.glu(gate, value, "gelu")
    ops.glu(gate, value, "silu")  # a second warning would be an error here
    assert torch.allclose(answer, reference.unit(gate, value, "gelu"), atol=1e-6)
    with pytest.raises(KernelError, match="cannot be compiled: RuntimeError: no g"):
        ops.glu(gate, value, "gelu", backend="compiled")


@pytest.mark.parametrize("layout", ["separate", "packed"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["lean", "tiled"])
def test_products_by_onednn_are_as_exact(monkeypatch, layout, transposed, mode):
    """Sums longer than oneDNN makes at once, over inputs, neurons and tokens."""
    if decode.why_not(torch.float32) is not None:
        pytest.skip(decode.why_not(torch.float32))
    monkeypatch.setattr(onednn, "pays", lambda: True)
    monkeypatch.setattr(onednn, "ENOUGH", 0)
    monkeypatch.setattr(onednn, "ROWS", 0)
    asked = []
    times = onednn.times
    monkeypatch.setattr(onednn, "times", lambda *tensors: asked.append(tensors[0].shape[1]) or times(*tensors))
    form = ops.Form(activation="gelu", layout=layout, transposed=transposed)
    weights = _weights(form, torch.float32, d=24, f=1100)
    x = torch.randn(1, 1100, 24, generator=torch.Generator().manual_seed(1))
    exact = _run(x, weights, form, torch.float64, mode="reference")
    plain = _run(x, weights, form, torch.float32, mode="reference")
    assert not asked
    _held(_run(x, weights, form, torch.float32, mode=mode, backend="eager"), plain, exact)
    projections = 3 if layout == "separate" else 2
    assert len(asked) == {"lean": 3 * projections, "tiled": 8 * (4 * projections - 1)}[mode]


def test_float32_blocks_run_where_their_products_are_quicker(monkeypatch):
    call = choose.Call(
        tokens=512, width=1024, dtype=torch.float32, device_type="cpu", activation="gelu", differentiated=False
    )
    found = {}
    for pays in (False, True):
        monkeypatch.setattr(onednn, "pays", lambda pays=pays: pays)
        found[pays] = choose.choose(call)
        assert choose.choose(replace(call, dtype=torch.bfloat16)) == "reference"
        assert choose.choose(replace(call, tokens=8)) == "reference"
    assert found == {False: "reference", True: "lean"}
