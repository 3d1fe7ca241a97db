"""PEFT on variants: old target names, default targets, merging; an adapter is refused on another base."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import TINY, tiny

import hf_geglu
from hf_geglu.errors import AdapterError
from hf_geglu.hub import save_folder
from hf_geglu.neighbours.peft import FILE

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT sets it for GPT-2's Conv1D

IDS = torch.arange(4, 12)[None]


def _variant(model_type="gpt2", **options):
    model = tiny(model_type)
    hf_geglu.convert(model, **options)
    return model


def _move(wrapped):
    """Weights as after training: B of a LoRA starts at zero."""
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    return wrapped


# -- where adapters go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "target", "packed"),
    [("gpt2", "c_fc", True), ("opt", "fc1", True), ("bert", "intermediate.dense", True), ("llama", "gate_proj", False)],
)
def test_lora_finds_the_projections_by_their_old_names(tmp_path, model_type, target, packed):
    model = _variant(model_type)
    before = model(IDS).logits
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=[target], fan_in_fan_out=model_type == "gpt2")
    ).eval()
    assert torch.equal(wrapped(IDS).logits, before)
    wrapped(IDS).logits.sum().backward()
    lora = [parameter for name, parameter in wrapped.named_parameters() if "lora_B" in name]
    assert [parameter.size(0) for parameter in lora] == [(2 if packed else 1) * 40] * 2
    assert all(parameter.grad.abs().max() > 0 for parameter in lora)
    moved = _move(wrapped)(IDS).logits
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, moved, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(TINY[model_type][0].from_pretrained(tmp_path)(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "opt", "llama", "vit", "t5"])
def test_all_linear(model_type):
    base = tiny(model_type)
    expected = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear")).targeted_module_names
    wrapped = peft.get_peft_model(_variant(model_type), peft.LoraConfig(target_modules="all-linear"))
    assert wrapped.targeted_module_names == expected


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "opt", "bloom", "t5", "bart"])
def test_default_targets_are_those_of_the_base(model_type):
    expected = peft.get_peft_model(tiny(model_type), peft.LoraConfig()).targeted_module_names
    model = _variant(model_type)
    assert model.config.model_type == f"geglu_{model_type}"
    assert peft.get_peft_model(model, peft.LoraConfig()).targeted_module_names == expected


@pytest.mark.parametrize("order", ["peft, hf_geglu", "hf_geglu, transformers.modeling_utils"])
def test_targets_are_registered_whichever_is_imported_first(order):
    """And peft is not imported before its user does."""
    code = (
        f"import sys, {order}\n"
        f"assert ('peft' in sys.modules) == {order.startswith('peft')}\n"
        "import peft\n"
        "from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table\n"
        "print(table['geglu_gpt2'], hasattr(peft.PeftModel.load_adapter, '_hf_geglu_original'))"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "['c_attn'] True"


# -- adapters and their base -------------------------------------------------------------------------------------------

TARGETS = {"attention": ["c_attn"], "ffn": ["c_fc"]}


@pytest.fixture(params=TARGETS)
def adapter(request, tmp_path):
    """(folder of an adapter, the logits it gives on its variant, what it targets)."""
    wrapped = _move(peft.get_peft_model(_variant(), peft.LoraConfig(target_modules=TARGETS[request.param]))).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", wrapped(IDS).logits, request.param


def test_an_adapter_loads_on_its_variant(adapter, tmp_path):
    folder, expected, _ = adapter
    assert json.loads((folder / FILE).read_text()).keys() == {"structure", "values", "exact"}
    assert torch.equal(peft.PeftModel.from_pretrained(_variant(), folder)(IDS).logits, expected)
    _variant().save_pretrained(tmp_path / "v")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "v", dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(loaded, folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "v")
    again.load_adapter(folder)
    assert torch.equal(again.eval()(IDS).logits, expected)


def _other_variant():
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    hf_geglu.convert(model)
    return model


OTHERS = {
    "unconverted": (lambda: tiny("gpt2"), "FFN blocks"),
    "partly converted": (lambda: _variant(layers=0), "FFN blocks"),
    "another variant": (lambda: _variant(gelu="named"), "FFN blocks"),
    "other weights": (_other_variant, "other weights"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "transformers"])
def test_an_adapter_is_refused_on_another_base(adapter, other, how):
    folder, _, _ = adapter
    make, reason = OTHERS[other]
    model = make()
    load = {
        "from_pretrained": lambda: peft.PeftModel.from_pretrained(model, folder),
        "load_adapter": lambda: wrapped.load_adapter(folder, "second"),
        "transformers": lambda: model.load_adapter(folder),
    }[how]
    if how == "load_adapter":
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"]))
    names = list(dict(model.named_modules()))
    with pytest.raises(AdapterError, match=reason):
        load()
    assert list(dict(model.named_modules())) == names  # nothing was put in


@pytest.mark.parametrize("loaded", [False, True])
def test_a_native_variant_is_told_from_its_base(tmp_path, loaded):
    model = _variant("llama")
    if loaded:  # with its papers: nothing else tells a native variant from a model of its class
        save_folder(model, tmp_path / "v")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "v")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    peft.PeftModel.from_pretrained(_variant("llama"), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="FFN blocks"):
        peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")


def test_an_adapter_folder_opens_as_a_model(tmp_path):
    """transformers loads the base that the adapter names, then the adapter."""
    _variant().save_pretrained(tmp_path / "v")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "v")
    wrapped = _move(peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_fc"]))).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert type(opened).__name__ == "GegluGPT2LMHeadModel"
    assert torch.equal(opened(IDS).logits, wrapped(IDS).logits)


def test_adapters_of_transformers_own_integration(tmp_path):
    model = _variant()
    model.add_adapter(peft.LoraConfig(target_modules=["c_attn"]))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / FILE).is_file()
    assert not (tmp_path / "adapter" / "modeling_geglu.py").exists()
    _variant().load_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError):
        tiny("gpt2").load_adapter(tmp_path / "adapter")


def test_an_adapter_of_a_plain_model_is_left_alone(tmp_path):
    peft.get_peft_model(tiny("gpt2"), peft.LoraConfig(target_modules=["c_attn"])).save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    peft.PeftModel.from_pretrained(_variant(), tmp_path)


def test_without_the_plugin_packed_shapes_raise(tmp_path):
    """What is left where nobody compares fingerprints: torch's error of shapes, if the adapter touches the FFN. One of
    attention alone loads; docs/loading.md says so."""
    for name, targets in TARGETS.items():
        peft.get_peft_model(_variant(), peft.LoraConfig(target_modules=targets)).save_pretrained(tmp_path / name)
    code = (
        "import sys, peft, transformers\n"
        "config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, n_inner=40)\n"
        "for adapter in ('attention', 'ffn'):\n"
        "    try:\n"
        "        peft.PeftModel.from_pretrained(transformers.GPT2LMHeadModel(config), adapter)\n"
        "    except RuntimeError as error:\n"
        "        print(adapter, 'size mismatch' in str(error))\n"
        "    else:\n"
        "        print(adapter, 'loads')\n"
        "assert 'hf_geglu' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-2:] == ["attention loads", "ffn True"]
