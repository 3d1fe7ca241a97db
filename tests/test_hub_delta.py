"""Plan + delta: megabytes that give back the full variant, on the right base only."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import TINY
from tiny_training import causal_tokenizer
from variants_on_disk import loaded_base, saved_base

import hf_geglu
from hf_geglu.cli import app as cli
from hf_geglu.errors import HfGegluError, ManifestError, OutputError
from hf_geglu.hub import save_folder
from hf_geglu.hub.delta import DELTA, load_delta, save_delta
from hf_geglu.hub.manifest import read_manifest
from hf_geglu.hub.reproduce import reproduce_variant
from hf_geglu.hub.verifying import verify_variant

IDS = torch.arange(4, 20)[None]


def _variant(tmp_path, model_type, **kwargs):
    base = saved_base(tmp_path / f"{model_type}-base", model_type)
    model = loaded_base(base, model_type, **kwargs)
    hf_geglu.convert(model)
    return model, base


def _train(model, *, only=lambda name: True, steps=2):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(only(name))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def _train_value_branch(model):
    """Only the value half of every packed projection moves (gpt2's Conv1D: columns; bias: second half)."""
    hooks = []
    for name, parameter in model.named_parameters():
        if "c_fc" in name:
            width = parameter.shape[-1] // 2
            mask = torch.zeros_like(parameter)
            mask[..., width:] = 1.0
            hooks.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask))
    return _train(model, only=lambda name: "c_fc" in name)


def _same_weights(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _auto(model_type):
    return TINY[model_type][0]


def test_a_trained_value_branch_comes_back_bit_for_bit(tmp_path):
    model, base = _variant(tmp_path, "gpt2")
    _train_value_branch(model)
    folder = save_delta(model, tmp_path / "delta", tokenizer=causal_tokenizer())
    tensors = load_file(folder / DELTA)
    assert sorted(tensors) == sorted(
        f"transformer.h.{layer}.mlp.c_fc.{name}" for layer in (0, 1) for name in ("weight", "bias")
    )
    width = model.config.n_inner
    assert all(tensor.shape[-1] <= width for tensor in tensors.values())  # the gate half is not in it
    again = load_delta(transformers.AutoModelForCausalLM, folder, base=base)
    assert type(again) is type(model)
    assert _same_weights(again, model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    full = save_folder(model, tmp_path / "full")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(full)
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    assert verify_variant(folder, base=base).ok
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "llama", "opt"])
def test_whatever_was_trained_is_found(tmp_path, model_type):
    model, base = _variant(tmp_path, model_type)
    touched = sorted(name for name, _ in model.named_parameters() if "1" in name and "norm" not in name.lower())
    _train(model, only=lambda name: name in touched)
    folder = save_delta(model, tmp_path / "delta")
    assert set(load_file(folder / DELTA)) <= set(touched)
    again = load_delta(None, folder, base=base)
    assert _same_weights(again, model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_tied_weights_and_sixteen_bits(tmp_path):
    model, base = _variant(tmp_path, "gpt2", dtype=torch.bfloat16)
    assert model.config.tie_word_embeddings
    _train(model, only=lambda name: "wte" in name)
    folder = save_delta(model, tmp_path / "delta")
    assert len(load_file(folder / DELTA)) == 1
    again = load_delta(None, folder, base=base)
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.transformer.wte.weight
    assert _same_weights(again, model)


def test_an_untrained_variant_is_an_empty_delta(tmp_path):
    model, base = _variant(tmp_path, "llama")
    folder = save_delta(model, tmp_path / "delta")
    assert load_file(folder / DELTA) == {}
    assert _same_weights(load_delta(None, folder, base=base), model)


# -- adapters ----------------------------------------------------------------------------------------------------------


def _lora(model, **options):
    peft = pytest.importorskip("peft")
    targets = ["c_fc"] if model.config.model_type.endswith("gpt2") else ["gate_proj", "up_proj"]
    conv = model.config.model_type.endswith("gpt2")
    config = peft.LoraConfig(target_modules=targets, r=2, fan_in_fan_out=conv, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_lora_comes_back(tmp_path, model_type):
    model, base = _variant(tmp_path, model_type)
    wrapped = _lora(model)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    wrapped.eval()
    folder = save_delta(wrapped, tmp_path / "delta")
    assert load_file(folder / DELTA) == {}
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    again = load_delta(_auto(model_type), folder, base=base)
    assert torch.equal(again.eval()(input_ids=IDS).logits, wrapped(input_ids=IDS).logits)
    assert verify_variant(folder, base=base).ok
    merged = load_delta(None, folder, base=base, merge=True)
    full = wrapped.merge_and_unload()
    assert _same_weights(merged, full)
    assert torch.equal(merged(IDS).logits, full(IDS).logits)
    for path in folder.rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
    card = (folder / "README.md").read_text()
    assert "load_delta(AutoModelForCausalLM" in card


def test_a_lora_with_a_module_that_is_trained_whole(tmp_path):
    model, base = _variant(tmp_path, "llama")
    wrapped = _lora(model, modules_to_save=["lm_head"])
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    folder = save_delta(wrapped.eval(), tmp_path / "delta")
    again = load_delta(None, folder, base=base)
    assert torch.equal(again.eval()(input_ids=IDS).logits, wrapped(input_ids=IDS).logits)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def delta(tmp_path):
    model, base = _variant(tmp_path, "gpt2")
    _train_value_branch(model)
    return save_delta(model, tmp_path / "delta"), base, model


def test_another_base_is_refused(delta, tmp_path):
    folder, base, _ = delta
    other = loaded_base(base, "gpt2")
    with torch.no_grad():
        other.transformer.h[0].attn.c_attn.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ManifestError, match=r"not the base that the variant was made from.*other weights"):
        load_delta(None, folder, base=tmp_path / "other")
    loaded_base(base, "gpt2").to(torch.float64).save_pretrained(tmp_path / "wide")
    assert load_delta(None, folder, base=tmp_path / "wide").dtype == torch.float32  # the dtype is the plan's
    model = loaded_base(base, "gpt2")
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "converted")
    with pytest.raises(HfGegluError):
        load_delta(None, folder, base=tmp_path / "converted")


def test_a_base_that_is_not_named(delta, tmp_path):
    folder, _, _ = delta
    with pytest.raises(ManifestError, match="--base FOLDER"):
        load_delta(None, folder)
    with pytest.raises(ManifestError, match="cannot be loaded"):
        load_delta(None, folder, base=tmp_path / "nowhere")


def test_wrong_ways_to_load(delta, tmp_path):
    folder, base, model = delta
    with pytest.raises(ManifestError, match="belongs to the dtype"):
        load_delta(None, folder, base=base, dtype=torch.bfloat16)
    with pytest.raises(HfGegluError, match="GPT2Model"):
        load_delta(transformers.AutoModel, folder, base=base)
    full = save_folder(model, tmp_path / "full")
    with pytest.raises(ManifestError, match="is no delta but a whole model"):
        load_delta(None, full, base=base)


def test_damaged_deltas(delta):
    folder, base, _ = delta
    content = (folder / DELTA).read_bytes()
    (folder / DELTA).write_bytes(content[:-64])
    with pytest.raises(ManifestError, match="cannot be read"):
        load_delta(None, folder, base=base)
    assert not verify_variant(folder, base=base).ok
    (folder / DELTA).write_bytes(content[:-4] + b"\x00\x00\x80?")
    with pytest.raises(ManifestError, match="are not what was saved"):
        load_delta(None, folder, base=base)


def test_models_that_have_no_delta(tmp_path):
    base = saved_base(tmp_path / "base", "gpt2")
    with pytest.raises(ManifestError, match="no plan that could be replayed"):
        save_delta(loaded_base(base, "gpt2"), tmp_path / "delta")
    model = loaded_base(base, "gpt2")
    hf_geglu.convert(model)
    model.resize_token_embeddings(70)
    with pytest.raises(ManifestError, match="keeps shapes"):
        save_delta(model, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        save_delta(_variant(tmp_path, "llama")[0], tmp_path / "full")


# -- command line ------------------------------------------------------------------------------------------------------


def _run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["hf-geglu", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_shrink_and_restore(tmp_path, monkeypatch, capsys):
    model, base = _variant(tmp_path, "gpt2")
    _train_value_branch(model)
    full = save_folder(model, tmp_path / "full", tokenizer=causal_tokenizer())
    code, out, err = _run(monkeypatch, capsys, "shrink", full, tmp_path / "small", "--base", base)
    assert code == 0, err
    assert "MiB" in out
    code, out, _ = _run(monkeypatch, capsys, "verify", tmp_path / "small", "--base", base)
    assert code == 0, out
    code, out, _ = _run(monkeypatch, capsys, "reproduce", tmp_path / "small", "--base", base)
    assert code == 0, out
    code, _, err = _run(monkeypatch, capsys, "restore", tmp_path / "small", tmp_path / "again", "--base", base)
    assert code == 0, err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()
    first, second = read_manifest(full), read_manifest(tmp_path / "again")
    assert first.weights == second.weights
    assert second.provenance.base.name == "gpt2-base"
    assert reproduce_variant(tmp_path / "again", base=base).ok
