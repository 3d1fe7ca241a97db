"""Narrow models of many architectures: what is planned, made, saved, loaded and put back; and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCAB, F, tiny
from versions import BEFORE_5

import hf_geglu
from hf_geglu.calibration import CalibrationData
from hf_geglu.conversions.whitened import FitSettings
from hf_geglu.errors import ConversionError, DataError, ManifestError, PlanError
from hf_geglu.hub.delta import save_delta
from hf_geglu.hub.reproduce import reproduce_variant
from hf_geglu.hub.verifying import verify_variant
from hf_geglu.narrowing import NarrowSettings, carry_out
from hf_geglu.narrowing.fidelity import fidelity, neighbour_agreement
from hf_geglu.narrowing.pipeline import narrow, study
from hf_geglu.narrowing.quick import SHORT, quick
from hf_geglu.narrowing.replay import Replay
from hf_geglu.narrowing.settings import HealSettings
from hf_geglu.narrowing.sums import Stop, Sum, find_sums, hooked
from hf_geglu.plan import Plan
from hf_geglu.planning import make_plan

QUICK = NarrowSettings(
    curve=(0.8,),
    fit=FitSettings(steps=20, batch=64, dtype=torch.float32),
    heal=HealSettings(passes=3, low_precision=False, warmup=2),
)


def batches(count, *, seed=0, padded=False):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, VOCAB, (6, 12), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[:3, 8:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def lively(kind, **changes):
    """A tiny model whose blocks do something: the weights of a fresh one are nearly zero."""
    model = tiny(kind, **changes).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def data_of(given):
    return CalibrationData(batches=tuple(given), name="made up")


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


KINDS = ["bert", "distilbert", "gpt2", "gptj", "gpt_neox", "opt", "llama", "phi3", "modernbert"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_model_is_saved_loaded_and_put_back(kind, tmp_path):
    model = lively(kind)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    given = batches(4)
    plan, fits = carry_out(model, make_plan(model, width=24), data_of(given), settings=QUICK)
    assert {entry.width for entry in plan.sites} == {24}
    hf_geglu.convert(model, plan, fits=fits)
    saved = logits(model, given[0])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, given[0]), saved)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    hf_geglu.revert(model)
    assert model.config.to_dict() == config
    now = model.state_dict()
    assert now.keys() == original.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_gated_models_stay_native(kind):
    plan = make_plan(lively(kind), width=24)
    assert plan.tier == "native"
    assert plan.config_changes["intermediate_size"] == 24
    assert plan.after.parameters < plan.before.parameters


def test_the_plan_says_that_it_is_lossy_before_and_by_how_much_after():
    model, given = lively("bert"), batches(8)
    plan = make_plan(model, width="matched")
    assert not plan.exact
    assert "LOSSY" in str(plan)
    assert "calibration data can tell" in str(plan)
    made, _ = carry_out(model, plan, data_of(given), settings=replace(QUICK, stage="local"))
    record = made.narrowing
    assert record is not None
    assert record.control is not None
    assert (record.control.width, record.control.stage) == (record.result.width, "local")
    assert not record.control.value_branch
    assert [point.width for point in record.curve] == [32, F]
    assert record.curve[-1].fidelity.kl < 1e-6  # the full width is exact
    assert f"{record.result.width} neurons, local, dense control: KL" in str(made)
    assert all(entry.fit.error > 0 for entry in made.sites)
    assert Plan.from_json(made.to_json()) == made


def test_stages_come_nearer_and_repeat():
    model, given = lively("gpt2"), batches(24)
    plan = make_plan(model, width=20)
    settings = replace(QUICK, heal=replace(QUICK.heal, passes=20), fit=replace(QUICK.fit, steps=150))
    studied = study(model, plan, given[:20], smallest=20, settings=settings)
    found = {}
    for stage in ("closed", "local", "heal"):
        fits, student = narrow(studied, plan, width=20, settings=replace(settings, stage=stage))
        found[stage] = fidelity(model, student, given[20:]).kl
    assert found["closed"] > found["local"] > found["heal"]
    again, _ = narrow(studied, plan, width=20, settings=replace(settings, stage="heal"))
    assert all(torch.equal(fits[up].gate, again[up].gate) for up in fits)


def test_the_closed_form_beats_dropping_the_same_neurons():
    model, given = lively("bert"), batches(24)
    plan = make_plan(model, width=20)
    studied = study(model, plan, given[:20], smallest=20, settings=QUICK)
    fits, student = narrow(studied, plan, width=20, settings=QUICK)
    dropped = copy.deepcopy(student)
    for entry in plan.sites:
        down = dropped.get_submodule(entry.site.down)
        keep = studied.orders[entry.site.up][-20:].sort().values
        down.weight.data.copy_(model.get_submodule(entry.site.down).weight[:, keep])
        down.bias.data.copy_(model.get_submodule(entry.site.down).bias)
    assert fidelity(model, student, given[20:]).kl < fidelity(model, dropped, given[20:]).kl
    assert all(torch.equal(fit.up, torch.zeros_like(fit.up)) for fit in fits.values())


def test_only_ffn_blocks_move_and_the_original_not_at_all():
    model, given = lively("bert"), batches(4)
    before = copy.deepcopy(model.state_dict())
    plan = make_plan(model, width=24)
    studied = study(model, plan, given, smallest=24, settings=QUICK)
    _, student = narrow(studied, plan, width=24, settings=replace(QUICK, stage="heal"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    blocks = [path for entry in plan.sites for path in (entry.site.up, entry.site.down)]
    others = [name for name in before if not any(name.startswith(path) for path in blocks)]
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in others)


def test_padding_is_not_calibrated_on():
    model = lively("bert")
    plan, given = make_plan(model, width=24), batches(3, padded=True)
    other = [{**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)} for batch in given]
    one, two = (study(model, plan, each, smallest=24, settings=QUICK) for each in (given, other))
    assert one.tokens == 3 * (3 * 12 + 3 * 8)
    for up in one.orders:
        assert torch.allclose(one.statistics[up].metric_DD, two.statistics[up].metric_DD, atol=1e-4)
        sums = (torch.cat(each.statistics[up].sums).float() for each in (one, two))
        assert torch.allclose(*sums, rtol=2**-7, atol=1e-4)  # they are kept in bfloat16


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_neurons_are_chosen_on_the_first_text_and_blocks_fitted_on_all(kind):
    model, given = lively(kind), batches(4, padded=True)
    plan = make_plan(model, width=24)
    few = replace(QUICK, selection_tokens=100)  # a batch has 60 that are no padding
    one, two, first = (
        study(model, plan, some, smallest=24, settings=settings)
        for some, settings in ((given, few), (given, QUICK), (given[:2], QUICK))
    )
    assert one.tokens == two.tokens == 240
    for up, each in one.statistics.items():
        assert torch.equal(one.orders[up], first.orders[up])
        assert torch.equal(each.metric_DD, first.statistics[up].metric_DD)
        assert torch.equal(torch.cat(each.sums), torch.cat(two.statistics[up].sums))


@pytest.mark.parametrize(
    ("kind", "end"), [("bert", "input"), ("gpt2", "output"), ("llama", "output"), ("gptj", "output")]
)
def test_the_sum_is_found_where_the_class_adds(kind, end):
    model = lively(kind)
    downs = [entry.site.down for entry in make_plan(model).sites]
    found = find_sums(model, batches(1)[0], downs)
    assert found.keys() == set(downs)
    assert {place.end for place in found.values()} == {end}


def test_an_output_that_is_normed_before_it_is_added_has_no_sum():
    model = lively("gemma2")
    downs = [site.down for site in hf_geglu.find_sites(model).sites]
    assert find_sums(model, batches(1)[0], downs) == {}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_replay_shows_what_whole_forwards_show(kind):
    model, given = lively(kind), batches(3)
    downs = [entry.site.down for entry in make_plan(model).sites]

    def seen(replay):
        shown = {}
        for down in downs:
            tensors = []

            def take(tensor, tensors=tensors):
                tensors.append(tensor)
                raise Stop

            with hooked(model, Sum(down, "output"), take), torch.no_grad():
                replay.visit(down, lambda number: None)
            shown[down] = tensors
        return shown

    with torch.no_grad():
        chained, whole = Replay(model, given, downs), Replay(model, given, downs)
    assert chained.chained
    whole.chained = False
    one, two = seen(chained), seen(whole)
    assert all(torch.allclose(a, b, atol=1e-6) for down in downs for a, b in zip(one[down], two[down], strict=True))


@pytest.mark.skipif(BEFORE_5, reason="in transformers 4 every expert is a module of its own, and can be narrowed")
def test_experts_keep_their_width():
    with pytest.raises(PlanError, match=r"stacked experts.*width='same'"):
        make_plan(tiny("mixtral"), width=24)


def test_a_part_of_the_layers_keeps_its_width():
    with pytest.raises(PlanError, match=r"one intermediate size for all layers.*leave out `layers=`"):
        make_plan(tiny("bert"), width="matched", layers="0")


def test_a_shared_block_keeps_its_width():
    model = lively("albert")
    with pytest.raises(ConversionError, match="shared between layers"):
        carry_out(model, make_plan(model, width=24), data_of(batches(4)), settings=QUICK)


def test_a_narrow_plan_is_not_carried_out_without_its_weights():
    model = lively("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="calibrat"):
        hf_geglu.convert(model, make_plan(model, width=24))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.intermediate_size == F


def test_one_call_narrows_saves_papers_and_says_what_cannot_be_replayed(tmp_path):
    model = lively("bert")
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base").eval()
    report = hf_geglu.convert(model, width="matched", narrow=QUICK, calibration=data_of(batches(8)))
    assert not report.exact
    folder = hf_geglu.save_folder(model, tmp_path / "narrow")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "lossy: the blocks have fewer neurons" in card
    assert "dense control: the same treatment, no value branch" in card
    assert verify_variant(folder).ok
    replay = reproduce_variant(folder, base=tmp_path / "base")
    assert replay.ok
    assert [check.outcome for check in replay.checks] == ["ok", "not checked"]
    assert "SHA-256" in replay.checks[1].detail
    with pytest.raises(ManifestError, match="save_folder"):
        save_delta(model, tmp_path / "delta", base=tmp_path / "base")


def test_too_little_text_is_refused():
    model = lively("bert")
    with pytest.raises(DataError, match="168 tokens to solve for 24 neurons; expected at least 192"):
        hf_geglu.convert(model, width=24, calibration=data_of(batches(3)))
    assert model.config.intermediate_size == F


def test_a_budget_does_not_go_with_fewer_neurons():
    model = lively("bert")
    with pytest.raises(PlanError, match="all of them become narrower or none"):
        hf_geglu.convert(model, width=24, calibration=data_of(batches(8)), max_kl=0.1)
    assert model.config.intermediate_size == F


def test_neighbours_agree_with_themselves():
    points = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(neighbour_agreement(points, points), torch.ones(30))
    assert torch.equal(neighbour_agreement(points, -points), torch.ones(30))  # cosines are the same
    others = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    assert neighbour_agreement(points, others).mean() < 0.6  # by chance 10 of 29


def test_short_sequences_on_a_cpu_are_computed_quickly_and_settings_come_back():
    def seen():
        return torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()

    def fail():
        assert seen() == ("medium", False)
        raise KeyError

    before, cpu = seen(), torch.device("cpu")
    with pytest.raises(KeyError), quick(batches(2), cpu):
        fail()
    assert seen() == before
    long = [{"input_ids": torch.ones(1, SHORT + 1, dtype=torch.long)}]
    for given, device in ((long, cpu), (batches(1), torch.device("cuda"))):
        with quick(given, device):
            assert seen() == before
