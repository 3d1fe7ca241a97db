"""On a CUDA device: conversion, verification, reload and training."""

import copy

import pytest
import torch
import transformers
from tiny_models import tiny

import hf_geglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "opt", "vit", "whisper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convert_and_revert(model_type, dtype):
    model = tiny(model_type).to("cuda", dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = hf_geglu.convert(model)
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert {entry.dtype for entry in report.comparisons} == {str(dtype).removeprefix("torch."), "float32"}
    assert all(value.gradient > 0 for value in report.values)
    hf_geglu.revert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_float64_is_exact():
    report = hf_geglu.convert(tiny("gpt2").to("cuda", torch.float64))
    assert report.comparisons[0].max_rel < 1e-14


def test_reload_with_device_map(tmp_path):
    model = tiny("gpt2").cuda()
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    ids = torch.arange(4, 12, device="cuda")[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_lowers_the_loss_of_variant_and_control_alike(precision):
    from hf_geglu.training import TrainSettings, train

    control = tiny("gpt2")
    variant = copy.deepcopy(control)
    hf_geglu.convert(variant)
    generator = torch.Generator().manual_seed(0)
    blocks = [{"input_ids": torch.randint(4, 12, (16,), generator=generator)} for _ in range(32)]
    settings = TrainSettings(
        max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3, mixed_precision=precision, save_steps=0
    )
    results = [train(model, blocks, blocks, settings) for model in (variant, control)]
    for model, result in zip((variant, control), results, strict=True):
        assert next(model.parameters()).is_cuda
        assert result.evals[-1].nll < result.evals[0].nll - 0.3
    assert results[0].evals[0].nll == pytest.approx(results[1].evals[0].nll, abs=1e-2)
