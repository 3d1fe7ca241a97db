"""The low-rank correction of the down projection: what is solved, when it is chosen, and that it is replayed."""

import pytest
import torch
from calibration_inputs import data, lively
from tiny_models import tiny

import hf_geglu
from hf_geglu.calibration import CalibrationData, calibrate, correction, gather
from hf_geglu.calibration.calibrate import CORRECTED, PER_NEURON
from hf_geglu.calibration.correction import FLOOR, RANK, RIDGE, TOKENS, Correction, strength
from hf_geglu.calibration.lines import down_matrix
from hf_geglu.conversions import Coefficients
from hf_geglu.functional import activation
from hf_geglu.planning import make_plan

CASES = {
    "llama": {},
    "phi3": {},
    "gpt2": {"activation_function": "silu"},
    "bert": {"hidden_act": "quick_gelu"},
    "albert": {"hidden_act": "silu"},
}


def gathered(model, entry, given):
    line = Coefficients.of(entry.scaling)
    found = Correction(entry, line, down_matrix(model, entry.site))
    gather(model, given, {entry.site.up: found}, sites=[entry.site])
    return found


@pytest.mark.parametrize("case", CASES)
def test_of_full_rank_it_is_the_ridge_solution(case, monkeypatch):
    """h B with B = (H'H + penalty)^-1 H'E, from activations that a forward hook of this test's own has seen."""
    model = lively(tiny(case, **CASES[case]))
    entry = make_plan(model).converted[0]
    site, inputs = entry.site, []
    handle = model.get_submodule(site.gate).register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    monkeypatch.setattr(correction, "RANK", 10_000)
    found = gathered(model, entry, data(rows=32))
    handle.remove()
    down = down_matrix(model, site).double()
    x = torch.cat([each.flatten(0, -2) for each in inputs])
    with torch.no_grad():
        z = model.get_submodule(site.gate)(x).double()
        v = torch.ones_like(z)
        if site.layout == "packed":
            z, v = z.chunk(2, dim=-1)
        elif site.layout == "separate":
            v = model.get_submodule(site.up)(x).double()
    row = entry.scaling
    h = torch.nn.functional.gelu(row.a * z) * (row.beta * v)
    error = (activation(site.activation)(z) * v - h) @ down.T
    square = h.T @ h
    sizes = square.diagonal()
    penalty = RIDGE * torch.diag(sizes + FLOOR * sizes.mean())
    expected = torch.linalg.solve(square + penalty, h.T @ error).T
    for metric in (torch.zeros(len(down), len(down)), torch.cov(torch.randn(len(down), 40))):
        torch.testing.assert_close(found.solved(metric).down, expected, rtol=1e-3, atol=1e-5 * expected.abs().max())


def test_of_lower_rank_it_keeps_what_costs_most(monkeypatch):
    model = lively(tiny("llama"))
    entry = make_plan(model).converted[0]
    found = gathered(model, entry, data(rows=32))
    metric = torch.eye(entry.site.d_out)
    metric[5, 5] = 1e4  # an error of this output costs everything
    whole = found.solved(metric)
    monkeypatch.setattr(correction, "RANK", 1)
    part = found.solved(metric)
    assert part.left.shape == (entry.site.d_out, 1)
    assert torch.linalg.matrix_rank(part.down) == 1
    even = found.solved(torch.eye(entry.site.d_out))

    def off(line):
        return float((line.down[5] - whole.down[5]).norm() / whole.down[5].norm())

    assert off(part) < 0.05
    assert off(even) > 0.2
    assert found.line.left is None


def test_more_text_bears_a_higher_rank():
    assert strength(0) == strength(100) == strength(TOKENS) == (RANK, RIDGE)
    assert strength(4 * TOKENS) == (64, RIDGE / 2)
    assert strength(10**9)[0] == correction.MOST


def test_a_site_that_no_token_reached_is_not_corrected():
    model = tiny("llama")
    entry = make_plan(model).converted[0]
    found = Correction(entry, Coefficients.of(entry.scaling), down_matrix(model, entry.site))
    assert found.solved(torch.eye(entry.site.d_out)) is None


def test_in_many_passes_the_same_bits(monkeypatch):
    """Where the sums do not fit into memory together, the data pass more often."""
    model = lively(tiny("llama"))
    plan, calls = make_plan(model), []
    at_once = calibrate(model, plan, data(rows=64), progress=lambda *args: calls.append(args))
    assert calls[-1] == (24 * 2 + 8, 24 * 2 + 8)
    calls.clear()
    monkeypatch.setattr(correction, "MEMORY", 1)
    one_by_one = calibrate(model, plan, data(rows=64), progress=lambda *args: calls.append(args))
    assert calls[-1] == (24 * 3 + 8, 24 * 3 + 8)
    assert one_by_one.plan == at_once.plan
    for path, fit in at_once.fits.items():
        for name, tensor in fit.tensors().items():
            assert torch.equal(tensor, one_by_one.fits[path].tensors()[name])


def test_chosen_where_it_costs_less_and_replayed_bit_for_bit(tmp_path):
    from hf_geglu.hub.reproduce import reproduce_variant

    lively(tiny("llama")).save_pretrained(tmp_path / "base")
    model = type(tiny("llama")).from_pretrained(tmp_path / "base")
    plan, given = make_plan(model), CalibrationData(batches=data(rows=160, batch=8).batches, name="made up")
    made = calibrate(model, plan, given)
    chosen = [entry.fit for entry in made.plan.converted]
    assert CORRECTED in {fit.method for fit in chosen}
    for fit in chosen:
        if fit.method == CORRECTED:
            assert fit.error < fit.alternatives[PER_NEURON] < fit.alternatives["table"]
    hf_geglu.convert(model, made.plan, fits=made.fits)
    hf_geglu.forget_original(model)
    hf_geglu.save_folder(model, tmp_path / "variant")
    assert reproduce_variant(tmp_path / "variant", base=tmp_path / "base").ok
    assert CORRECTED in (tmp_path / "variant" / "README.md").read_text()
