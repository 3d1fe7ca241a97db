"""Units nobody has seen: members of the family in unusual clothes, and impostors, each told by what keeps it out."""

from __future__ import annotations

import odd_units as odd
import pytest
import torch
import torch.nn.functional as fn
from torch import nn

import hf_geglu
from hf_geglu.errors import IdentifyError
from hf_geglu.identifying import Identity, Unknown, identify

MEMBERS = {
    # unit: (family, gelu, scale, factor, layout, gate half, gate, value)
    odd.ProjectionOnly(): ("geglu", "erf", 1, 1, "packed", "last", "proj", "proj"),
    odd.SplitLater(nn.GELU(approximate="tanh")): ("geglu", "tanh", 1, 1, "packed", "last", "proj", "proj"),
    odd.SplitLater(nn.SiLU(), scaled=True): ("swiglu", None, 1, 1, "packed", "last", "proj", "proj"),
    odd.GluMlp(): ("glu", None, 1, 1, "packed", "last", "fc1", "fc1"),
    odd.GluMlp(gate_last=False, activation=nn.GELU): ("geglu", "erf", 1, 1, "packed", "first", "fc1", "fc1"),
    odd.Scaled(): ("geglu", "erf", 1.25, 1, "separate", None, "pear", "plum"),
    odd.Swish(): ("swiglu", "quick", 1, 1, "separate", None, "pear", "plum"),
    odd.OtherSwish(): ("swiglu", None, 2.5, 0.4, "separate", None, "pear", "plum"),
    odd.Folded(): ("geglu", "erf", 1 / 1.702, 1.702, "separate", None, "pear", "plum"),
    odd.Mish(): ("gated", None, 1, 1, "separate", None, "pear", "plum"),
    odd.TanhGate(): ("tanh gate", None, 1, 1, "separate", None, "pear", "plum"),
    odd.NormAfter(): ("geglu", "erf", 1, 1, "separate", None, "pear", "plum"),
    odd.LearnedScale(): ("geglu", "erf", 1, 1, "separate", None, "pear", "plum"),
    odd.Groups(): ("geglu", "tanh", 1, 1, "packed in groups of 5", None, "both", "both"),
    odd.Interleaved(): ("swiglu", None, 1, 1, "interleaved", "last", "both", "both"),
    odd.Head(): ("geglu", "erf", 1, 1, "separate", None, "apple", "plum"),
    odd.Convolved(): ("geglu", "erf", 1, 1, "packed", "last", "both", "both"),
    odd.Layer(): ("geglu", "erf", 1, 1, "separate", None, "one", "two"),
}


@pytest.mark.parametrize("unit", MEMBERS, ids=lambda unit: type(unit).__name__)
def test_members(unit):
    family, gelu, scale, factor, layout, half, gate, value = MEMBERS[unit]
    seen = identify(unit)
    assert isinstance(seen, Identity), seen
    assert (seen.family, seen.gelu, seen.layout, seen.gate_half) == (family, gelu, layout, half)
    assert (seen.scale, seen.factor) == pytest.approx((scale, factor), rel=1e-5)
    assert (seen.gate, seen.value) == (gate, value)
    assert seen.error < 1e-5 < 1e-3 < seen.runner_up_error
    assert seen.variant == {("geglu", "erf"): "geglu", ("geglu", "tanh"): "geglu_tanh"}.get(
        (family, gelu), family if family in hf_geglu.VARIANTS and gelu is None else None
    ) or (scale, factor) != (1, 1)


@pytest.mark.parametrize("unit", odd.IMPOSTORS, ids=lambda unit: unit.__name__)
def test_impostors(unit):
    """None is taken for a member of the family, and each is told by what keeps it out."""
    seen = identify(unit())
    assert odd.IMPOSTORS[unit] in str(seen)
    if isinstance(seen, Identity):
        assert seen.family == "other"
        assert not seen.gated
        assert seen.variant is None
        assert seen.error is None or seen.error < 1e-5  # what is said instead was held against the unit


def test_enough_impostors():
    assert len(odd.IMPOSTORS) >= 40


def test_clamps_offset_and_scale():
    """The unit of gpt-oss, in a class nobody has seen."""
    seen = identify(odd.ClampedAndShifted())
    assert (seen.family, seen.gelu, seen.value_offset) == ("swiglu", "quick", 1.0)
    assert (seen.gate_limits, seen.value_limits) == ((None, 7), (-7, 7))
    assert seen.formula == "quick_gelu(clamp(gate, -, 7)) * (clamp(value, -7, 7) + 1)"
    assert seen.variant is None


def test_a_constant_inside():
    assert identify(odd.ShiftedGate()).formula == "gelu(gate + 0.5) * value"
    assert identify(odd.ShiftedGate()).shift == pytest.approx(0.5)


def test_what_follows_is_noted():
    assert identify(odd.NormAfter()).notes == ("followed by LayerNorm (norm), which mixes neurons",)
    assert identify(odd.LearnedScale()).notes == ("each neuron is multiplied by a number of its own",)


def test_biases():
    assert identify(odd.Groups()).gate_bias is False
    seen = identify(odd.Layer())
    assert (seen.gate_bias, seen.value_bias, seen.down_bias) == (True, False, True)
    assert identify(fn.glu).gate_bias is None


FUNCTIONS = {
    "F.glu": (fn.glu, "glu", "last"),
    "nn.GLU": (nn.GLU(), "glu", "last"),
    "packed": (lambda x: fn.gelu(x[..., :8]) * x[..., 8:], "geglu", "first"),
    "two tensors": (lambda value, gate: value * fn.relu(gate), "reglu", None),
    "bilinear": (lambda one, other: one * other, "bilinear", None),
    "F.silu": (fn.silu, "dense", None),
    "ours": (hf_geglu.variants.PackedGLU("gelu"), "geglu", "first"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, family, half = FUNCTIONS[name]
    seen = identify(function)
    assert (seen.family, seen.gate_half) == (family, half), seen


def test_which_argument_is_the_gate():
    seen = identify(lambda apple, pear: apple * fn.gelu(pear))
    assert (seen.gate, seen.value) == ("pear", "apple")


LOW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("form", ["erf", "tanh"])
def test_forms_of_gelu_in_low_precision(dtype, form):
    """They are 5e-4 apart where bfloat16 has steps of 4e-3: told by where they differ most, on average."""
    approximate = "none" if form == "erf" else "tanh"
    seen = identify(lambda g, v: fn.gelu(g, approximate=approximate) * v, dtype=dtype)
    assert (seen.family, seen.gelu) == ("geglu", form)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_formulas_written_out_in_low_precision(dtype):
    """Every operation rounds; the candidates that are written out in the same way are the closest."""
    erf = identify(lambda g, v: v * (g * 0.5 * (1 + torch.erf(g / 2**0.5))), dtype=dtype)
    tanh = identify(lambda g, v: v * (0.5 * g * (1 + torch.tanh(0.7978845608 * (g + 0.044715 * g**3)))), dtype=dtype)
    assert (erf.gelu, tanh.gelu) == ("erf", "tanh")


@pytest.mark.parametrize("activation", ["none", "tanh"])
def test_modules_in_bfloat16(activation):
    seen = identify(odd.SplitLater(nn.GELU(approximate=activation)).bfloat16())
    assert seen.gelu == {"none": "erf", "tanh": "tanh"}[activation]
    assert seen.error < 1e-9


def test_a_module_that_rounds_inside():
    assert identify(odd.RoundsToBfloat16()).gelu == "tanh"


def test_impostors_in_low_precision():
    for unit in (lambda g, v: fn.gelu(g) * torch.tanh(v), lambda g, v: fn.gelu(g * v), lambda g, v: fn.gelu(g) + v):
        seen = identify(unit, dtype=torch.bfloat16)
        assert not isinstance(seen, Identity) or seen.family == "other"


def test_nothing_changes():
    unit = odd.LearnedScale().train()
    before = {name: tensor.clone() for name, tensor in unit.state_dict().items()}
    state, hooks = torch.get_rng_state(), dict(unit._forward_hooks)
    identify(unit)
    assert unit.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in unit.state_dict().items())
    assert dict(unit._forward_hooks) == hooks


def test_weightless():
    with torch.device("meta"):
        unit = odd.GluMlp()
    assert identify(unit).family == "glu"


class Stubborn(odd.Unit):
    def unit(self, g, v):
        raise KeyError("not today")


def test_no_answer_says_why():
    seen = identify(Stubborn())
    assert isinstance(seen, Unknown)
    assert "not today" in seen.reason
    assert seen.to_dict()["known"] is False
    nothing = identify(lambda: None)
    assert isinstance(nothing, Unknown)
    assert "could not be called" in nothing.reason


def test_what_is_no_unit():
    with pytest.raises(IdentifyError, match="Give an instance"):
        identify(nn.Linear)
    with pytest.raises(IdentifyError, match="takes a module"):
        identify(3)


@pytest.mark.parametrize("unit", [odd.ProjectionOnly, odd.Interleaved, odd.BothActivated, odd.SoftmaxGate])
def test_wide_units(unit, monkeypatch):
    """Of many columns, a sample is looked at."""
    monkeypatch.setattr(odd, "F", 1500)
    monkeypatch.setattr(odd.Unit, "width", 1500)
    seen = identify(unit())
    expected = {odd.ProjectionOnly: "packed, gate last", odd.Interleaved: "interleaved, gate last"}
    assert (expected.get(unit) or odd.IMPOSTORS[unit]) in str(seen)
