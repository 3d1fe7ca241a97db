"""inspect_gates: every number against one computed the long way, the model as before, memory that does not grow."""

import copy
import json
import math

import pytest
import torch
from tiny_models import tiny
from torch import nn
from typer.testing import CliRunner

import hf_geglu
from hf_geglu.errors import DataError, NoSitesError, SelectionError
from hf_geglu.functional import activation, gelu, silu
from hf_geglu.inputs import synthetic_inputs
from hf_geglu.inspecting.listen import Ear
from hf_geglu.inspecting.measure import CLOSED, DUPLICATE
from hf_geglu.inspecting.picture import draw
from hf_geglu.inspecting.sketch import BINS, Correlations, Histogram, Moments, edges, near_pairs, nearest_cosine


def _batches(model, count=3):
    return [synthetic_inputs(model, seed=seed) for seed in range(count)]


def _learned(model, size=0.3):
    """Value branches with weights, as after a training."""
    generator = torch.Generator().manual_seed(5)
    for site in hf_geglu.find_sites(model):
        for name in (f"{site.up}.weight", f"{site.up}.bias"):
            parameter = model.get_parameter(name)
            dim = 1 if site.projection == "conv1d" and name.endswith("weight") else 0
            half = parameter.narrow(dim, site.width, site.width)
            with torch.no_grad():
                half += torch.randn(half.shape, generator=generator).to(half) * size
    return model


def _heard(model, site, batches):
    """(z, v, h, y) of a block with two projections or a packed one, over all tokens, by hooks of its own."""
    gate, up, down = [], [], []
    hooks = [
        model.get_submodule(site.gate).register_forward_hook(lambda _m, _a, out: gate.append(out.detach())),
        model.get_submodule(site.up).register_forward_hook(lambda _m, _a, out: up.append(out.detach())),
        model.get_submodule(site.down).register_forward_hook(lambda _m, a, out: down.append((a[0].detach(), out))),
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()

    def flat(parts):
        return torch.cat([(part.movedim(site.dim, -1)).reshape(-1, part.shape[site.dim]) for part in parts]).double()

    z, v = flat(gate), flat(up)
    if site.gate == site.up:
        z, v = z[:, : site.width], (v[:, site.width :] if site.gated else None)
    return z, v, flat([a for a, _ in down]), flat([out for _, out in down])


@pytest.mark.parametrize("model_type", ["llama", "phi3", "bert", "gpt2", "convnext", "albert"])
def test_every_number_is_what_the_long_way_gives(model_type):
    model = tiny(model_type).double()
    if model_type not in ("llama", "phi3"):
        hf_geglu.convert(model)
        _learned(model)
    batches = _batches(model)
    report = hf_geglu.inspect_gates(model, batches)
    sites = hf_geglu.find_sites(model).sites
    assert [entry.path for entry in report.sites] == [site.up for site in sites]
    for site, entry in zip(sites, report.sites, strict=True):
        z, v, h, y = _heard(model, site, batches)
        f = activation(site.activation)(z)
        assert torch.allclose(f * v, h, atol=1e-12)  # the formula is the model's
        neurons = entry.neurons
        assert entry.tokens == len(z)
        assert not entry.reasons
        closed = (f.abs() < CLOSED).double().mean(0)
        assert torch.allclose(neurons.closed.double(), closed, atol=1e-6)
        assert entry.closed == pytest.approx(closed.mean().item(), abs=1e-6)
        assert entry.dead == int((closed == 1).sum())
        assert torch.allclose(neurons.mean.double(), z.mean(0), atol=1e-6)
        assert torch.allclose(neurons.std.double(), z.std(0, correction=0), atol=1e-6)
        assert torch.allclose(neurons.value_mean.double(), v.mean(0), atol=1e-5)
        assert torch.allclose(neurons.value_std.double(), v.std(0, correction=0), atol=1e-5)
        down = model.get_submodule(site.down)

        def lost(hidden, down=down, y=y, site=site):
            shaped = hidden if site.dim == -1 else hidden.T[None, :, :, None]
            answer = down(shaped.to(next(down.parameters())))
            answer = answer if site.dim == -1 else answer[0, :, :, 0].T
            return ((y - answer).var(0, correction=0).sum() / y.var(0, correction=0).sum()).item()

        with torch.no_grad():
            assert entry.value_share == pytest.approx(lost(f * v.mean(0)), rel=1e-4)
            assert entry.gate_share == pytest.approx(lost(v * f.mean(0)), rel=1e-4)
        weight = model.get_parameter(f"{site.down}.weight").detach().double()
        columns = weight.T if site.projection != "conv1d" else weight
        energy = h.var(0, correction=0) * columns.flatten(1).square().sum(1)
        assert torch.allclose(neurons.contribution.double(), energy / energy.sum(), atol=1e-6)
        correlation = torch.corrcoef(h.T).nan_to_num().fill_diagonal_(0.0)
        assert entry.duplicates == int((correlation.abs() >= DUPLICATE).any(1).sum())
        for one, other, size in entry.pairs:
            assert correlation[one, other].item() == pytest.approx(size, abs=1e-6)
        for low, share in ((neurons.low, 0.05), (neurons.median, 0.5), (neurons.high, 0.95)):
            exact = z.quantile(share, dim=0)
            width = 0.25 * torch.cosh(torch.asinh(exact / 0.25)) / 9  # of the bin there
            gaps = z.sort(0).values.diff(dim=0).abs().amax(0)  # few tokens: neighbours may be apart
            assert ((low.double() - exact).abs() <= 1.5 * width + gaps).all()
        assert entry.histogram.sum().item() == pytest.approx(1.0)


def test_value_branches_are_measured_from_their_start():
    model = tiny("bert")
    hf_geglu.convert(model)
    start = hf_geglu.inspect_gates(model)
    assert start.tokens == 0
    assert start.note.startswith("weights alone")
    assert all(site.learned == site.constant == site.value_over_gate == 0.0 for site in start.sites)
    assert all(site.closed is None and site.value_share is None for site in start.sites)
    dense = model.bert.encoder.layer[0].intermediate.dense
    half = dense.out_features // 2
    with torch.no_grad():
        dense.weight[half:] = 0.5 * dense.weight[:half]
        dense.bias[half:] = 3.0
    learned = hf_geglu.inspect_gates(model).sites
    assert learned[0].learned == pytest.approx(0.5)
    assert learned[0].constant == pytest.approx(2.0)
    assert learned[1].learned == 0.0


@pytest.mark.parametrize("model_type", ["opt", "t5"])
def test_a_sharpened_relu_is_measured_in_its_own_units(model_type):
    """gelu(128 z): closed and quantiles are those of ReLU, and the start at 1/128 is no departure."""
    model = tiny(model_type)
    batches = _batches(model)
    dense = hf_geglu.inspect_gates(model, batches)
    hf_geglu.convert(model)
    gated = hf_geglu.inspect_gates(model, batches, before=tiny(model_type))
    for before, now, told in zip(dense.sites, gated.sites, gated.before.sites, strict=True):
        assert before.unit == 1.0
        assert now.unit == 128.0
        assert now.learned == now.constant == 0.0
        assert before.closed == told.closed
        assert now.closed == pytest.approx(before.closed, abs=0.02)
        assert now.moved_gate == pytest.approx(127.0, rel=1e-5)
        assert now.moved_value is None  # it had none
        assert now.value_share == pytest.approx(0.0, abs=1e-9)
        assert torch.allclose(now.neurons.median, 128 * before.neurons.median, rtol=1e-4, atol=1e-3)


def test_dense_blocks_have_no_value_columns():
    model = tiny("bert")
    report = hf_geglu.inspect_gates(model, _batches(model))
    for site in report.sites:
        assert site.layout == "dense"
        assert site.value_over_gate is site.learned is site.value_share is site.gate_share is None
        assert site.closed is not None
        assert site.neurons.value_norm is None
    text = str(report)
    assert "closed" in text
    assert "Wv" not in text
    assert "gelu, dense" in text


def test_duplicate_and_dead_neurons_are_found():
    model = tiny("llama").double()
    block = model.model.layers[0].mlp
    with torch.no_grad():
        for projection in (block.gate_proj, block.up_proj):
            projection.weight[7] = projection.weight[3]
        block.up_proj.weight[9] = -2 * block.up_proj.weight[5]
        block.gate_proj.weight[9] = block.gate_proj.weight[5]
        block.gate_proj.weight[11] = 0.0  # silu(0) = 0: closed at every token
        block.down_proj.weight[:, 13] = 0.0
    report = hf_geglu.inspect_gates(model, _batches(model))
    pairs = {(one, other): size for one, other, size in report.sites[0].pairs}
    assert pairs[3, 7] == pytest.approx(1.0)
    assert pairs[5, 9] == pytest.approx(-1.0)
    assert report.sites[0].duplicates >= 4
    assert report.sites[0].neurons.closed[11] == 1.0
    assert report.sites[0].dead >= 1
    assert report.sites[0].empty == 1
    assert report.sites[0].neurons.twin[[3, 7, 5, 9]] == pytest.approx([1.0] * 4)


def test_the_model_is_as_it_was():
    model = tiny("bert").train()
    hf_geglu.convert(model)
    _learned(model)
    batch = _batches(model, 1)[0]
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    hf_geglu.inspect_gates(model, [batch])
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, before)


def test_listening_changes_no_output(monkeypatch):
    model = tiny("llama")
    batch = _batches(model, 1)[0]
    with torch.no_grad():
        before = model(**batch).logits
    seen = []
    forward = type(model).forward

    def watching(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        seen.append(output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", watching)
    hf_geglu.inspect_gates(model, [batch])
    assert len(seen) == 2
    assert all(torch.equal(each, before) for each in seen)


def test_hooks_come_off_after_an_error(monkeypatch):
    model = tiny("bert")

    def fail(*_):
        raise RuntimeError("as if")

    monkeypatch.setattr(Ear, "_parts", fail)
    with pytest.raises(RuntimeError, match="as if"):
        hf_geglu.inspect_gates(model, _batches(model, 1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_same_twice():
    model = tiny("llama")
    one, other = (hf_geglu.inspect_gates(model, _batches(model)).to_dict(neurons=True) for _ in range(2))
    assert one == other


def test_padding_is_left_out():
    model = tiny("bert").double()
    hf_geglu.convert(model)
    _learned(model)
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    both = hf_geglu.inspect_gates(model, [{"input_ids": ids, "attention_mask": mask}]).sites[0]
    alone = [{"input_ids": ids[:1, :4]}, {"input_ids": ids[1:]}]
    apart = hf_geglu.inspect_gates(model, alone).sites[0]
    assert both.tokens == apart.tokens == 11
    assert both.value_share == pytest.approx(apart.value_share, rel=1e-6)
    assert torch.allclose(both.neurons.mean, apart.neurons.mean, atol=1e-6)


def test_before_and_after():
    model = tiny("llama")
    original = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= 1.5
            layer.mlp.gate_proj.weight[0] += 1.0
    report = hf_geglu.inspect_gates(model, _batches(model), before=original, name="tuned")
    assert report.before.tokens == report.tokens
    for site, layer in zip(report.sites, original.model.layers, strict=True):
        assert site.moved_value == pytest.approx(0.5, rel=1e-5)
        assert site.moved_gate == pytest.approx(4 / layer.mlp.gate_proj.weight.norm().item(), rel=1e-5)
    assert "before -> now" in str(report)
    with pytest.raises(SelectionError, match="blocks before"):
        hf_geglu.inspect_gates(model, before=tiny("llama", num_hidden_layers=3))


def test_progress_counts_both_passes_of_both_models():
    model = tiny("bert")
    told = []
    hf_geglu.inspect_gates(model, _batches(model, 2), before=tiny("bert"), progress=lambda *at: told.append(at))
    assert told == [(done, 8) for done in range(1, 9)]


@pytest.mark.parametrize("converted", [False, True])
def test_experts_hear_their_routed_tokens(converted):
    model = tiny("mixtral")
    if converted:
        hf_geglu.convert(model)
    batches = _batches(model)
    report = hf_geglu.inspect_gates(model, batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    stacks = [site for site in report.sites if site.experts is not None]
    if not stacks:  # transformers 4: a module each
        assert sum(site.tokens for site in report.sites) == 2 * tokens
        return
    formula = activation(stacks[0].activation)
    heard = []
    hooks = [
        layer.mlp.experts.act_fn.register_forward_hook(lambda _m, a, _o: heard.append(a[0].detach()))
        for layer in model.model.layers
    ]
    assert len({id(layer.mlp.experts.act_fn) for layer in model.model.layers}) == 2
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    closed = torch.cat([(formula(z).abs() < CLOSED).flatten() for z in heard]).double().mean().item()
    assert sum(site.tokens for site in stacks) == sum(len(z) for z in heard) == 2 * tokens
    assert [sum(site.experts) for site in stacks] == [tokens, tokens]
    assert sum(site.closed for site in stacks) / 2 == pytest.approx(closed)
    assert "routed tokens only" in str(report)


def test_the_kernel_of_experts_is_put_back():
    model = tiny("mixtral")
    before = getattr(model.config, "_experts_implementation", None)
    hf_geglu.inspect_gates(model, _batches(model, 1))
    assert getattr(model.config, "_experts_implementation", None) == before


def test_a_model_without_blocks_is_refused():
    with pytest.raises(NoSitesError):
        hf_geglu.inspect_gates(nn.Linear(3, 3))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)
        self.act, self.norm, self.down = nn.SiLU(), nn.LayerNorm(12), nn.Linear(12, 8)

    def forward(self, hidden_states):
        return self.down(self.norm(self.act(self.gate(hidden_states)) * self.up(hidden_states)))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Normed()])

    def forward(self, hidden_states):
        return hidden_states + self.layers[0](hidden_states)


def test_a_norm_after_the_unit_is_noticed():
    torch.manual_seed(0)
    (site,) = hf_geglu.inspect_gates(Stack(), [{"hidden_states": torch.randn(2, 5, 8)}]).sites
    assert site.value_share is None
    assert "something stands between" in site.reasons[0]
    assert site.closed is not None


# -- sketches ----------------------------------------------------------------------------------------------------------


def test_moments_do_not_cancel():
    values = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e7
    moments = Moments()
    for part in values.split(100):
        moments.add(part)
    assert torch.allclose(moments.mean_F, values.mean(0), rtol=1e-14)
    assert torch.allclose(moments.variance_F, values.var(0, correction=0), rtol=1e-6)


def test_closed_is_where_the_docstring_says():
    assert gelu(torch.tensor(-3.0, dtype=torch.float64)).abs() == pytest.approx(CLOSED, rel=0.05)
    assert silu(torch.tensor(-7.6, dtype=torch.float64)).abs() == pytest.approx(CLOSED, rel=0.05)


@pytest.mark.parametrize("unit", [1.0, 128.0])
def test_histogram_bins_and_quantiles(unit):
    z = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)) * 2 * unit
    histogram = Histogram(3, unit)
    for part in z.split(3000):
        histogram.add(part)
    assert histogram.counts_FB.shape == (3, BINS)
    assert (histogram.counts_FB.sum(1) == len(z)).all()
    borders = edges(unit)
    for column, counts in zip(z.T.double(), histogram.counts_FB, strict=True):
        expected = torch.histogram(column.contiguous(), borders).hist
        assert (expected - counts).abs().max() <= 2  # a border in float32
    for share in (0.05, 0.5, 0.95):
        exact = z.double().quantile(share, dim=0)
        width = 0.25 * unit * torch.cosh(torch.asinh(exact / (0.25 * unit))) / 9
        assert ((histogram.quantile_F(share) - exact).abs() <= width).all()


def test_sketched_correlations_are_near_the_true_ones():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(4000, 1, generator=generator)
    noise = torch.randn(4000, 40, generator=generator)
    hidden = noise.clone()
    hidden[:, :3] = common + 0.1 * noise[:, :3] + 5.0  # 0.99 to each other, around another mean
    sketch = Correlations(40, seed=1)
    for part in hidden.split(500):
        sketch.add(part)
    pairs = sketch.candidates(hidden.double().mean(0), 0.9, 100)
    assert {tuple(pair) for pair in pairs.tolist()} == {(0, 1), (0, 2), (1, 2)}


def test_pairs_block_by_block():
    rows = torch.randn(70, 6, generator=torch.Generator().manual_seed(0))
    rows[60] = -3 * rows[5]
    rows[10] = 0.0
    whole, parts = near_pairs(rows, 0.8, 1000, block=1000), near_pairs(rows, 0.8, 1000, block=7)
    assert torch.equal(whole, parts)
    assert whole[0].tolist() == [5, 60]
    assert 10 not in whole
    assert len(near_pairs(rows, 0.0, 5, block=7)) == 5
    cosine = torch.nn.functional.normalize(rows, dim=1)
    expected = (cosine @ cosine.T).fill_diagonal_(0.0).abs().amax(1)
    assert torch.allclose(nearest_cosine(rows, block=9), expected, atol=1e-6)


def test_memory_does_not_grow_with_tokens():
    """What is kept after ten times the tokens has the same size."""

    def kept(count):
        from hf_geglu.inspecting import measure

        held = []
        original = measure.FirstPass.__init__

        def watching(self, place):
            original(self, place)
            held.append(self)

        measure.FirstPass.__init__ = watching
        try:
            model = tiny("llama")
            hf_geglu.inspect_gates(model, _batches(model, 1) * count)
        finally:
            measure.FirstPass.__init__ = original
        tensors = [t for each in held for part in vars(each).values() for t in _tensors(part)]
        return sum(t.numel() * t.element_size() for t in tensors)

    assert kept(20) == kept(2) <= 2 * 40 * 1700


def _tensors(part):
    if isinstance(part, torch.Tensor):
        yield part
    elif hasattr(part, "__dict__"):
        yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor))


# -- picture, JSON, command --------------------------------------------------------------------------------------------


def test_plots(tmp_path):
    model = tiny("bert")
    before = copy.deepcopy(model)
    hf_geglu.convert(model)
    _learned(model)
    report = hf_geglu.inspect_gates(model, _batches(model), before=before)
    png, svg = draw(report, tmp_path / "gates", title="tiny")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = svg.read_text()
    for panel in ("what goes into the gates", "closed gates", "how far the value branch left its start", "before"):
        assert panel in text
    assert draw(report, tmp_path / "again", title="tiny")[1].read_bytes() == svg.read_bytes()
    with pytest.raises(DataError, match="no block was run on text"):
        draw(hf_geglu.inspect_gates(model), tmp_path / "none")


def test_json_holds_every_neuron():
    model = tiny("llama")
    data = json.loads(json.dumps(hf_geglu.inspect_gates(model, _batches(model)).to_dict(neurons=True)))
    neurons = data["sites"][0]["neurons"]
    assert len(neurons["closed"]) == data["sites"][0]["width"]
    assert all(math.isfinite(value) for value in neurons["contribution"])
    assert "neurons" not in hf_geglu.inspect_gates(model).to_dict()["sites"][0]


def test_the_command(tmp_path):
    from tiny_training import causal_tokenizer

    from hf_geglu.cli.app import app

    model = tiny("gpt2", vocab_size=len(causal_tokenizer()))
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "before")
    _learned(model).save_pretrained(tmp_path / "now")
    causal_tokenizer().save_pretrained(tmp_path / "now")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    runner = CliRunner()
    words = ["inspect", str(tmp_path / "now"), "--before", str(tmp_path / "before")]
    shown = runner.invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "weights alone" in shown.output
    words += ["--data", str(tmp_path / "text.txt"), "--tokens", "200"]
    words += ["--plot", str(tmp_path / "gates"), "--json", str(tmp_path / "gates.json")]
    shown = runner.invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "gates.png").exists()
    assert (tmp_path / "gates.svg").exists()
    data = json.loads((tmp_path / "gates.json").read_text())
    assert data["tokens"] == 192  # whole blocks of 32, what this model takes
    assert data["before"]["sites"][0]["learned"] == 0.0
    assert data["sites"][0]["learned"] > 0
    refused = runner.invoke(app, ["inspect", str(tmp_path / "now"), "--plot", "x"])
    assert refused.exit_code != 0
