"""Quantised while loading: bitsandbytes 4 and 8 bit, torchao int8. A variant loses what its base loses, not more."""

import pytest
import torch
import transformers
from tiny_models import tiny

import hf_geglu
from hf_geglu.errors import AdapterError
from hf_geglu.modeling_geglu import PackedGLU

IDS = torch.arange(4, 12)[None]
SIZES = {
    "bert": {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32},
}
"""Quantisers work on blocks of 64."""


def _bitsandbytes(bits):
    module = pytest.importorskip("bitsandbytes")
    kind = module.nn.Linear4bit if bits == 4 else module.nn.Linear8bitLt
    return transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}), lambda layer: isinstance(layer, kind)


def _torchao():
    module = pytest.importorskip("torchao.quantization")
    config = transformers.TorchAoConfig(module.Int8WeightOnlyConfig())
    return config, lambda layer: isinstance(layer, torch.nn.Linear) and "Int8" in type(layer.weight).__name__


QUANTISERS = {
    "bitsandbytes-4": lambda: _bitsandbytes(4),
    "bitsandbytes-8": lambda: _bitsandbytes(8),
    "torchao-int8": _torchao,
}


def _error(model, folder, config):
    """Relative distance of a model from its quantised self, and that one."""
    model.save_pretrained(folder)
    quantised = type(model).from_pretrained(folder, quantization_config=config, device_map="cpu")
    with torch.no_grad():
        expected, found = model(IDS).logits, quantised(IDS).logits
    return ((found - expected).norm() / expected.norm()).item(), quantised


@pytest.mark.parametrize("model_type", SIZES)
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_quantised_while_loading(tmp_path, model_type, quantiser):
    config, is_quantised = QUANTISERS[quantiser]()
    base = tiny(model_type, **SIZES[model_type])
    of_the_base, _ = _error(base, tmp_path / "base", config)
    variant = tiny(model_type, **SIZES[model_type])
    hf_geglu.convert(variant)
    of_the_variant, quantised = _error(variant, tmp_path / "v", config)
    assert 0 < of_the_variant < 2 * of_the_base
    packed = {"bert": "bert.encoder.layer.0.intermediate.dense", "opt": "model.decoder.layers.0.fc1"}
    up = quantised.get_submodule(packed.get(model_type, "model.layers.0.mlp.up_proj"))
    assert is_quantised(up)
    assert up.out_features == (2 if model_type in packed else 1) * 128
    assert sum(isinstance(module, PackedGLU) for module in quantised.modules()) == (2 if model_type in packed else 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_quantised_and_loaded_again(tmp_path, bits):
    config, _ = _bitsandbytes(bits)
    model = tiny("opt", **SIZES["opt"])
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "v")
    auto = transformers.AutoModelForCausalLM
    quantised = auto.from_pretrained(tmp_path / "v", quantization_config=config, device_map="cpu")
    quantised.save_pretrained(tmp_path / "q")
    again = auto.from_pretrained(tmp_path / "q", device_map="cpu")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, quantised(IDS).logits)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_lora_on_a_quantised_variant_fits_the_variant_itself(tmp_path):
    """Trained on 4 bits, put on full precision: the structure is compared, quantised values cannot be."""
    peft = pytest.importorskip("peft")
    config, _ = _bitsandbytes(4)
    model = tiny("opt", **SIZES["opt"])
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "v")
    auto = transformers.AutoModelForCausalLM
    quantised = auto.from_pretrained(tmp_path / "v", quantization_config=config, device_map="cpu")
    wrapped = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(quantised), peft.LoraConfig(target_modules="all-linear")
    )
    wrapped(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in wrapped.named_parameters() if "lora_" in name)
    wrapped.save_pretrained(tmp_path / "adapter")
    peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "v"), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="FFN blocks"):
        peft.PeftModel.from_pretrained(tiny("opt", **SIZES["opt"]), tmp_path / "adapter")
