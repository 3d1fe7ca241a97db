"""Beside what people already use: the ordinary push to the Hub, Trainer."""

import pytest
import torch
import transformers
from tiny_models import tiny

import hf_geglu


@pytest.mark.parametrize(("model_type", "tier"), [("bert", "portable"), ("llama", "native")])
def test_push_to_hub_sends_all_that_loading_needs(monkeypatch, tmp_path, model_type, tier):
    """The upload itself is huggingface_hub's; what it is handed is what counts."""
    from huggingface_hub import HfApi

    sent = set()

    class Repo:
        repo_id = "me/variant"

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repo())
    monkeypatch.setattr("transformers.utils.hub.create_repo", lambda *_, **__: Repo(), raising=False)

    def upload(_, working_dir, *__, **___):
        sent.update(path.name for path in __import__("pathlib").Path(working_dir).iterdir())

    model = tiny(model_type)
    assert hf_geglu.convert(model).tier == tier
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: _Card(), raising=False)
    model.push_to_hub("me/variant")
    assert {"config.json", "model.safetensors"} <= sent
    assert ("modeling_geglu.py" in sent) == (tier == "portable")


class _Card:
    def save(self, path):
        """The card is transformers' own."""


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
