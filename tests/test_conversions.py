"""Conversions are identities, or approximations within the bound they state."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_geglu.conversions import SCALINGS, expand, find_scaling, retarget
from hf_geglu.conversions.precision import product, rounded, scaled
from hf_geglu.conversions.scaling import LOGISTIC, SHARPNESS
from hf_geglu.errors import ConversionError, WeightsError
from hf_geglu.functional import activation, split_packed

ROWS = list(SCALINGS.values())
ids = [f"{row.source}-{row.gate}" for row in ROWS]


@pytest.fixture(scope="module")
def grid():
    return torch.linspace(-60, 60, 4_000_001, dtype=torch.float64)


@pytest.fixture(scope="module")
def normal():
    return torch.linspace(-9, 9, 1_000_001, dtype=torch.float64)


def _error(row, z):
    return activation(row.source)(z) - activation(row.gate)(row.a * z) * (row.alpha * z + row.beta)


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_stated_bound_is_the_supremum(row, grid):
    worst = _error(row, grid).abs().max().item()
    if row.exact:
        assert worst < 2e-14
    else:
        assert 0.97 * row.max_error < worst <= row.max_error


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not row.exact], ids=[i for i, r in zip(ids, ROWS, strict=True) if not r.exact]
)
def test_stated_rms_is_measured(row, normal):
    weight = torch.exp(-(normal**2) / 2)
    rms = (
        ((weight * _error(row, normal) ** 2).sum() / (weight * activation(row.source)(normal) ** 2).sum()).sqrt().item()
    )
    assert 0.97 * row.rms_error < rms <= row.rms_error


def test_constant_of_the_logistic_is_the_minimax():
    x = torch.linspace(0, 8, 200_001, dtype=torch.float64)
    normal_cdf = 0.5 * (1 + torch.erf(x / 2**0.5))

    def distance(k):
        return (normal_cdf - torch.sigmoid(k * x)).abs().max().item()

    best = min((1.690 + step / 1000 for step in range(25)), key=distance)
    assert best == pytest.approx(LOGISTIC, abs=5e-4)
    assert distance(LOGISTIC) == pytest.approx(0.0095, abs=5e-5)


def test_sharpness_costs_no_rounding():
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal((weights * SHARPNESS) / SHARPNESS, weights)


@settings(max_examples=40, deadline=None)
@given(
    row=st.sampled_from(ROWS),
    d=st.integers(1, 9),
    f=st.integers(1, 9),
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_expand_is_the_line_it_folds(row, d, f, bias, transposed, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(f, d, generator=g, dtype=torch.float64)
    b = torch.randn(f, generator=g, dtype=torch.float64) if bias else None
    x = torch.randn(4, d, generator=g, dtype=torch.float64)
    packed = expand(weight.T if transposed else weight, row, dim=int(transposed))
    packed_bias = expand(torch.zeros(f, dtype=torch.float64) if b is None else b, row, constant=row.beta)
    hidden = torch.nn.functional.linear(x, packed.T if transposed else packed, packed_bias)
    gate, value = split_packed(hidden, "packed", "first")
    z = torch.nn.functional.linear(x, weight, b)
    difference = (activation(row.gate)(gate) * value - activation(row.source)(z)).abs()
    assert (difference <= row.max_error + 1e-9 * (1 + z.abs() ** 2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_expand_of_gelu_keeps_the_bits(dtype):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    row = SCALINGS["gelu", "gelu"]
    packed, bias = expand(weight, row), expand(torch.zeros(6, dtype=dtype), row, constant=row.beta)
    assert packed.dtype == bias.dtype == dtype
    assert torch.equal(packed[:6], weight)
    assert not packed[6:].any()
    assert not torch.signbit(packed[6:]).any()
    assert torch.equal(bias, torch.tensor([0.0] * 6 + [1.0] * 6, dtype=dtype))


def test_relu_squared_takes_its_own_input_as_value():
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row = find_scaling("relu2", "relu", gated=False)
    packed, bias = expand(weight, row), expand(torch.zeros(3, dtype=torch.float64), row, constant=row.beta)
    assert torch.equal(packed[:3], packed[3:])
    assert not bias.any()


def test_retarget_rounds_once():
    row = find_scaling("silu", "gelu", gated=True)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate = retarget(weight, "gate", row)
    assert torch.equal(gate, (weight.float() / LOGISTIC).bfloat16())
    assert torch.equal(retarget(weight, "value", row), (weight.float() * LOGISTIC).bfloat16())


def test_retarget_needs_a_free_value_branch_only_where_it_is_free():
    with pytest.raises(ConversionError, match="uses its value branch"):
        retarget(torch.ones(2), "gate", SCALINGS["relu2", "gelu"])
    with pytest.raises(ConversionError, match="leads to the gates"):
        find_scaling("silu", "sigmoid", gated=True)


@pytest.mark.parametrize(("source", "gate"), list(itertools.product(["gelu", "silu"], ["relu", "linear"])))
def test_lossy_pairs_are_refused(source, gate):
    with pytest.raises(ConversionError, match=f"gate '{gate}'"):
        find_scaling(source, gate, gated=False)


def test_overflow_is_an_error():
    with pytest.raises(WeightsError, match=r"65504|6\.55e"):
        expand(torch.full((2, 2), 1e3, dtype=torch.float16), SCALINGS["relu", "gelu"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [LOGISTIC, 1 / LOGISTIC, SHARPNESS, 1 / SHARPNESS, 1 / 3, 0.0])
def test_a_product_in_one_pass_has_the_bits_of_the_widened_one(dtype, factor):
    weight = torch.randn(70_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(product(weight, factor), rounded(scaled(weight, factor), dtype))


def test_a_sum_that_overflows_does_not_accuse_finite_weights():
    weight = torch.full((8,), 3e38)
    assert torch.equal(product(weight, 1.0), weight)
    weight[3] = float("inf")
    with pytest.raises(WeightsError, match=r"not finite in torch\.float32"):
        product(weight, 1.0)
