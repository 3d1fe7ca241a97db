"""A checkpoint that is calibrated and converted layer by layer is what loading, calibrating, converting and saving it
gives."""

import pytest
import torch
import transformers
from calibration_inputs import data, lively
from checkpoints import SHARD, edit_weights, files_in, weights_in
from test_calibration import CASES, inputs_for
from tiny_models import tiny

import hf_geglu
from hf_geglu.calibration import CalibrationData, calibrate
from hf_geglu.checkpoint import convert_checkpoint
from hf_geglu.checkpoint.rules import compute_buffers
from hf_geglu.errors import PlanError, StreamError, VerificationError, WeightsError
from hf_geglu.hub.reproduce import reproduce_variant
from hf_geglu.hub.verifying import verify_variant
from hf_geglu.planning import make_plan
from hf_geglu.skeleton import skeleton

ROUNDED = {"t5": "an encoder's output gets gradients from several layers, which are added in another order"}


def base(tmp_path, case, **more):
    tmp_path.mkdir(exist_ok=True)
    model = lively(tiny(case, **CASES.get(case, {}) | more))
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base", type(model)


def both(tmp_path, case, given, **settings):
    source, model_class = base(tmp_path, case)
    model = model_class.from_pretrained(source)
    report = hf_geglu.convert(model, calibration=given, verify="sites", **settings)
    model.save_pretrained(tmp_path / "memory", max_shard_size=SHARD)
    done = convert_checkpoint(source, tmp_path / "out", calibration=given, max_shard_size=SHARD, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "memory", "out"]
    return report, done


@pytest.mark.parametrize("case", CASES)
def test_the_same_files(tmp_path, case):
    report, done = both(tmp_path, case, inputs_for(case))
    assert done.report.note.endswith(report.note.split("; ", 1)[-1]) or report.note in done.report.note
    expected, found = files_in(tmp_path / "memory"), files_in(tmp_path / "out")
    if case in ROUNDED or "in parts" in done.report.note:
        parts = weights_in(tmp_path / "memory"), weights_in(tmp_path / "out")
        assert parts[0].keys() == parts[1].keys()
        for name, tensor in parts[0].items():
            if case in ROUNDED:
                torch.testing.assert_close(tensor, parts[1][name], rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(tensor, parts[1][name]), name
        expected, found = ({n: f[n] for n in f if ".safetensors" not in n} for f in (expected, found))
    assert sorted(expected) == sorted(found)
    assert [name for name in expected if expected[name] != found[name]] == []


def test_a_budget_is_measured_layer_by_layer(tmp_path):
    given = CalibrationData(batches=inputs_for("llama").batches * 2, name="made up")
    source, _ = base(tmp_path, "llama")
    everything = convert_checkpoint(source, tmp_path / "all", calibration=given)
    kl = float(everything.report.held_out.split()[1])
    report, done = both(tmp_path / "bounded", "llama", given, max_kl=kl * 0.7)
    assert "1 of 2 blocks left unconverted" in done.report.note
    assert done.report.held_out == report.held_out
    assert done.plan.tier == "portable"
    assert weights_in(tmp_path / "bounded" / "memory").keys() == weights_in(tmp_path / "bounded" / "out").keys()
    for name, tensor in weights_in(tmp_path / "bounded" / "memory").items():
        assert torch.equal(tensor, weights_in(tmp_path / "bounded" / "out")[name]), name
    with pytest.raises(PlanError, match="kept by no conversion"):
        convert_checkpoint(source, tmp_path / "never", calibration=given, max_kl=1e-15)
    with pytest.raises(PlanError, match="expected calibration="):
        convert_checkpoint(source, tmp_path / "never", max_kl=1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "base", "bounded"]


@pytest.mark.parametrize("case", ["llama", "mixtral", "opt"])
def test_fits_of_another_place_are_applied(tmp_path, case):
    """A plan with its fits, made in memory, carried out file by file."""
    source, model_class = base(tmp_path, case)
    model = model_class.from_pretrained(source)
    made = calibrate(model, make_plan(model), inputs_for(case))
    hf_geglu.convert(model, made.plan, fits=made.fits, verify="sites")
    model.save_pretrained(tmp_path / "memory")
    done = convert_checkpoint(source, tmp_path / "out", plan=made.plan, fits=made.fits, papers=True)
    assert len(done.report.sites) == len(made.plan.converted) or "stored in parts" in done.report.note
    for name, tensor in weights_in(tmp_path / "memory").items():
        assert torch.equal(tensor, weights_in(tmp_path / "out")[name]), name
    assert verify_variant(tmp_path / "out").ok
    assert reproduce_variant(tmp_path / "out", base=source).ok
    with pytest.raises(PlanError, match="holds no tensors"):
        convert_checkpoint(source, tmp_path / "never", plan=made.plan)
    with pytest.raises(PlanError, match="both given"):
        convert_checkpoint(source, tmp_path / "never", fits=made.fits, calibration=inputs_for(case))


def test_a_wrong_number_in_the_written_files_is_noticed(tmp_path, monkeypatch):
    """What is checked is what was written, the correction of the down projection too."""
    from hf_geglu.conversions import Coefficients

    source, _ = base(tmp_path, "llama")
    given = data(rows=160, batch=8)
    convert_checkpoint(source, tmp_path / "out", calibration=given)
    right = Coefficients.down_rows
    monkeypatch.setattr(Coefficients, "down_rows", lambda self, *rows: right(self, *rows) * 1.01)
    with pytest.raises(VerificationError, match="what was fitted"):
        convert_checkpoint(source, tmp_path / "wrong", calibration=given)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("case", ["llama", "bert", "mixtral", "gpt2"])
def test_in_16_bits(tmp_path, case):
    model = lively(tiny(case, **CASES.get(case, {}))).bfloat16()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base", dtype="auto")
    given = inputs_for(case)
    hf_geglu.convert(model, calibration=given, verify="sites")
    model.save_pretrained(tmp_path / "memory")
    convert_checkpoint(tmp_path / "base", tmp_path / "out", calibration=given)
    for name, tensor in weights_in(tmp_path / "memory").items():
        assert torch.equal(tensor, weights_in(tmp_path / "out")[name]), name


@pytest.mark.parametrize("model_type", ["gptj", "codegen", "llama", "t5", "deit", "swin"])
def test_buffers_are_those_of_loading(tmp_path, model_type):
    """In 16 bits too, where a table of positions depends on the dtype that it is computed in."""
    tiny(model_type).bfloat16().save_pretrained(tmp_path / "base")
    loaded = type(tiny(model_type)).from_pretrained(tmp_path / "base", dtype="auto")
    empty = skeleton(loaded.config, type(loaded), buffers=True)
    compute_buffers(empty)
    expected = dict(loaded.named_buffers())
    assert expected.keys() == dict(empty.named_buffers()).keys()
    for name, buffer in empty.named_buffers():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name


def test_some_layers_only(tmp_path):
    report, done = both(tmp_path, "llama", inputs_for("llama"), layers=0)
    assert done.report.held_out == report.held_out
    assert weights_in(tmp_path / "memory").keys() == weights_in(tmp_path / "out").keys()
    for name, tensor in weights_in(tmp_path / "memory").items():
        assert torch.equal(tensor, weights_in(tmp_path / "out")[name]), name


def test_what_cannot_be_run_by_layers_is_refused_with_the_reason(tmp_path):
    """A head that the checkpoint lacks would weigh errors by chance."""
    tiny("llama", auto=transformers.AutoModel).save_pretrained(tmp_path / "base")
    with pytest.raises(StreamError, match=r"does not hold lm_head\.weight"):
        convert_checkpoint(
            tmp_path / "base",
            tmp_path / "out",
            calibration=inputs_for("llama"),
            model_class=transformers.AutoModelForCausalLM,
        )
    edit_weights(tmp_path / "base", lambda tensors: {n: t / 0 if "layers.1" in n else t for n, t in tensors.items()})
    with pytest.raises(WeightsError, match="NaN or infinite"):
        convert_checkpoint(tmp_path / "base", tmp_path / "out", calibration=inputs_for("llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_another_calibration_starts_anew(tmp_path, monkeypatch):
    """What a calibration before has left is used by the same call only."""
    source, _ = base(tmp_path, "llama")

    class Stopped(BaseException):
        pass

    def stop(done, total):
        if done == total // 2:
            raise Stopped

    with pytest.raises(Stopped):
        convert_checkpoint(source, tmp_path / "out", calibration=data(), calibration_progress=stop)
    assert (tmp_path / ".out.partial" / "calibration").is_dir()
    convert_checkpoint(source, tmp_path / "out", calibration=data(seed=1))
    convert_checkpoint(source, tmp_path / "fresh", calibration=data(seed=1))
    assert files_in(tmp_path / "out") == files_in(tmp_path / "fresh")
    assert not (tmp_path / ".out.partial").exists()
