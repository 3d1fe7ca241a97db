"""verify and reproduce: what is as its manifest says passes, and everything else is named."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from variants_on_disk import loaded_base, saved_base, saved_variant

import hf_geglu
from hf_geglu.cli import app as cli
from hf_geglu.errors import ManifestError
from hf_geglu.hub import save_folder
from hf_geglu.hub.documenting import document_folder
from hf_geglu.hub.manifest import GOLDEN, MANIFEST, read_manifest
from hf_geglu.hub.reproduce import reproduce_variant
from hf_geglu.hub.verifying import verify_variant

TYPES = ["bert", "gpt2", "llama", "vit", "t5", "whisper", "clip"]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_saved_variant_verifies_and_reproduces(tmp_path, model_type):
    folder, base = saved_variant(tmp_path, model_type)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    checked = verify_variant(folder)
    assert checked.ok, checked.differences
    assert any("the same bits" in check.detail for check in checked.checks if check.what.startswith("golden "))
    assert {check.outcome for check in checked.checks} == {"ok"}
    again = reproduce_variant(folder, base=base)
    assert again.ok, again.differences
    assert any(check.what == "model.safetensors" and "the same bits" in check.detail for check in again.checks)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert (folder / GOLDEN).stat().st_size < 32_000


def test_shards_and_partial_conversions(tmp_path):
    folder, base = saved_variant(tmp_path, "gpt2", shards="8KB", layers=0)
    assert len(read_manifest(folder).files) > 5
    assert verify_variant(folder).ok
    assert reproduce_variant(folder, base=base).ok


def test_sixteen_bits(tmp_path):
    base = saved_base(tmp_path / "base", "llama")
    model = loaded_base(base, "llama", dtype=torch.bfloat16)
    hf_geglu.convert(model)
    folder = save_folder(model, tmp_path / "v")
    assert verify_variant(folder).ok
    assert reproduce_variant(folder, base=base).ok


def _differences(folder):
    return " | ".join(f"{check.what}: {check.detail}" for check in verify_variant(folder).differences)


def test_one_changed_weight_is_seen(tmp_path):
    folder, _ = saved_variant(tmp_path, "bert")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 5] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model.safetensors: SHA-256" in _differences(folder)


def test_changed_weights_under_a_forged_sha_are_seen(tmp_path):
    """Whoever edits the manifest too is caught by fingerprint and golden outputs."""
    folder, _ = saved_variant(tmp_path, "gpt2")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.0.mlp.c_fc.weight"][:, :20] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    _forge(folder)
    told = _differences(folder)
    assert "loaded weights: it has the same architecture but other weights" in told
    assert "golden logits" in told


def _forge(folder):
    from dataclasses import replace

    from hf_geglu.hub.manifest import sealed_files, write_manifest

    write_manifest(folder, replace(read_manifest(folder), files=sealed_files(folder)))


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu_pytorch_tanh"])
def test_another_activation_is_seen_by_blocks_and_outputs(tmp_path, activation):
    folder, _ = saved_variant(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": activation}))
    assert "config.json: SHA-256" in _differences(folder)
    _forge(folder)
    told = _differences(folder)
    assert "FFN blocks: 2 of 2 do not compute geglu, model.layers.0.mlp.up_proj first" in told
    if activation != "gelu_pytorch_tanh":  # 5e-4 at most a neuron: in a tiny model within rounding
        assert "golden logits" in told


def test_added_missing_and_truncated_files(tmp_path):
    folder, _ = saved_variant(tmp_path, "bert")
    shutil.copy(folder / "model.safetensors", folder / "extra.safetensors")
    assert "extra.safetensors: is not in the manifest" in _differences(folder)
    (folder / "extra.safetensors").unlink()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])
    assert "truncated" in _differences(folder)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "modeling_geglu.py").unlink()
    assert "modeling_geglu.py: is in the manifest and not here" in _differences(folder)


def test_damaged_golden_outputs(tmp_path):
    folder, _ = saved_variant(tmp_path, "bert")
    tensors = load_file(folder / GOLDEN)
    save_file(tensors, folder / GOLDEN, metadata={"golden": "{}"})
    _forge(folder)
    assert "golden outputs: golden.safetensors cannot be read" in _differences(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: None, "has no geglu/manifest.json.*hf-geglu document"),
        (lambda data: "{", "cannot be read"),
        (lambda data: "[]", "cannot be read"),
        (lambda data: json.dumps({**data, "schema": 99}), "schema 99.*upgrade"),
        (lambda data: json.dumps({key: data[key] for key in data if key != "files"}), "cannot be read"),
        (lambda data: json.dumps({**data, "provenance": 3}), "cannot be read"),
        (lambda data: json.dumps({**data, "surprise": 3}), "another version"),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path, edit, message):
    folder, _ = saved_variant(tmp_path, "bert")
    text = edit(json.loads((folder / MANIFEST).read_text()))
    (folder / MANIFEST).unlink() if text is None else (folder / MANIFEST).write_text(text)
    with pytest.raises(ManifestError, match=message):
        verify_variant(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(ManifestError, match="nowhere"):
        verify_variant(tmp_path / "nowhere")


# -- reproduce ---------------------------------------------------------------------------------------------------------


def test_another_base_is_refused(tmp_path):
    folder, base = saved_variant(tmp_path, "bert")
    model = loaded_base(base, "bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.add_(1e-3)
    model.save_pretrained(tmp_path / "other")
    again = reproduce_variant(folder, base=tmp_path / "other")
    assert [check.what for check in again.differences] == ["base"]
    assert "other weights" in again.differences[0].detail


def test_a_local_base_must_be_named(tmp_path):
    folder, _ = saved_variant(tmp_path, "bert")
    with pytest.raises(ManifestError, match="--base FOLDER"):
        reproduce_variant(folder)
    with pytest.raises(ManifestError, match="cannot be loaded"):
        reproduce_variant(folder, base=tmp_path / "nowhere")


def test_other_bytes_are_explained(tmp_path):
    folder, base = saved_variant(tmp_path, "bert")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "pt", "made": "by another version"})
    _forge(folder)
    again = reproduce_variant(folder, base=base)
    assert again.ok
    assert "the file's header is another" in again.checks[-1].detail
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 5] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    _forge(folder)
    again = reproduce_variant(folder, base=base)
    assert "1 of" in again.differences[0].detail
    assert "bert.encoder.layer.1.output.dense.weight most: 0.5" in again.differences[0].detail


def test_a_trained_variant_says_what_is_reproducible(tmp_path):
    base = saved_base(tmp_path / "base", "gpt2")
    model = loaded_base(base, "gpt2")
    hf_geglu.convert(model)
    _train_a_step(model)
    folder = save_folder(model, tmp_path / "v")
    assert read_manifest(folder).trained
    assert verify_variant(folder).ok
    again = reproduce_variant(folder, base=base)
    assert again.ok
    assert [check.outcome for check in again.checks] == ["ok", "ok", "not checked"]
    assert "other means" in again.checks[-1].detail
    assert "trained since by other means" in (folder / "README.md").read_text()


def _train_a_step(model):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(4, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


# -- where provenance comes from ---------------------------------------------------------------------------------------


def test_a_loaded_variant_keeps_its_provenance_when_saved_again(tmp_path):
    folder, base = saved_variant(tmp_path, "llama")
    again = save_folder(transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "again")
    first, second = read_manifest(folder), read_manifest(again)
    assert second.provenance == first.provenance
    assert second.provenance.base.name == "llama-base"
    assert reproduce_variant(again, base=base).ok
    assert "license: apache-2.0" in (again / "README.md").read_text()


def test_a_reverted_model_is_no_variant(tmp_path):
    base = saved_base(tmp_path / "base", "llama")
    model = loaded_base(base, "llama")
    hf_geglu.convert(model)
    hf_geglu.revert(model)
    folder = save_folder(model, tmp_path / "plain")
    assert not (folder / MANIFEST).exists()
    assert not (folder / "README.md").exists()


def test_a_pickled_native_variant_needs_no_hf_geglu(tmp_path):
    model = tiny("llama")
    hf_geglu.convert(model)
    hf_geglu.forget_original(model)
    path = tmp_path / "model.pt"
    torch.save(model, path)
    assert b"hf_geglu.provenance" not in path.read_bytes()
    loaded = torch.load(path, weights_only=False)
    assert loaded.config.hidden_act == "gelu"


def test_hub_ids_and_cached_snapshots_are_told_from_folders(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from hf_geglu.provenance import base_of

    commit = "a" * 40
    named = base_of(SimpleNamespace(_name_or_path="openai-community/gpt2", _commit_hash=commit))
    assert (named.id, named.commit) == ("openai-community/gpt2", commit)
    cached = f"/home/ada/.cache/huggingface/hub/models--openai-community--gpt2/snapshots/{commit}"
    assert base_of(SimpleNamespace(_name_or_path=cached)) == named
    local = base_of(SimpleNamespace(_name_or_path="/home/ada/models/gpt2"))
    assert (local.id, local.name) == (None, "gpt2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert base_of(SimpleNamespace(_name_or_path="org/model")).id is None
    assert base_of(SimpleNamespace(_name_or_path="")).name is None


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_plainly_saved_folder_is_documented_by_its_base(tmp_path, model_type):
    base = saved_base(tmp_path / "base", model_type)
    model = loaded_base(base, model_type)
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "plain")
    manifest = document_folder(tmp_path / "plain", base=base)
    assert not manifest.trained
    assert verify_variant(tmp_path / "plain").ok
    assert reproduce_variant(tmp_path / "plain", base=base).ok
    with pytest.raises(ManifestError, match="already"):
        document_folder(tmp_path / "plain", base=base)
    _train_a_step(model)
    model.save_pretrained(tmp_path / "trained")
    assert document_folder(tmp_path / "trained", base=base).trained
    assert reproduce_variant(tmp_path / "trained", base=base).ok


def test_documenting_refuses_what_the_base_does_not_explain(tmp_path):
    base = saved_base(tmp_path / "base", "gpt2")
    model = loaded_base(base, "gpt2")
    hf_geglu.convert(model, layers=0)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ManifestError, match="layers"):
        document_folder(tmp_path / "plain", base=base)
    assert not (tmp_path / "plain" / MANIFEST).exists()
    assert document_folder(tmp_path / "plain", base=base, layers=0).provenance.plan is not None


# -- command line ------------------------------------------------------------------------------------------------------


def _run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["hf-geglu", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_exit_codes_and_the_command_in_the_manifest(tmp_path, monkeypatch, capsys):
    base = saved_base(tmp_path / "base", "gpt2")
    folder = tmp_path / "out"
    assert _run(monkeypatch, capsys, "convert", base, folder)[0] == 0
    assert read_manifest(folder).command == "hf-geglu convert base out"
    code, out, _ = _run(monkeypatch, capsys, "verify", folder)
    assert code == 0
    assert "nothing differs" in out
    code, out, _ = _run(monkeypatch, capsys, "reproduce", folder, "--base", base)
    assert code == 0
    assert "the same bits" in out
    (folder / "modeling_geglu.py").write_text("# other code\n")
    code, out, _ = _run(monkeypatch, capsys, "verify", folder)
    assert code == 1
    assert "1 checks differ" in out
    code, _, err = _run(monkeypatch, capsys, "verify", base)
    assert code == 2
    assert err.startswith("error: base has no geglu/manifest.json")
    loaded_base(base, "gpt2").save_pretrained(tmp_path / "x")
    assert _run(monkeypatch, capsys, "document", tmp_path / "x", "--base", base)[0] == 2
