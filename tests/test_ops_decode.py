"""A block through packed weights against plain torch: every layout and dtype, long rows, and the reasons why not."""

import itertools

import pytest
import torch

from hf_geglu import ops
from hf_geglu.ops import decode, formulas, reference
from hf_geglu.ops.block import Weights

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if decode.why_not(dtype) is None]
LAYOUTS = [("separate", "first"), ("packed", "first"), ("packed", "last"), ("interleaved", "first")]

packs = pytest.mark.skipif(not DTYPES, reason="oneDNN packs nothing here")


def _weights(form, dtype, *, bias, d, f):
    generator = torch.Generator().manual_seed(0)

    def projection(outputs, inputs):
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        weight = weight.t().contiguous() if form.transposed else weight
        return weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype) if bias else None

    if form.layout == "separate":
        return Weights(projection(f, d), projection(f, d), projection(d, f))
    return Weights(None, projection(2 * f, d), projection(d, f))


def _plain(x, weights, form, dtype):
    wide = Weights.of(tuple(None if tensor is None else tensor.to(dtype) for tensor in weights.flat()))
    return reference.block(x.to(dtype), wide.gate, wide.up, wide.down, form)


def _held(x, weights, form):
    """Not more than twice the error of plain torch."""
    exact = _plain(x, weights, form, torch.float64)
    found, plain = decode.run(x, decode.pack(weights, form)), _plain(x, weights, form, x.dtype)
    assert found.dtype == x.dtype
    error, allowed = ((answer.double() - exact).norm() for answer in (found, plain))
    assert error <= 2 * allowed + 2e-7 * exact.norm(), (float(error / allowed), form)


@packs
@pytest.mark.parametrize(("layout", "half"), LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_plain_torch(layout, half, transposed, dtype):
    if dtype not in DTYPES:
        pytest.skip(decode.why_not(dtype))
    for activation, bias, tokens in itertools.product(formulas.FORMULAS, [True, False], [1, 3, 8]):
        form = ops.Form(activation=activation, layout=layout, gate_half=half, transposed=transposed, offset=0.5 * bias)
        weights = _weights(form, dtype, bias=bias, d=40, f=72)
        x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
        _held(x, weights, form)


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, decode.MOST_TOKENS])
def test_long_rows_are_summed_in_pieces(tokens, bias):
    """One after the other, 2500 inputs have more than twice the error that plain torch has."""
    form = ops.Form(activation="gelu")
    weights = _weights(form, DTYPES[0], bias=bias, d=96, f=2500)
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1)).to(DTYPES[0])
    packed = decode.pack(weights, form)
    assert packed.branches.widths == (96,)
    if DTYPES[0] == torch.float32:
        assert packed.down.widths == (896, 896, 708)
    _held(x, weights, form)


@packs
def test_a_packed_copy_takes_what_is_said():
    form = ops.Form(activation="gelu")
    for dtype in DTYPES:
        weights = _weights(form, dtype, bias=True, d=1280, f=128)
        packed = decode.pack(weights, form)
        parts = (*packed.branches.pieces, *packed.down.pieces)
        biases = sum(p.bias.numel() * dtype.itemsize for p in (packed.branches, packed.down))
        taken = sum(torch.ops.mkldnn._nbytes(piece) for piece in parts) + biases
        assert taken == decode.bytes_of(weights) == dtype.itemsize * (3 * 1280 * 128 + 2 * 128 + 1280)


def test_what_cannot_be_packed_has_a_reason(monkeypatch):
    form = ops.Form(activation="gelu")
    assert "float16 are not packed" in decode.packable(_weights(form, torch.float16, bias=False, d=8, f=8))
    assert "float64 are not packed" in decode.packable(_weights(form, torch.float64, bias=False, d=8, f=8))
    meta = Weights(None, (torch.empty(4, 2, device="meta"), None), (torch.empty(2, 2, device="meta"), None))
    assert "its weights are on meta" in decode.packable(meta)
    turned = Weights(None, (torch.empty(2, 4).t(), None), (torch.empty(2, 2), None))
    assert "not contiguous" in decode.packable(turned)
    with torch.inference_mode():
        made = Weights(None, (torch.empty(4, 2), None), (torch.empty(2, 2), None))
    assert "inference tensors" in decode.packable(made)
    gate, up, down = (torch.empty(4, 2), torch.empty(4)), (torch.empty(4, 2), None), (torch.empty(2, 4), None)
    assert "only one of its two branches" in decode.packable(Weights(gate, up, down))

    why_not = decode.why_not.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert "no oneDNN, or it is turned off" in why_not(torch.float32)
    monkeypatch.setattr(decode, "_multiplies_bfloat16", lambda: False)
    assert "does not multiply bfloat16" in why_not(torch.bfloat16)

    def gone(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(decode.PackedProjection, "of", gone)
    assert "does not pack: AttributeError: no such operator" in why_not(torch.float32)


def test_an_operator_that_answers_wrongly_is_not_relied_on(monkeypatch):
    monkeypatch.setattr(decode.PackedProjection, "times", lambda self, x: torch.zeros(2, 64))
    assert "does not come out right" in decode.why_not.__wrapped__(torch.float32)
