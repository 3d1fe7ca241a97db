"""A checkpoint converted file by file is what loading, converting and saving it gives: the same files, bit for bit."""

import json

import pytest
import torch
import transformers
from checkpoints import SHARD, edit_config, edit_weights, files_in, in_memory, weights_in
from real_models import minilm_folder
from tiny_models import TINY, tiny

import hf_geglu
from hf_geglu.checkpoint import convert_checkpoint
from hf_geglu.errors import ConversionError, NoSitesError, PlanError, WeightsError
from hf_geglu.fingerprint import fingerprint


def _base(tmp_path, model_type, *, auto=None, **overrides):
    model = tiny(model_type, auto=auto, **overrides)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base", type(model)


def _assert_same(tmp_path, model_class, *, opened=None, settings=None, **options):
    """Every file, bit for bit, and nothing left beside the target."""
    settings = settings or {}
    in_memory(tmp_path / "base", tmp_path / "memory", opened or model_class, **settings, **options)
    done = convert_checkpoint(
        tmp_path / "base", tmp_path / "out", model_class=opened, max_shard_size=SHARD, **settings, **options
    )
    expected, found = files_in(tmp_path / "memory"), files_in(tmp_path / "out")
    if "in parts" in done.report.note:  # transformers counts a part at the size of its whole when it fills a file
        parts = weights_in(tmp_path / "memory"), weights_in(tmp_path / "out")
        assert parts[0].keys() == parts[1].keys()
        assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
        expected, found = ({n: f[n] for n in f if ".safetensors" not in n} for f in (expected, found))
    assert sorted(expected) == sorted(found)
    assert [name for name in expected if expected[name] != found[name]] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "memory", "out"]
    return done


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_every_architecture(tmp_path, model_type):
    _, model_class = _base(tmp_path, model_type)
    model = model_class.from_pretrained(tmp_path / "base")
    try:
        hf_geglu.make_plan(model)
    except (NoSitesError, ConversionError) as error:
        with pytest.raises(type(error)):
            convert_checkpoint(tmp_path / "base", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    done = _assert_same(tmp_path, model_class)
    assert len(done.report.sites) == len(done.plan.converted) or "stored in parts" in done.report.note
    assert done.dropped == done.absent == ()


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"layers": 0}),  # portable: no config says that of one layer
        ("bert", {"layers": -1, "variant": "geglu_tanh", "gelu": "named"}),
        ("gpt2", {"gelu": "named"}),
        ("opt", {"variant": "swiglu"}),
        ("phi3", {"variant": "swiglu"}),  # nothing to do
    ],
)
def test_settings_of_the_plan(tmp_path, model_type, settings):
    _, model_class = _base(tmp_path, model_type)
    _assert_same(tmp_path, model_class, settings=settings)


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("llama", "bfloat16"), ("gpt2", torch.float16), ("t5", "float16"), ("opt", "float16"), ("bert", "float64")],
)
def test_other_dtypes(tmp_path, model_type, dtype):
    """T5 keeps its down projections in float32 whatever is asked for."""
    _, model_class = _base(tmp_path, model_type)
    _assert_same(tmp_path, model_class, dtype=dtype)


@pytest.mark.parametrize("named", [True, False])
def test_stored_in_several_dtypes(tmp_path, named):
    base, model_class = _base(tmp_path, "llama")
    edit_weights(base, lambda tensors: {n: t.bfloat16() if "proj" in n else t for n, t in tensors.items()})
    if not named:
        edit_config(base, dtype=None)
    _assert_same(tmp_path, model_class)


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files(tmp_path, sharded):
    base, model_class = _base(tmp_path, "gpt2")
    state = tiny("gpt2").state_dict()  # tied tensors twice, as torch.save leaves them
    for path in base.glob("*.safetensors*"):
        path.unlink()
    names = sorted(state)
    halves = [names[::2], names[1::2]] if sharded else [names]
    files = [f"pytorch_model-{n}.bin" for n in range(2)] if sharded else ["pytorch_model.bin"]
    for file, half in zip(files, halves, strict=True):
        torch.save({name: state[name] for name in half}, base / file)
    if sharded:
        index = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    done = _assert_same(tmp_path, model_class)
    assert not done.left


@pytest.mark.parametrize(
    ("model_type", "saved", "opened"),
    [
        ("gpt2", transformers.AutoModel, transformers.AutoModelForCausalLM),
        ("t5", transformers.AutoModelForSeq2SeqLM, None),
        ("clip", None, None),
    ],
)
def test_another_head(tmp_path, model_type, saved, opened):
    _, model_class = _base(tmp_path, model_type, auto=saved)
    _assert_same(tmp_path, model_class, opened=opened)


@pytest.mark.parametrize(
    ("model_type", "saved", "opened"),
    [
        ("bert", transformers.AutoModel, transformers.AutoModelForMaskedLM),
        ("bert", None, transformers.AutoModel),
        ("vit", None, transformers.AutoModel),
    ],
)
def test_numbers_that_nobody_has_are_not_made_up(tmp_path, model_type, saved, opened):
    """In memory a head that the checkpoint lacks is drawn at random and saved; here it stays lacking, and is named."""
    base, _ = _base(tmp_path, model_type, auto=saved)
    in_memory(base, tmp_path / "memory", opened)
    done = convert_checkpoint(base, tmp_path / "out", model_class=opened)
    expected, found = weights_in(tmp_path / "memory"), weights_in(tmp_path / "out")
    assert done.absent
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert set(expected) - set(found) <= set(done.absent)
    assert done.dropped
    assert (tmp_path / "memory" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_tied_and_stored_twice(tmp_path):
    base, model_class = _base(tmp_path, "gpt2")
    edit_weights(base, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()})
    _assert_same(tmp_path, model_class)
    assert "lm_head.weight" not in weights_in(tmp_path / "out")


def test_said_to_be_tied_but_stored_with_other_numbers(tmp_path):
    base, model_class = _base(tmp_path, "gpt2")
    edit_weights(base, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1})
    in_memory(base, tmp_path / "memory", model_class)
    convert_checkpoint(base, tmp_path / "out", max_shard_size=SHARD)
    expected, found = weights_in(tmp_path / "memory"), weights_in(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_names_of_old_checkpoints(tmp_path):
    """GPT-2 and BERT as they lie on the Hub: no prefix, attention masks; TensorFlow's names, heads nobody uses."""
    base, model_class = _base(tmp_path, "gpt2")

    def hub(tensors):
        masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 32, 32) for n in range(2)}
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks

    edit_weights(base, hub)
    (base / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "max_length": 77}')
    done = _assert_same(tmp_path, model_class)
    assert done.dropped == ("h.0.attn.bias", "h.1.attn.bias")


def test_names_of_tensorflow(tmp_path):
    base, model_class = _base(tmp_path, "bert")

    def old(tensors):
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()
        }
        return {**renamed, "cls.seq_relationship.weight": torch.zeros(2, 16)}

    edit_weights(base, old)
    done = _assert_same(tmp_path, model_class)
    assert done.dropped == ("cls.seq_relationship.weight",)


def test_a_plan_made_before(tmp_path):
    base, model_class = _base(tmp_path, "bert")
    plan = hf_geglu.make_plan(model_class.from_pretrained(base), layers=1)
    done = convert_checkpoint(base, tmp_path / "out", plan=hf_geglu.Plan.from_json(plan.to_json()))
    assert done.plan == plan
    with pytest.raises(PlanError, match="both given"):
        convert_checkpoint(base, tmp_path / "two", plan=plan, layers=0)
    with pytest.raises(PlanError, match="plan is for a BertForMaskedLM"):
        convert_checkpoint(base, tmp_path / "two", plan=plan, model_class=transformers.AutoModel)


def test_verified_by_running_the_model(tmp_path):
    base, _ = _base(tmp_path, "bert")
    done = convert_checkpoint(base, tmp_path / "out", verify="model", papers=True)
    assert done.report.comparisons[0].max_rel < 1e-6
    assert done.report.response > 0
    assert (tmp_path / "out" / "geglu" / "golden.safetensors").is_file()
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    from hf_geglu.hub.manifest import read_manifest

    manifest = read_manifest(tmp_path / "out")
    assert manifest.weights == fingerprint(model) == manifest.provenance.step0


@pytest.mark.parametrize("free", ["plenty", "little"])
def test_auto_runs_the_model_where_memory_is_free(tmp_path, monkeypatch, free):
    base, _ = _base(tmp_path, "bert")
    from hf_geglu.checkpoint import proof

    needed = []
    measure = proof.needed_to_run
    monkeypatch.setattr(proof, "needed_to_run", lambda model, dtype: needed.append(measure(model, dtype)) or needed[0])
    monkeypatch.setattr(proof, "free_memory", lambda: needed[0] - (free == "little"))
    done = convert_checkpoint(base, tmp_path / "out", verify="auto", papers=True)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert size < needed[0] < 2 * size
    assert bool(done.report.comparisons) == (free == "plenty")
    assert (tmp_path / "out" / "geglu" / "golden.safetensors").is_file() == (free == "plenty")
    assert ("the whole model was not run" in done.report.note) == (free == "little")
    assert done.report.sites


def test_papers_without_the_model(tmp_path):
    base, _ = _base(tmp_path, "llama")
    convert_checkpoint(base, tmp_path / "out", papers=True, command=["hf-geglu", "convert", "base", "out"])
    from hf_geglu.hub.reproduce import reproduce_variant
    from hf_geglu.hub.verifying import verify_variant

    assert verify_variant(tmp_path / "out").ok
    assert reproduce_variant(tmp_path / "out", base=base).ok


def test_progress_counts_every_byte(tmp_path):
    base, _ = _base(tmp_path, "gpt2")
    seen = []
    done = convert_checkpoint(base, tmp_path / "out", progress=lambda now, total: seen.append((now, total)))
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert seen[-1] == (written, written) == (done.bytes, done.bytes)
    assert [now for now, _ in seen] == sorted(now for now, _ in seen)


def test_real_weights(tmp_path):
    """MiniLM: float32, as sentence-transformers has it."""
    source = minilm_folder()
    in_memory(source, tmp_path / "memory", transformers.AutoModel)
    done = convert_checkpoint(source, tmp_path / "out", max_shard_size=SHARD)
    expected, found = weights_in(tmp_path / "memory"), weights_in(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert max(check.max_abs for check in done.report.sites) == 0.0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size > 30_000


def test_from_the_hub_by_way_of_its_cache(tmp_path, monkeypatch):
    """A snapshot of links into the cache's blobs, as huggingface_hub lays it out; nothing is downloaded (offline)."""
    base, _ = _base(tmp_path, "bert")
    commit = "0" * 39 + "1"
    cached = tmp_path / "cache" / "models--me--tiny"
    for folder in ("blobs", f"snapshots/{commit}", "refs"):
        (cached / folder).mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (base / "tokenizer.json").write_text("{}")
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(cached / "blobs" / str(number))
        (cached / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    convert_checkpoint("me/tiny", tmp_path / "out", papers=True)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    from hf_geglu.hub.manifest import read_manifest

    told = read_manifest(tmp_path / "out").provenance.base
    assert (told.id, told.commit) == ("me/tiny", commit)
    with pytest.raises(WeightsError, match="neither a folder nor a Hub id"):
        convert_checkpoint("no such//thing", tmp_path / "two")
