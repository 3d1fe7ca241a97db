"""collapse on whole models: the original weights bit for bit, honest about what stays, all or nothing, reversible."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
from versions import BEFORE_5

import hf_geglu
from benchmarks.zoo.building import build
from hf_geglu import surgery
from hf_geglu.choice import FitRecord
from hf_geglu.conversions import SCALINGS, Coefficients, at_start, collapse, expand, scale_neurons
from hf_geglu.errors import PlanError, SelectionError, SurgeryError, VerificationError, WeightsError
from hf_geglu.inputs import synthetic_inputs

KINDS = [
    ("bert", {}, "split"),
    ("gpt2", {}, "module"),  # Conv1D
    ("opt", {}, "inline"),  # ReLU: scaled by 128
    ("t5", {}, "module"),  # ReLU without biases
    ("falcon", {}, "module"),  # GELU without biases
    ("albert", {}, "inline"),  # one block for all layers
    ("esm", {}, "split"),  # a call in `forward`
    ("convnext", {}, "inline"),
    ("whisper", {}, "inline"),
    ("clip", {}, "module"),  # two towers, quick-GELU
]


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _shape(model):
    """All but the numbers."""
    return (
        type(model),
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()],
        {key: value for key, value in model.config.to_dict().items() if "act" in key or key in ("geglu", "auto_map")},
    )


def _same_bits(one, other):
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def _learn(model, *layers, size=0.05):
    """Give the value branches of those layers weights."""
    generator = torch.Generator().manual_seed(3)
    for number in layers:
        weight = model.bert.encoder.layer[number].intermediate.dense.weight
        half = len(weight) // 2
        with torch.no_grad():
            weight[half:] = (torch.randn(half, weight.shape[1], generator=generator) * size).to(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["this process", "disk"])
@pytest.mark.parametrize(("model_type", "overrides", "kind"), KINDS, ids=[name for name, _, _ in KINDS])
def test_expand_and_collapse_give_the_same_bits(tmp_path, model_type, overrides, kind, where, dtype):
    model = tiny(model_type, **overrides).to(dtype)
    assert {site.kind for site in hf_geglu.find_sites(model)} == {kind}
    before, shape = _state(model), _shape(model)
    hf_geglu.convert(model)
    variant = _state(model)
    if where == "disk":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, dtype=dtype)
    report = hf_geglu.collapse(model)
    assert report.plan.whole
    assert report.plan.exact
    assert report.collapsed == len(report.plan.sites) > 0
    assert _same_bits(_state(model), before)
    assert where == "disk" or _shape(model) == shape
    assert [entry[:2] for entry in _shape(model)[1]] == [entry[:2] for entry in shape[1]]
    assert (type(model), _shape(model)[3]) == (shape[0], shape[3])
    assert "dense again, exactly" in str(report)
    hf_geglu.revert(model)
    assert _same_bits(_state(model), variant)


@pytest.mark.skipif(BEFORE_5, reason="the zoo is of transformers 5")
@pytest.mark.parametrize("model_type", ["squeezebert", "poolformer", "nemotron_h", "rwkv", "wav2vec2-conformer"])
def test_other_projections(model_type):
    """Grouped and 1x1 convolutions, stacks of experts (ReLU²), exposed calls."""
    model = build(model_type).model
    before = _state(model)
    hf_geglu.convert(model, verify="sites")
    if hasattr(model.config, "geglu"):
        hf_geglu.forget_original(model)  # what a process that loads it has
    report = hf_geglu.collapse(model, verify="sites")
    assert report.plan.whole
    assert _same_bits(_state(model), before)


def test_saved_as_an_ordinary_checkpoint(tmp_path):
    original = tiny("bert")
    original.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(original)
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "variant")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "variant")
    assert type(loaded).__name__ == "GegluBertForMaskedLM"
    hf_geglu.collapse(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "dense" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert not (tmp_path / "dense" / "modeling_geglu.py").exists()


def test_another_head_of_the_same_variant(tmp_path):
    model = tiny("bert")
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForSequenceClassification, None):
        loaded = (auto or type(model.bert)).from_pretrained(tmp_path) if auto else hf_geglu_body(tmp_path)
        hf_geglu.collapse(loaded)
        assert type(loaded).__name__ in ("BertForSequenceClassification", "BertModel")
        assert not hasattr(loaded.config, "geglu")


def hf_geglu_body(folder):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


def test_layers_that_learned_stay(tmp_path):
    model = tiny("bert").double()
    before = _state(model)
    hf_geglu.convert(model)
    _learn(model, 1)
    inputs = synthetic_inputs(model)
    expected = model(**inputs).logits
    report = hf_geglu.collapse(model)
    assert [entry.site.layer for entry in report.plan.sites] == [0]
    (kept,) = report.plan.kept
    assert "learned: |Wv| / |Wg| = " in kept.reason
    assert type(model).__name__ == "GegluBertForMaskedLM"
    assert len(model.config.geglu["sites"]) == 1
    assert torch.equal(model(**inputs).logits, expected)
    up = "bert.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(model.state_dict()[up], before[up])
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(**inputs).logits, expected)
    # nothing left to do, and nothing is done
    state = _state(again)
    idle = hf_geglu.collapse(again)
    assert idle.note == "no block can collapse; nothing was changed"
    assert _same_bits(_state(again), state)


def test_layers_select_and_collapses_stack():
    model = tiny("bert")
    before = _state(model)
    hf_geglu.convert(model)
    middle = _state(model)
    first = hf_geglu.collapse(model, layers=0)
    assert [kept.reason for kept in first.plan.kept] == ["not selected by layers="]
    half = _state(model)
    second = hf_geglu.collapse(model)
    assert second.plan.whole
    assert _same_bits(_state(model), before)
    hf_geglu.revert(model)
    assert _same_bits(_state(model), half)
    hf_geglu.revert(model)
    assert _same_bits(_state(model), middle)
    hf_geglu.revert(model)
    assert _same_bits(_state(model), before)
    hf_geglu.convert(model)
    with pytest.raises(SelectionError):
        hf_geglu.collapse(model, layers=9)


def test_a_collapsed_model_can_be_converted_again():
    model = tiny("gpt2")
    hf_geglu.convert(model)
    variant = _state(model)
    hf_geglu.collapse(model)
    hf_geglu.convert(model)
    assert _same_bits(_state(model), variant)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "convnext", "opt"])
@pytest.mark.parametrize("exponent", [True, False])
def test_other_constants_go_into_the_down_projection(model_type, exponent):
    """Value biases that were trained: powers of two cost no bit, others one rounding of float64."""
    model = tiny(model_type).double()
    hf_geglu.convert(model)
    generator = torch.Generator().manual_seed(1)
    for site in hf_geglu.find_sites(model):
        bias = model.get_parameter(f"{site.up}.bias")
        half = bias[len(bias) // 2 :]
        with torch.no_grad():
            if exponent:
                half *= 2.0 ** torch.randint(-3, 4, half.shape, generator=generator)
            else:
                half *= 1 + torch.randn(half.shape, generator=generator, dtype=torch.float64)
                half[0] = 0.0
    variant = copy.deepcopy(model)
    report = hf_geglu.collapse(model)
    assert report.plan.whole
    assert report.plan.exact
    assert all(entry.folded > 0 for entry in report.plan.sites)
    difference = hf_geglu.compare(variant, model, synthetic_inputs(model)).max_rel
    if model_type == "opt":
        assert difference < 0.05  # ReLU for gelu(128 z)/128
    else:
        assert difference <= (0.0 if exponent else 1e-14)


def test_a_trained_gate_is_kept():
    """Value branches frozen, all else trained: what comes back is dense with the trained weights."""
    model = tiny("bert").double()
    hf_geglu.convert(model)
    for number in range(2):
        dense = model.bert.encoder.layer[number].intermediate.dense
        with torch.no_grad():
            dense.weight[: len(dense.weight) // 2] += 0.1
            dense.bias[: len(dense.bias) // 2] += 0.1
    variant = copy.deepcopy(model)
    report = hf_geglu.collapse(model)
    assert report.plan.whole
    assert not any(entry.original for entry in report.plan.sites)
    assert hf_geglu.compare(variant, model, synthetic_inputs(model)).max_abs == 0.0


def test_a_gate_bias_that_the_base_has_no_place_for():
    model = tiny("falcon")
    hf_geglu.convert(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.dense_h_to_4h.bias[0] = 0.5
    report = hf_geglu.collapse(model)
    assert [entry.site.layer for entry in report.plan.sites] == [1]
    assert report.plan.kept[0].reason == "the bias of its gate was trained, and the dense block has none"


@pytest.mark.parametrize("model_type", ["opt", "gpt2"])
def test_a_fitted_conversion_goes_back_in_its_own_process_only(tmp_path, model_type):
    model = tiny(model_type, **({} if model_type == "opt" else {"activation_function": "relu"}))
    before = _state(model)
    record = FitRecord(method="per neuron", error=0.01, alternatives={}, reason="made up")
    plan = hf_geglu.make_plan(model)
    plan = replace(plan, sites=tuple(replace(entry, fit=record) for entry in plan.sites))
    generator = torch.Generator().manual_seed(0)
    fits = {
        entry.site.up: Coefficients(
            a=1 + torch.rand(entry.site.width, generator=generator),
            b=0.1,
            beta=torch.rand(entry.site.width, generator=generator),
            left=torch.randn(entry.site.d_out, 3, generator=generator),
            right=torch.randn(3, entry.site.width, generator=generator),
        )
        for entry in plan.sites
    }
    surgery.apply(model, plan, fits)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {kept.reason for kept in hf_geglu.collapse(loaded).plan.kept} == {
        "its conversion was fitted to activations, and only the process that converts it knows the base"
    }
    report = hf_geglu.collapse(model)
    assert all(entry.fitted and entry.original for entry in report.plan.sites)
    assert _same_bits(_state(model), before)
    hf_geglu.revert(model)
    with torch.no_grad():
        model.get_parameter(f"{plan.sites[0].site.down}.weight")[0, 0] += 1
    assert [entry.site.layer for entry in hf_geglu.collapse(model).plan.sites] == [1]


def test_tolerance_is_a_bound_that_holds():
    model = tiny("bert").double()
    hf_geglu.convert(model)
    _learn(model, 0, size=1e-3)
    _learn(model, 1, size=0.5)
    inputs = synthetic_inputs(model)
    report = hf_geglu.collapse(model, tolerance=0.1, inputs=[inputs, inputs])
    (entry,) = report.plan.sites
    assert entry.site.layer == 0
    assert 0 < entry.measured <= entry.bound <= 0.1
    assert not report.plan.exact
    assert report.plan.tokens == 2 * inputs["input_ids"].numel()
    assert "more than the tolerance 0.1" in report.plan.kept[0].reason
    assert 0 < report.comparisons[0].max_rel < 0.1
    hf_geglu.revert(model)
    assert not hf_geglu.collapse(model).plan.sites


@pytest.mark.parametrize("model_type", ["gpt2", "convnext"])
def test_tolerance_reads_each_layout(model_type):
    """The measure is that of the block itself: recomputed here from what the packed unit is given."""
    model = tiny(model_type).double()
    hf_geglu.convert(model)
    site = hf_geglu.find_sites(model).sites[0]
    weight = model.get_parameter(f"{site.up}.weight")
    values = weight[:, site.width :] if site.projection == "conv1d" else weight[site.width :]
    with torch.no_grad():
        values += 1e-3 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = synthetic_inputs(model)
    heard = []
    handle = model.get_submodule(site.up).register_forward_hook(lambda _m, _a, out: heard.append(out.detach()))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    v_NF = heard[0].movedim(site.dim, -1).reshape(-1, 2 * site.width)[:, site.width :]
    mean_F = v_NF.mean(0)
    expected = ((v_NF - mean_F) / mean_F).abs().max().item()
    entry = hf_geglu.collapse(model, tolerance=0.5, inputs=inputs, layers=[0]).plan.sites[0]
    assert entry.measured == pytest.approx(expected, rel=1e-9)
    assert entry.measured <= entry.bound


@pytest.mark.parametrize("tolerance", [-0.1, 1.0])
def test_a_tolerance_that_means_nothing(tolerance):
    model = tiny("bert")
    hf_geglu.convert(model)
    with pytest.raises(PlanError, match="a share of each neuron's value"):
        hf_geglu.collapse(model, tolerance=tolerance)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_what_is_no_expanded_variant_is_refused(model_type):
    with pytest.raises(SurgeryError, match="no block that hf_geglu expanded"):
        hf_geglu.collapse(tiny(model_type))
    model = tiny("llama")
    hf_geglu.convert(model)
    assert not hf_geglu.collapse(model).plan.sites


def test_nan_is_refused_and_nothing_changes():
    model = tiny("bert")
    hf_geglu.convert(model)
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="NaN"):
        hf_geglu.collapse(model)
    assert len(model.config.geglu["sites"]) == 2


def test_failure_puts_the_variant_back(monkeypatch):
    model = tiny("bert")
    hf_geglu.convert(model)
    before, shape, config = _state(model), _shape(model), model.config.to_dict()

    def refuse(*_):
        raise VerificationError("as if")

    monkeypatch.setattr("hf_geglu.collapsing.model.check_outputs", refuse)
    with pytest.raises(VerificationError):
        hf_geglu.collapse(model)
    assert _same_bits(_state(model), before)
    assert _shape(model) == shape
    assert model.config.to_dict() == config


class Normed(nn.Module):
    """A norm between the unit and its down projection, through which no constant goes."""

    def __init__(self):
        super().__init__()
        self.up, self.act = nn.Linear(8, 12), nn.GELU()
        self.norm, self.down = nn.LayerNorm(12), nn.Linear(12, 8)

    def forward(self, hidden_states):
        return self.down(self.norm(self.act(self.up(hidden_states))))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Normed() for _ in range(2)])

    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states)
        return hidden_states


def test_a_constant_that_does_not_go_through_a_norm_is_caught():
    torch.manual_seed(0)
    model = Stack().double().eval()
    before = _state(model)
    inputs = {"hidden_states": torch.randn(2, 5, 8, dtype=torch.float64)}
    hf_geglu.convert(model, inputs=inputs)
    assert hf_geglu.collapse(model, inputs=inputs).plan.whole  # the conversion's own constants need no fold
    assert _same_bits(_state(model), before)
    hf_geglu.revert(model)
    with torch.no_grad():
        model.layers[0].up.bias[12:] *= torch.arange(1, 13)
    variant = _state(model)
    with pytest.raises(VerificationError, match="a norm between"):
        hf_geglu.collapse(model, inputs=inputs)
    assert _same_bits(_state(model), variant)
    (kept,) = (entry for entry in hf_geglu.collapse(model).plan.kept)  # not run, so not proved
    assert "the model was not run" in kept.reason


# -- pure functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=lambda scaling: f"{scaling.source}-{scaling.gate}")
def test_collapse_undoes_expand(scaling, dtype):
    weight = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    packed = expand(weight, scaling, groups=3)
    assert at_start(packed, scaling, groups=3)
    back = collapse(packed, scaling, groups=3)
    factor = scaling.a if scaling.fits_gated else scaling.alpha
    if float(factor).hex().split("p")[0] in ("0x1.0000000000000", "-0x1.0000000000000"):
        assert torch.equal(back, weight)
    else:  # there and back, each rounded once
        assert ((back - weight).abs() <= 2 * torch.finfo(dtype).eps * weight.abs()).all()
    packed[6] += 1e-2  # a value row of the second group of 4: rows 8..15 are its gate and value
    assert not at_start(packed, scaling, groups=3) or scaling.fits_gated


@pytest.mark.parametrize(
    ("form", "shape", "groups", "factors"),
    [
        ("linear", (3, 8), 1, (8,)),
        ("conv1d", (8, 3), 1, (8,)),
        ("pointwise", (6, 8, 1, 1), 1, (8,)),
        ("pointwise", (6, 4, 1), 2, (8,)),
        ("stack", (2, 3, 8), 1, (2, 8)),
        ("stack_transposed", (2, 8, 3), 1, (8,)),
    ],
)
def test_scaling_neurons_is_scaling_what_they_give(form, shape, groups, factors):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    factor = torch.randn(factors, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)  # experts first, where there are any

    def down(weight, x):
        if form == "linear":
            return x @ weight.T
        if form == "conv1d":
            return x @ weight
        if form == "pointwise":
            x = x.movedim(-1, 1)
            flat = weight.flatten(2)
            return nn.functional.conv1d(x, flat, groups=groups)
        return x @ (weight.mT if form == "stack" else weight)

    by = factor[:, None] if factor.dim() == 2 else factor
    scaled = scale_neurons(weight, factor, form, groups=groups)
    assert torch.allclose(down(scaled, x), down(weight, x * by), rtol=1e-12, atol=1e-12)
