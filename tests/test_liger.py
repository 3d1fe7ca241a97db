"""Liger's FFN kernels never replace what a variant computes. Nothing here runs a kernel: what is installed is what
counts.

Needs `pip install liger-kernel triton` (a gigabyte, no GPU); `test_liger_hook.py` needs neither.
"""

import logging

import pytest
import torch
import transformers
from tiny_models import tiny

import hf_geglu
from hf_geglu.errors import KernelError

pytest.importorskip("triton")
liger = pytest.importorskip("liger_kernel.transformers")

IDS = torch.arange(4, 12)[None]
GELU, TANH = "gelu", "gelu_pytorch_tanh"


def _variant(model_type="llama", **options):
    model = tiny(model_type)
    assert hf_geglu.convert(model, **options).tier == "native"
    return model


def _ffn_is_ligers(model):
    forwards = {model.get_submodule(f"model.layers.{i}.mlp").forward.__func__.__module__ for i in range(2)}
    assert len(forwards) == 1
    return forwards.pop().startswith("liger_kernel")


def _norm_is_ligers(model):
    return model.model.norm.forward.__func__.__module__.startswith("liger_kernel")


@pytest.fixture(autouse=True)
def _classes_as_they_were():
    """Liger patches transformers' modules for good; put them back."""
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.llama import modeling_llama

    before = {module: dict(vars(module)) for module in (modeling_llama, modeling_gemma2)}
    forwards = {c: c.forward for c in (modeling_llama.LlamaForCausalLM, modeling_gemma2.Gemma2ForCausalLM)}
    yield
    for module, names in before.items():
        vars(module).update(names)
    for cls, forward in forwards.items():
        cls.forward = forward


def _by_trainer(model, **kernels):
    transformers.integrations.liger.apply_liger_kernel(model, kernels or None)


def _by_instance(model, **kernels):
    liger._apply_liger_kernel_to_instance(model=model, **kernels)


def _by_function(model, **kernels):
    getattr(liger, f"apply_liger_kernel_to_{model.config.model_type}")(model=model, **kernels)


@pytest.mark.parametrize("apply", [_by_trainer, _by_instance, _by_function])
def test_swiglu_is_not_put_into_a_gelu_llama(apply, caplog):
    model = _variant()
    with caplog.at_level(logging.WARNING):
        apply(model)
    assert not _ffn_is_ligers(model)
    assert _norm_is_ligers(model)  # the rest of Liger is welcome
    assert "`swiglu` computes silu, but this LlamaForCausalLM computes gelu" in caplog.text


@pytest.mark.parametrize("apply", [_by_trainer, _by_instance, _by_function])
def test_whoever_asks_for_it_by_name_gets_an_error(apply):
    model = _variant()
    with pytest.raises(KernelError, match="swiglu=False"):
        apply(model, swiglu=True)
    assert not _ffn_is_ligers(model)


@pytest.mark.parametrize("apply", [_by_trainer, _by_instance, _by_function])
def test_what_fits_is_left_to_liger(apply, caplog):
    model = tiny("llama")
    with caplog.at_level(logging.WARNING):
        apply(model)
    assert _ffn_is_ligers(model)
    tanh = tiny("gemma2")
    apply(tanh)
    assert _ffn_is_ligers(tanh)
    assert not caplog.text


def test_tanh_is_not_put_into_an_erf_gemma():
    model = tiny("gemma2", hidden_activation="gelu")
    _by_trainer(model)
    assert not _ffn_is_ligers(model)
    assert _norm_is_ligers(model)


def test_a_lora_on_a_variant_is_guarded_too():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(_variant(), peft.LoraConfig(target_modules="all-linear"))
    _by_trainer(model)
    assert not _ffn_is_ligers(model.get_base_model())


class _Ready(transformers.TrainerCallback):
    def on_train_begin(self, *_, **__):
        raise InterruptedError("everything is applied; the first step would need a GPU")


def test_trainer(tmp_path):
    """The whole way from the flag of TrainingArguments."""
    model = _variant()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True, use_liger_kernel=True
    )
    data = [{"input_ids": IDS[0], "labels": IDS[0]}]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[_Ready()])
    with pytest.raises(InterruptedError):
        trainer.train()
    assert not _ffn_is_ligers(model)
    assert _norm_is_ligers(model)


def test_the_auto_class(tmp_path):
    _variant().save_pretrained(tmp_path / "v")
    loaded = liger.AutoLigerKernelForCausalLM.from_pretrained(tmp_path / "v")
    assert type(loaded.model.layers[0].mlp).__module__.startswith("transformers")
    assert type(loaded.model.norm).__module__.startswith("liger_kernel")
    with pytest.raises(KernelError, match="swiglu=False"):
        liger.AutoLigerKernelForCausalLM.from_pretrained(tmp_path / "v", swiglu=True)
    tiny("llama").save_pretrained(tmp_path / "base")
    base = liger.AutoLigerKernelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(base.model.layers[0].mlp).__module__.startswith("liger_kernel")


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_classes_patched_before_loading_refuse_another_activation(model_type):
    getattr(liger, f"apply_liger_kernel_to_{model_type}")()
    key = "hidden_activation" if model_type == "gemma2" else "hidden_act"
    with pytest.raises(ValueError, match=r"gelu"):
        tiny(model_type, **{key: "gelu"})


def test_a_portable_variant_is_unknown_to_liger_and_it_says_so(caplog):
    model = tiny("llama")
    hf_geglu.convert(model, layers=0)
    assert model.config.model_type == "geglu_llama"
    before = model(IDS).logits
    with caplog.at_level(logging.WARNING):
        _by_trainer(model)
    assert "Liger has no kernels for geglu_llama" in caplog.text
    assert torch.equal(model(IDS).logits, before)
