"""Every wrong way to load a variant ends in an error that says what it is and how to load it. None loads silently."""

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import TINY, tiny

import hf_geglu
from hf_geglu.errors import WeightsError
from hf_geglu.modeling_geglu import SCHEMA, VariantLoadError

PORTABLE = ["bert", "gpt2", "vit", "t5"]
FFN = re.compile(r"intermediate\.dense|mlp\.c_fc|mlp\.fc1|layers?\.1\.intermediate|DenseReluDense\.wi")
"""The up projections of these four, as their checkpoints name them."""


@pytest.fixture(params=PORTABLE)
def variant(request, tmp_path):
    """(folder of a portable variant, model type)."""
    model = tiny(request.param)
    assert hf_geglu.convert(model).tier == "portable"
    model.save_pretrained(tmp_path / "v")
    return tmp_path / "v", request.param


def _auto(model_type):
    return TINY[model_type][0]


def _plain(model_type):
    return type(tiny(model_type))


def _edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _rewrite(folder, change):
    """Put `change(name, tensor)` -> [(name, tensor), ...] in the place of each tensor of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = dict(pair for name, tensor in load_file(path).items() for pair in change(name, tensor))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


_LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import transformers
transformers.logging.set_verbosity_error()
errors = []
for code in json.loads(sys.argv[1]):
    try:
        eval(code)
    except Exception as error:
        errors.append(str(error))
    else:
        errors.append("")
print()  # transformers' question on trust has no line end
print(json.dumps(errors))
"""


def _errors(folder, *calls, plugin=False):
    """What each call says in a process of its own, where nobody answers questions on trust."""
    result = subprocess.run(
        [sys.executable, "-c", ("import hf_geglu\n" if plugin else "") + _LOAD, json.dumps(calls)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    errors = json.loads(result.stdout.splitlines()[-1])
    assert all(errors), dict(zip(calls, errors, strict=True))
    return errors


def _says(text):
    """What it is, and how to load it."""
    return "GeGLU variant" in text and "import hf_geglu" in text and "trust_remote_code=True" in text


@pytest.fixture
def variants(tmp_path):
    """One folder a model type, all beside each other."""
    for model_type in PORTABLE:
        model = tiny(model_type)
        hf_geglu.convert(model)
        model.save_pretrained(tmp_path / model_type)
    return tmp_path


# -- the wrong class ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [False, True])
def test_a_plain_class(variants, plugin):
    calls = [
        f"transformers.{_plain(t).__name__}.from_pretrained({t!r}{ignore})"
        for t in PORTABLE
        for ignore in ("", ", ignore_mismatched_sizes=True")
    ]
    for call, error in zip(calls, _errors(variants, *calls, plugin=plugin), strict=True):
        assert _says(error), (call, error)


def test_without_plugin_and_without_trust(variants):
    calls = [f"transformers.{_auto(t).__name__}.from_pretrained({t!r})" for t in PORTABLE]
    calls += ["transformers.pipeline(model='bert')", "transformers.AutoConfig.from_pretrained('gpt2')"]
    for call, error in zip(calls, _errors(variants, *calls), strict=True):
        assert "trust_remote_code" in error, (call, error)


def test_a_plain_class_with_its_own_config(variant):
    """Neither model type nor tripwire is looked at: the shapes are what is left."""
    folder, model_type = variant
    with pytest.raises(RuntimeError, match=r"size|shape"):
        _plain(model_type).from_pretrained(folder, config=tiny(model_type).config)


def test_the_tripwire_edited_out(variant):
    folder, model_type = variant
    base = json.loads(json.dumps(tiny(model_type).config.to_dict()))
    (folder / "config.json").write_text(json.dumps({**base, "architectures": [_plain(model_type).__name__]}))
    for load in (_plain(model_type), _auto(model_type)):
        with pytest.raises(RuntimeError, match=r"size|shape"):
            load.from_pretrained(folder)


def test_the_tripwire_edited_out_under_a_variants_model_type(variant):
    """The sites decide, not the activation's name: the variant is built as it was saved."""
    folder, model_type = variant
    config = json.loads((folder / "config.json").read_text())
    for key, value in config["geglu"]["config"].items():
        assert "." not in key
        config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    model = tiny(model_type)
    hf_geglu.convert(model)
    loaded = _auto(model_type).from_pretrained(folder)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


# -- the wrong config --------------------------------------------------------------------------------------------------


def test_a_newer_schema(variant):
    folder, model_type = variant
    geglu = json.loads((folder / "config.json").read_text())["geglu"]
    _edit(folder, geglu={**geglu, "schema": SCHEMA + 1})
    with pytest.raises(VariantLoadError, match=rf"GeGLU variant .*schema {SCHEMA + 1}.*pip install -U hf_geglu"):
        _auto(model_type).from_pretrained(folder)


def test_sites_that_the_class_does_not_have(variant):
    folder, model_type = variant
    path = folder / "config.json"
    path.write_text(re.sub(r"(layers?|h|block)\.1\.", r"\1.9.", path.read_text()))
    with pytest.raises(VariantLoadError, match=r"GeGLU variant names the site"):
        _auto(model_type).from_pretrained(folder)


def test_a_dense_folder_as_a_variant(variant, tmp_path):
    _, model_type = variant
    tiny(model_type).save_pretrained(tmp_path / "dense")
    variant_class = getattr(hf_geglu.modeling_geglu, f"Geglu{_plain(model_type).__name__}")
    with pytest.raises(VariantLoadError, match=r"hf_geglu\.convert\(model\)"):
        variant_class.from_pretrained(tmp_path / "dense")


# -- the wrong weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore", [False, True])
def test_dense_weights_under_a_variants_config(variant, ignore):
    folder, model_type = variant
    tiny(model_type).save_pretrained(folder.parent / "dense")
    (folder / "model.safetensors").write_bytes((folder.parent / "dense" / "model.safetensors").read_bytes())
    with pytest.raises(VariantLoadError, match=r"unconverted model under a variant's config"):
        _auto(model_type).from_pretrained(folder, ignore_mismatched_sizes=ignore)


def test_dense_weights_under_a_variants_config_as_remote_code(variants):
    for model_type in PORTABLE:
        tiny(model_type).save_pretrained(variants / "dense")
        weights = (variants / "dense" / "model.safetensors").read_bytes()
        (variants / model_type / "model.safetensors").write_bytes(weights)
    calls = [
        f"transformers.{_auto(t).__name__}.from_pretrained({t!r}, trust_remote_code=True{ignore})"
        for t in PORTABLE
        for ignore in ("", ", ignore_mismatched_sizes=True")
    ]
    for call, error in zip(calls, _errors(variants, *calls), strict=True):
        assert "unconverted model under a variant's config" in error, (call, error)


def test_dense_weights_put_in_by_hand(variant):
    _, model_type = variant
    model = tiny(model_type)
    hf_geglu.convert(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(tiny(model_type).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny(model_type).load_state_dict(model.state_dict())


@pytest.mark.parametrize("which", ["one up projection", "every up projection", "one layer", "its biases"])
def test_missing_tensors(variant, which):
    folder, model_type = variant
    gone = {
        "one up projection": lambda name: FFN.search(name) and re.search(r"\.1\.", name),
        "every up projection": FFN.search,
        "one layer": lambda name: re.search(r"(layers?|h|block)\.1\.", name),
        "its biases": lambda name: FFN.search(name) and name.endswith(".bias"),
    }[which]
    removed = []

    def change(name, tensor):
        if gone(name):
            removed.append(name)
            return []
        return [(name, tensor)]

    _rewrite(folder, change)
    assert removed
    with pytest.raises(VariantLoadError, match=r"lacks \d+ tensors"):
        _auto(model_type).from_pretrained(folder)


@pytest.mark.parametrize("which", ["up projections", "attention"])
def test_renamed_tensors(variant, which):
    folder, model_type = variant
    renamed = []

    def change(name, tensor):
        if (FFN if which == "up projections" else re.compile("attn|attention")).search(name):
            renamed.append(name)
            name = name.replace(".weight", ".w").replace(".bias", ".b")
        return [(name, tensor)]

    _rewrite(folder, change)
    assert renamed
    with pytest.raises(VariantLoadError, match=r"lacks \d+ tensors"):
        _auto(model_type).from_pretrained(folder)


# -- what is no damage -------------------------------------------------------------------------------------------------


def test_new_heads_and_new_parts_are_no_damage(tmp_path):
    model = tiny("bert")
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "v")
    load = {"ignore_mismatched_sizes": True, "num_labels": 7}
    first = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "v", **load)
    first.save_pretrained(tmp_path / "seven")
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "seven", **{**load, "num_labels": 3})
    decoder = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "v", is_decoder=True, add_cross_attention=True
    )
    assert any("crossattention" in name for name in decoder.state_dict())
    model = tiny("vit")
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "vit")
    transformers.AutoModelForMaskedImageModeling.from_pretrained(tmp_path / "vit")
    transformers.AutoModel.from_pretrained(tmp_path / "vit")


# -- native variants: plain transformers loads them; what it does not see, the checked loader does ---------------------


@pytest.fixture
def native(tmp_path):
    model = tiny("llama")
    assert hf_geglu.convert(model).tier == "native"
    model.save_pretrained(tmp_path / "v")
    return tmp_path / "v"


def test_native_with_missing_tensors(native):
    _rewrite(native, lambda name, tensor: [] if "layers.1.mlp.gate_proj" in name else [(name, tensor)])
    with pytest.raises(WeightsError, match=r"lacks 1 tensors.*layers\.1\.mlp\.gate_proj"):
        hf_geglu.from_pretrained(transformers.AutoModelForCausalLM, native)


def test_native_with_weights_of_another_width(native):
    tiny("llama", intermediate_size=48).save_pretrained(native.parent / "wide")
    (native / "model.safetensors").write_bytes((native.parent / "wide" / "model.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match=r"size|shape"):
        transformers.AutoModelForCausalLM.from_pretrained(native)


def test_native_config_edited_back_is_what_only_the_fingerprint_tells(native):
    """A plain config and plain shapes: nothing to trip over. Documented in docs/loading.md."""
    from hf_geglu.fingerprint import fingerprint

    before = fingerprint(transformers.AutoModelForCausalLM.from_pretrained(native))
    _edit(native, hidden_act="silu")
    after = fingerprint(transformers.AutoModelForCausalLM.from_pretrained(native))
    assert "FFN blocks" in before.difference(after)
