"""Conversions whose numbers differ from neuron to neuron: what is folded in is what was given, in every layout."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny

import hf_geglu
from hf_geglu.choice import CalibrationRecord, FitRecord
from hf_geglu.conversions import Coefficients, NewWeights, find_scaling
from hf_geglu.errors import PlanError, VerificationError
from hf_geglu.plan import Plan
from hf_geglu.planning import make_plan
from hf_geglu.sites.weights import bias_name, experts_in, is_stack, parameters_of, weight_name
from hf_geglu.surgery import apply
from hf_geglu.verify import check_sites

RECORD = FitRecord(method="per neuron", error=0.01, alternatives={"table": 0.02}, reason="smaller")
CALIBRATION = CalibrationRecord(data="made up", fingerprint="0" * 64, tokens=8, held_out_tokens=4, seed=0)


def fitted(model, make):
    """A plan whose every site has the fit that `make` gives for it."""
    plan = make_plan(model)
    sites = tuple(replace(entry, fit=RECORD) for entry in plan.sites)
    fits = {entry.site.up: make(model, entry.site) for entry in sites}
    return replace(plan, sites=sites, calibration=CALIBRATION), fits


def random_line(model, site):
    generator = torch.Generator().manual_seed(len(site.up))
    parameters = parameters_of(model, site)
    held = experts_in(parameters[weight_name(site.up, site.projection)].shape, site)
    shape = (held, site.width) if is_stack(site.projection) else (site.width,)

    def draw(low, high):
        return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low

    biased = not site.gated or bias_name(site.gate, site.projection) in parameters
    return Coefficients(
        a=draw(0.4, 0.8),
        b=draw(-0.3, 0.3) if biased else 0.0,
        alpha=0.0 if site.gated else draw(-0.2, 0.2),
        beta=draw(1.2, 2.0),
    )


CASES = {
    "llama": {},
    "llama with biases": {"mlp_bias": True},
    "phi3": {},
    "mixtral": {},
    "bert": {"hidden_act": "relu"},
    "gpt2": {"activation_function": "relu"},
    "opt": {},
    "t5": {"feed_forward_proj": "gated-silu"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_layout_computes_the_line_of_each_neuron(case, dtype):
    model = tiny(case.split()[0], **CASES[case]).to(dtype)
    before = copy.deepcopy(model.state_dict())
    plan, fits = fitted(model, random_line)
    undo = apply(model, plan, fits)
    checks = check_sites(model, undo)  # against the formula, neuron by neuron
    assert len(checks) == len(plan.sites)
    if dtype == torch.float64:
        assert max(check.max_abs for check in checks) < 1e-12
    hf_geglu.revert(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_wrong_fold_is_noticed():
    model = tiny("llama")
    plan, fits = fitted(model, random_line)
    undo = apply(model, plan, fits)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3] *= 1.001
    with pytest.raises(VerificationError, match="what was fitted"):
        check_sites(model, undo)


def test_the_table_is_one_instance():
    """A row of the table and the same numbers a neuron give the same bits."""
    row = find_scaling("silu", "gelu", gated=True)
    by_table, by_neuron = tiny("llama"), tiny("llama")
    apply(by_table, make_plan(by_table))
    plan, fits = fitted(
        by_neuron,
        lambda _, site: Coefficients(a=torch.full((site.width,), row.a), beta=torch.full((site.width,), row.beta)),
    )
    apply(by_neuron, plan, fits)
    for (name, one), other in zip(by_table.state_dict().items(), by_neuron.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_what_is_added_to_the_down_projection():
    model = tiny("opt").double()
    generator = torch.Generator().manual_seed(0)

    def line(model, site):
        return Coefficients(
            a=128.0,
            beta=1 / 128,
            left=torch.randn(site.d_out, 3, generator=generator, dtype=torch.float64),
            right=torch.randn(3, site.width, generator=generator, dtype=torch.float64),
            output=torch.randn(site.d_out, generator=generator, dtype=torch.float64),
        )

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plan, fits = fitted(model, line)
    undo = apply(model, plan, fits)
    check_sites(model, undo)
    for path, fit in fits.items():
        down = path.replace("fc1", "fc2")
        weight = model.get_parameter(f"{down}.weight")
        assert torch.equal(weight, before[f"{down}.weight"] + fit.down)
        torch.testing.assert_close(weight, before[f"{down}.weight"] + fit.left @ fit.right, rtol=0, atol=1e-12)
        assert torch.equal(model.get_parameter(f"{down}.bias"), before[f"{down}.bias"] + fit.output)
    with torch.no_grad():
        weight[0, 0] += 1e-6
    with pytest.raises(VerificationError, match="what was fitted"):
        check_sites(model, undo)


@pytest.mark.parametrize("case", ["bert", "gpt2", "llama", "phi3"])
def test_new_weights_in_every_layout(case):
    model = tiny(case, **({"hidden_act": "relu"} if case == "bert" else {})).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 16, generator=generator, dtype=torch.float64)

    def fresh(model, site):
        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        biases = {} if site.gated else {"gate_bias": draw(site.width), "up_bias": draw(site.width)}
        return NewWeights(gate=draw(site.width, 16), up=draw(site.width, 16), down=draw(16, site.width), **biases)

    plan, fits = fitted(model, fresh)
    undo = apply(model, plan, fits)
    assert len(check_sites(model, undo)) == len(plan.sites)
    for entry in plan.sites:
        site, new = entry.site, fits[entry.site.up]
        act = (
            torch.nn.functional.gelu
            if entry.scaling.gate == "gelu"
            else lambda z: torch.nn.functional.gelu(z, approximate="tanh")
        )
        hidden = act(torch.nn.functional.linear(x, new.gate, new.gate_bias))
        hidden = hidden * torch.nn.functional.linear(x, new.up, new.up_bias)
        up, activation = model.get_submodule(site.up), model.get_submodule(site.activation_path)
        if site.layout == "separate":
            made = activation(model.get_submodule(site.gate)(x)) * up(x)
        elif site.layout == "dense":
            made = activation(up(x))
        else:
            gate, value = up(x).chunk(2, dim=-1)
            made = activation(gate) * value
        down = model.get_submodule(site.down)
        bias = 0.0 if getattr(down, "bias", None) is None else down.bias
        torch.testing.assert_close(down(made) - bias, hidden @ new.down.T, rtol=1e-12, atol=1e-12)


def test_a_plan_holds_no_tensors_and_says_what_it_lacks():
    model = tiny("llama")
    plan, fits = fitted(model, random_line)
    assert Plan.from_json(plan.to_json()) == plan
    assert "per neuron" in str(plan)
    assert not plan.exact
    path = next(iter(fits))
    with pytest.raises(PlanError, match="a plan holds no tensors"):
        apply(model, plan, {})
    with pytest.raises(PlanError, match="converts without one"):
        apply(model, make_plan(model), {path: fits[path]})
    with pytest.raises(PlanError, match="a plan holds no tensors"):
        hf_geglu.convert_checkpoint(_saved(tiny("llama")), "never", plan=plan)


def _saved(model):
    import tempfile

    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return folder


def test_plans_of_before_are_read():
    data = json.loads(make_plan(tiny("llama")).to_json())
    del data["calibration"]
    for site in data["sites"]:
        del site["fit"]
    assert Plan.from_json(json.dumps(data)) == make_plan(tiny("llama"))


def test_fits_become_tensors_and_back():
    line = Coefficients(a=torch.rand(4), b=0.5, beta=2.0, output=torch.rand(3))
    again = Coefficients.from_tensors(line.tensors())
    assert torch.equal(again.a, line.a)
    assert (again.b, again.alpha, again.beta, again.down) == (0.5, 0.0, 2.0, None)
