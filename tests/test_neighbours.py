"""Beside what people already use: Trainer, on all weights (resuming and TRL: test_trainers; the Hub: test_hub_push)."""

import torch
import transformers
from tiny_models import tiny

import hf_geglu


def test_trainer_takes_a_variant(tmp_path):
    model = tiny("gpt2")
    hf_geglu.convert(model)
    data = [{"input_ids": torch.arange(4, 12), "labels": torch.arange(4, 12)} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-3
    )
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    moved = (model.transformer.h[0].mlp.c_fc.weight - before).abs()
    assert moved[:, :40].max() > 0
    assert moved[:, 40:].max() > 0  # the value branch learns from the first step
