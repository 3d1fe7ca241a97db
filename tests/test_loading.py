"""A saved variant opens in every way that transformers opens a model, and then does everything its base does."""

import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import TINY, tiny

import hf_geglu
from hf_geglu.auto import auto_classes
from hf_geglu.distance import outputs_of
from hf_geglu.inputs import synthetic_inputs
from hf_geglu.modeling_geglu import variant_model_class

IDS = torch.arange(4, 12)[None]
FAMILIES = ["bert", "gpt2", "vit", "t5", "whisper", "llama"]


@pytest.fixture
def saved(tmp_path):
    """Converts a tiny model, saves it, and returns (folder, converted model)."""

    def save(model_type, *, auto=None, shards="5GB", dtype=torch.float32, **overrides):
        model = tiny(model_type, auto=auto, **overrides).to(dtype)
        hf_geglu.convert(model)
        model.save_pretrained(tmp_path / "v", max_shard_size=shards)
        return tmp_path / "v", model

    return save


def _auto(model_type):
    return TINY[model_type][0]


def _assert_same(first, second):
    inputs = synthetic_inputs(first)
    with torch.no_grad():
        expected, found = outputs_of(first, inputs), outputs_of(second, inputs)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


# -- every head --------------------------------------------------------------------------------------------------------


def _from_the_body(opened, model):
    """Names of the tensors that a model opened with another head has from `model`, bit for bit."""
    body, prefix, theirs = model.state_dict(), f"{model.base_model_prefix}.", f"{opened.base_model_prefix}."
    found = set()
    for name, tensor in opened.state_dict().items():
        short = name.removeprefix(theirs)
        origin = next((key for key in (name, prefix + short, short) if key in body), None)
        if origin is not None and torch.equal(body[origin], tensor):
            found.add(name)
    return found


@pytest.mark.parametrize(
    "model_type", ["bert", "gpt2", "opt", "phi", "vit", "t5", "bart", "whisper", "distilbert", "llama"]
)
def test_every_head_of_the_architecture_opens_a_variant(saved, tmp_path, model_type):
    """Whatever Auto class opens the base opens its variant, and takes the same tensors from it."""
    base = tiny(model_type)
    base.save_pretrained(tmp_path / "base")
    folder, model = saved(model_type)
    heads = sorted(auto_classes(model_type))
    assert len(heads) >= 2
    for head in heads:
        auto = getattr(transformers, head)
        expected = _from_the_body(auto.from_pretrained(tmp_path / "base"), base)
        opened = auto.from_pretrained(folder)
        added = {name for name in opened.state_dict() if name not in auto.from_config(base.config).state_dict()}
        assert _from_the_body(opened, model) == expected | added, head
        assert expected
        assert type(opened).__name__.startswith("Geglu") or "geglu" not in model.config.model_type, head


def test_heads_that_make_their_body_by_an_auto_class(saved):
    """``AutoModel.from_config(config)`` inside of a head: the blocks are converted once, and nobody asks for trust."""
    folder, model = saved("phi")
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state
    heads = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")
    for head in heads:
        opened = getattr(transformers, head).from_pretrained(folder).eval()
        assert type(opened).__name__.startswith("GegluPhiFor")
        with torch.no_grad():
            assert torch.equal(opened.model(IDS).last_hidden_state, expected)
        opened.save_pretrained(folder.parent / head)
        again = transformers.AutoModel.from_pretrained(folder.parent / head).eval()
        assert type(again).__name__ == "GegluPhiModel"
        assert again.config.model_type == "geglu_phi"
        with torch.no_grad():
            assert torch.equal(again(IDS).last_hidden_state, expected)
    code = (
        "import sys, transformers\n"
        f"for head in {heads!r}:\n"
        f"    model = getattr(transformers, head).from_pretrained('v', trust_remote_code=True)\n"
        "    print(type(model).__name__, 'auto_map' in vars(model.config))\n"
        "assert 'hf_geglu' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    expected_lines = ["GegluPhiForSequenceClassification True", "GegluPhiForTokenClassification True"]
    assert result.stdout.splitlines()[-2:] == expected_lines


def test_classes_that_check_the_class_of_their_config(tmp_path):
    """EncoderDecoderModel refuses a config that is not of its `config_class`."""
    parts = tiny("bert").config, tiny("bert", is_decoder=True, add_cross_attention=True).config
    model = transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts))
    assert hf_geglu.convert(model.eval(), verify="sites").tier == "portable"
    model.save_pretrained(tmp_path / "v")
    opened = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "v")
    assert type(opened).__name__ == "GegluEncoderDecoderModel"
    assert opened.config_class.model_type == "geglu_encoder-decoder"
    assert all(torch.equal(tensor, opened.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "llama"])
def test_there_and_back_between_head_and_base(saved, tmp_path, model_type):
    """CLM or MLM -> base model -> saved -> the head again: the body keeps its bits."""
    folder, model = saved(model_type)
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    again = _auto(model_type).from_pretrained(tmp_path / "base")
    assert type(again) is type(model)
    body = again.base_model.state_dict()
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(body[name], tensor), name


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "vit", "mixtral", "qwen2", "clip"])
def test_transformers_treats_a_variant_as_it_treats_the_base(monkeypatch, model_type):
    """It looks into the module that a class was written in, to see what its weights and kernels need."""
    base = type(tiny(model_type))
    variant = variant_model_class(base, base.config_class)
    asked = ("_can_set_attn_implementation", "_can_set_experts_implementation", "is_custom_code")
    for cls in base.__mro__:
        for name in asked:
            if f"{name}_cached_value" in vars(cls):
                monkeypatch.delattr(cls, f"{name}_cached_value")
    found = {name: getattr(variant, name)() for name in asked if hasattr(base, name)}
    assert found == {name: getattr(base, name)() for name in found}
    assert not found.get("is_custom_code", False)


# -- ways of loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"attn_implementation": "eager"},
    ],
    ids=lambda how: ",".join(how) or "plain",
)
def test_sharded_and_dispatched(saved, model_type, how):
    folder, model = saved(model_type, shards="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    opened = _auto(model_type).from_pretrained(folder, **how).eval()
    if "attn_implementation" not in how:
        _assert_same(model, opened)
    else:
        for name, tensor in model.state_dict().items():
            assert torch.equal(opened.state_dict()[name], tensor)


def _largest_part_without(layers, name):
    """The shortest prefix of a tensor's name that holds none of the layers; "" for a tensor of theirs."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    if any(name.startswith(f"{layer}.") for layer in layers):
        return ""
    return next(prefix for prefix in prefixes if not any(layer.startswith(f"{prefix}.") for layer in layers))


@pytest.mark.parametrize(
    ("model_type", "auto"),
    [
        ("bert", transformers.AutoModel),
        ("gpt2", transformers.AutoModelForCausalLM),
        ("llama", transformers.AutoModelForCausalLM),
    ],
)
def test_disk_offload(saved, tmp_path, model_type, auto):
    folder, model = saved(model_type, auto=auto)
    layers = [
        f"{name}.{index}"
        for name, stack in model.named_modules()
        if isinstance(stack, torch.nn.ModuleList)
        for index in range(len(stack))
    ]
    rest = {_largest_part_without(layers, name): "cpu" for name in model.state_dict()}
    rest = {name: device for name, device in rest.items() if name}
    opened = auto.from_pretrained(
        folder, device_map=rest | dict.fromkeys(layers, "disk"), offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in opened.parameters())
    _assert_same(model, opened.eval())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_half_precision_is_the_rounded_model(saved, model_type, dtype):
    folder, model = saved(model_type)
    opened = _auto(model_type).from_pretrained(folder, dtype=dtype).eval()
    kept = opened._keep_in_fp32_modules or []
    for name, tensor in model.state_dict().items():
        found = opened.state_dict()[name]
        assert torch.equal(found, tensor.to(found.dtype))
        assert found.dtype == dtype or any(part in name for part in kept) or not tensor.is_floating_point()
    assert _auto(model_type).from_pretrained(folder, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "t5"])
def test_tied_weights_stay_tied(saved, model_type):
    folder, model = saved(model_type, tie_word_embeddings=True)
    opened = _auto(model_type).from_pretrained(folder)
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    _assert_same(model, opened.eval())


# -- what the model then does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "bloom"])
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_generation(saved, model_type, how):
    base = tiny(model_type)
    folder, model = saved(model_type)
    opened = _auto(model_type).from_pretrained(folder)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **how}
    if how.get("cache_implementation") and not opened._can_compile_fullgraph:
        pytest.skip(f"{model_type} has no static cache")
    found = opened.generate(IDS, **settings)
    assert torch.equal(found, model.generate(IDS, **settings))
    if model_type != "llama":  # exact: the original's own words
        assert torch.equal(found, base.generate(IDS, **settings))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_assisted_generation_says_the_same(saved, model_type):
    """The variant as the large model and as the assistant: speculation changes no token."""
    folder, _ = saved(model_type)
    opened = _auto(model_type).from_pretrained(folder)
    base = tiny(model_type)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for large, assistant in ((opened, base), (base, opened)):
        alone = large.generate(IDS, **settings)
        assert torch.equal(large.generate(IDS, assistant_model=assistant, **settings), alone)


def test_encoder_decoder_generates(saved):
    folder, model = saved("t5")
    opened = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    for settings in ({"num_beams": 1}, {"num_beams": 3}):
        found = opened.generate(IDS, max_new_tokens=6, do_sample=False, **settings)
        assert torch.equal(found, model.generate(IDS, max_new_tokens=6, do_sample=False, **settings))


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5"])
def test_gradient_checkpointing(saved, model_type):
    """The same gradients with and without."""
    folder, _ = saved(model_type)
    model = _auto(model_type).from_pretrained(folder).train()
    inputs = {"input_ids": IDS, "labels": IDS}

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)  # dropout
        model(**inputs).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)
