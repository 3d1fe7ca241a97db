"""Saved variants load bit-identically in a fresh process in every way that applies (wrong loads: test_failures.py)."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from fresh_process import expected_outputs, read_in_fresh_process
from tiny_models import TINY, tiny

import hf_geglu
from hf_geglu.errors import OutputError, WeightsError
from hf_geglu.hub import save_folder
from hf_geglu.modeling_geglu import VariantLoadError

PORTABLE = [
    "bert",
    "gpt2",
    "opt",
    "vit",
    "whisper",
    "t5",
    "albert",
    "bloom",
    "clip",
    "deberta-v2",
    "distilbert",
    "bart",
]
NATIVE = ["llama", "phi3", "mistral", "qwen2"]


def _auto(model_type):
    auto = TINY[model_type][0]
    return auto.__name__ if auto.__name__.startswith("Auto") else "AutoModel"


def _saved(tmp_path: Path, model_type: str, *, shards: str = "5GB", dtype=None, **options) -> dict[str, str]:
    model = tiny(model_type)
    if dtype is not None:  # loaded rather than cast: model.to() would round rotary tables too, which loading does not
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base", dtype=dtype)
    hf_geglu.convert(model, **options)
    folder = tmp_path / f"{model_type}-{shards}-{dtype}"
    model.save_pretrained(folder, max_shard_size=shards)
    expected = tmp_path / f"{model_type}-{dtype}.safetensors"
    expected_outputs(model, expected)
    return {"auto": _auto(model_type), "folder": str(folder), "expected": str(expected)}


def _assert_identical(jobs):
    for job, result in zip(jobs, read_in_fresh_process(jobs), strict=True):
        assert result["difference"] == 0.0, (job, result)
        assert result["missing"] == [], (job, result)
        assert result["unexpected"] == [], (job, result)


@pytest.mark.parametrize("how", ["plugin", "remote"])
def test_portable_variants_reload_identically(tmp_path, how):
    jobs = [_saved(tmp_path, model_type) for model_type in PORTABLE]
    jobs += [_saved(tmp_path, model_type, shards="8KB") for model_type in ("bert", "gpt2", "vit")]
    jobs += [_saved(tmp_path, "bert", dtype=torch.bfloat16), _saved(tmp_path, "llama", layers=0)]
    sharded = Path(jobs[len(PORTABLE)]["folder"])
    assert len(list(sharded.glob("*.safetensors"))) > 3
    _assert_identical([{**job, "how": how} for job in jobs])


def test_classes_that_transformers_does_not_export_reload_as_remote_code(tmp_path):
    from transformers.models.altclip.modeling_altclip import AltRobertaModel

    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AltCLIPTextConfig(vocab_size=64, max_position_embeddings=32, project_dim=16, **sizes)
    model = AltRobertaModel(config).eval()
    if hasattr(transformers, "AltRobertaModel"):
        pytest.skip("this version exports AltRobertaModel")
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "v")
    expected_outputs(model, tmp_path / "expected.safetensors")
    job = {"auto": "AutoModel", "folder": str(tmp_path / "v"), "expected": str(tmp_path / "expected.safetensors")}
    _assert_identical([{**job, "how": "remote"}])


@pytest.mark.parametrize("how", ["plain", "plugin"])
def test_native_variants_reload_identically(tmp_path, how):
    jobs = [_saved(tmp_path, model_type) for model_type in NATIVE]
    jobs += [_saved(tmp_path, "llama", shards="8KB"), _saved(tmp_path, "qwen2", dtype=torch.bfloat16)]
    _assert_identical([{**job, "how": how} for job in jobs])
    for job in jobs:
        folder = Path(job["folder"])
        assert not list(folder.glob("*.py"))
        assert "geglu" not in (folder / "config.json").read_text()


def test_other_heads_open_a_variant(tmp_path):
    model = tiny("bert")
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "v")
    ids = torch.arange(4, 12)[None]
    expected = model(ids, output_hidden_states=True).hidden_states[-1]
    for auto in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
        other, info = getattr(transformers, auto).from_pretrained(tmp_path / "v", output_loading_info=True)
        assert type(other).__name__.startswith("GegluBert")
        assert not [name for name in info["missing_keys"] if "encoder" in name]
        assert torch.equal(other(ids, output_hidden_states=True).hidden_states[-1], expected)


def test_a_variant_of_the_base_model_opens_with_a_head(tmp_path):
    model = tiny("gpt2", auto=transformers.AutoModel)
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "v")
    ids = torch.arange(4, 12)[None]
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "v")
    assert torch.equal(other.transformer(ids).last_hidden_state, model(ids).last_hidden_state)


def test_one_tower_of_an_encoder_decoder(tmp_path):
    model = tiny("t5")
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "v")
    ids = torch.arange(4, 12)[None]
    from hf_geglu.modeling_geglu import GegluT5EncoderModel

    encoder = GegluT5EncoderModel.from_pretrained(tmp_path / "v")
    assert torch.equal(encoder(ids).last_hidden_state, model.encoder(ids).last_hidden_state)


def test_loaded_variant_saves_again(tmp_path):
    model = tiny("gpt2")
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "one")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert first["geglu"] == second["geglu"]
    assert first["auto_map"] == second["auto_map"]
    assert (tmp_path / "two" / "modeling_geglu.py").is_file()
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_generate_and_cache(tmp_path):
    model = tiny("gpt2").eval()
    ids = torch.arange(4, 12)[None]
    before = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    hf_geglu.convert(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), before)
    model.save_pretrained(tmp_path / "v")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "v")
    assert torch.equal(loaded.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), before)


@pytest.fixture
def variant(tmp_path):
    model = tiny("bert")
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "v")
    return tmp_path / "v"


def test_config_without_sites_is_refused():
    from hf_geglu.modeling_geglu import GegluBertConfig, GegluBertForMaskedLM

    with pytest.raises(VariantLoadError, match="geglu_config"):
        GegluBertForMaskedLM(GegluBertConfig())


# -- from_pretrained and folders ---------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    model = tiny("bert")
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    return tmp_path / "base", model


def test_from_pretrained_converts_while_loading(base, tmp_path):
    folder, model = base
    loaded, report = hf_geglu.from_pretrained(transformers.AutoModelForMaskedLM, folder, output_report=True)
    assert report.exact
    ids = torch.arange(4, 12)[None]
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)
    loaded.save_pretrained(tmp_path / "v")
    again, report = hf_geglu.from_pretrained(transformers.AutoModelForMaskedLM, tmp_path / "v", output_report=True)
    assert report is None
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_a_config_that_was_read_from_a_file_says_what_the_model_became(base):
    model = transformers.AutoModel.from_pretrained(base[0])
    hf_geglu.convert(model)
    assert model.config.model_type == "geglu_bert"
    hf_geglu.revert(model)
    assert model.config.model_type == "bert"


def _shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def test_missing_shard(base):
    folder, _ = base
    gone = _shards(folder)[1]
    gone.unlink()
    with pytest.raises(WeightsError, match=gone.name):
        hf_geglu.from_pretrained(transformers.AutoModelForMaskedLM, folder)


@pytest.mark.parametrize("keep", [4, 40, -100])
def test_truncated_shard(base, keep):
    folder, _ = base
    shard = _shards(folder)[1]
    size = shard.stat().st_size
    os.truncate(shard, keep if keep > 0 else size + keep)
    with pytest.raises(WeightsError, match=rf"{shard.name}.*truncated"):
        hf_geglu.from_pretrained(transformers.AutoModelForMaskedLM, folder)


def test_checkpoint_that_lacks_a_block(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny("bert").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "layer.1.intermediate" not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks 2 tensors.*layer\.1\.intermediate"):
        hf_geglu.from_pretrained(transformers.AutoModelForMaskedLM, tmp_path / "base")


def _content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_save_folder_is_all_or_nothing(tmp_path, monkeypatch):
    model = tiny("bert")
    hf_geglu.convert(model)
    target = save_folder(model, tmp_path / "out")
    assert (target / "config.json").is_file()
    with pytest.raises(OutputError, match="not empty"):
        save_folder(model, target)
    before = _content(target)

    class Tokenizer:
        def save_pretrained(self, folder):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_folder(model, target, tokenizer=Tokenizer(), overwrite=True)
    assert _content(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (target / "stale").write_text("x")
    save_folder(model, target, overwrite=True)
    assert not (target / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        save_folder(model, tmp_path / "file")


def test_no_absolute_path_is_saved(variant):
    for path in variant.iterdir():
        if path.suffix in (".json", ".py", ".md"):
            text = path.read_text()
            assert str(variant.parent) not in text
            assert str(Path.home()) + "/" not in text
