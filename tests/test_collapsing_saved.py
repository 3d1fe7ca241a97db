"""A collapsed model on disk: an ordinary checkpoint, or a smaller variant, with papers that say so."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import tiny
from transformers import AutoConfig, AutoModelForMaskedLM

import hf_geglu
from hf_geglu.cli import app as cli
from hf_geglu.hub import save_folder
from hf_geglu.hub.manifest import MANIFEST, read_manifest
from hf_geglu.hub.papers import known_provenance
from hf_geglu.hub.reproduce import reproduce_variant
from hf_geglu.hub.verifying import verify_variant


def _run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["hf-geglu", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.fixture
def base(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# base\n")
    return tmp_path / "base"


@pytest.fixture
def variant(base, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(base)
    hf_geglu.convert(model)
    return save_folder(model, tmp_path / "variant")


def _trained(folder, target):
    """The variant with what training one layer's value branch would leave."""
    model = AutoModelForMaskedLM.from_pretrained(folder)
    weight = model.bert.encoder.layer[1].intermediate.dense.weight
    with torch.no_grad():
        weight[len(weight) // 2 :] += 0.01
    return save_folder(model, target)


def test_the_whole_model_is_its_base_again(base, variant, tmp_path, monkeypatch, capsys):
    code, out, err = _run(monkeypatch, capsys, "collapse", variant, tmp_path / "dense")
    assert code == 0, err
    assert "2 of 2 converted blocks become dense again, exactly" in out
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "dense" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "dense" / MANIFEST).exists()
    assert not (tmp_path / "dense" / "modeling_geglu.py").exists()
    card = ModelCard.load(tmp_path / "dense" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "bit for bit" in card.text
    assert "`base`" in card.text
    assert str(tmp_path) not in card.content


def test_a_trained_variant_says_what_stays(variant, tmp_path, monkeypatch, capsys):
    trained = _trained(variant, tmp_path / "trained")
    code, out, _ = _run(monkeypatch, capsys, "collapse", trained, tmp_path / "part", "--dry-run")
    assert code == 0
    assert "layer.1.intermediate.dense: stays, its value branch has learned" in out
    assert not (tmp_path / "part").exists()
    assert _run(monkeypatch, capsys, "collapse", trained, tmp_path / "part")[0] == 0
    assert len(AutoConfig.from_pretrained(tmp_path / "part").geglu["sites"]) == 1
    manifest = read_manifest(tmp_path / "part")
    assert manifest.trained
    assert [entry.site.layer for entry in manifest.provenance.plan.converted] == [1]
    assert manifest.provenance.reversal.paths == ("bert.encoder.layer.0.intermediate.dense",)
    assert json.loads(manifest.to_json()) == json.loads(type(manifest).from_json(manifest.to_json()).to_json())
    card = (tmp_path / "part" / "README.md").read_text()
    assert "its 1 feed-forward blocks converted" in card
    assert "trained since" in card
    assert "Dense again: 1 blocks whose value branch was constant (exactly)." in card
    assert "Left as they were" not in card
    assert verify_variant(tmp_path / "part").ok
    before, after = (AutoModelForMaskedLM.from_pretrained(folder) for folder in (trained, tmp_path / "part"))
    assert hf_geglu.compare(before, after, {"input_ids": torch.arange(20)[None]}).max_rel < 1e-5
    code, out, _ = _run(monkeypatch, capsys, "collapse", tmp_path / "part", tmp_path / "less")
    assert code == 1
    assert "nothing was changed" in out
    assert not (tmp_path / "less").exists()


def test_an_untrained_part_can_be_reproduced(base, variant, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(variant)
    hf_geglu.collapse(model, layers=0)
    part = save_folder(model, tmp_path / "part")
    manifest = read_manifest(part)
    assert not manifest.trained
    assert "not trained since" in (part / "README.md").read_text()
    assert verify_variant(part).ok
    replay = reproduce_variant(part, base=base)
    assert replay.ok, replay.differences
    assert {check.what: check.outcome for check in replay.checks}["step 0"] == "ok"


def test_revert_takes_the_papers_back_too(variant):
    model = AutoModelForMaskedLM.from_pretrained(variant)
    told = known_provenance(model)
    hf_geglu.collapse(model)
    assert known_provenance(model) is None
    hf_geglu.revert(model)
    assert known_provenance(model) == told


def test_collapsing_in_two_steps_is_collapsing_once(variant, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(variant)
    hf_geglu.collapse(model, layers=1)
    hf_geglu.collapse(model)
    card = (save_folder(model, tmp_path / "dense") / "README.md").read_text()
    assert "whose 2 converted feed-forward blocks" in card
    assert "bit for bit" in card


def test_the_command_measures_a_tolerance_on_text(variant, tmp_path, monkeypatch, capsys):
    """No tokenizer came with this one: the error says what to do."""
    trained = _trained(variant, tmp_path / "trained")
    code, _, err = _run(
        monkeypatch, capsys, "collapse", trained, tmp_path / "x", "--tolerance", "0.9", "--data", "builtin"
    )
    assert code == 2
    assert "has no tokenizer" in err
    assert not (tmp_path / "x").exists()
    assert _run(monkeypatch, capsys, "collapse", trained, tmp_path / "x", "--tolerance", "0.99")[0] == 0
    assert "within 0.99 of each neuron's value" in (tmp_path / "x" / "README.md").read_text()
