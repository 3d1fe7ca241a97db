"""Beside what people already use: PEFT on the packed projections, the ordinary push to the Hub."""

import pytest
import torch
import transformers
from tiny_models import tiny

import hf_geglu


def test_lora_finds_the_packed_projections_by_their_old_names(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny("gpt2").eval()
    hf_geglu.convert(model)
    ids = torch.arange(4, 12)[None]
    before = model(ids).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True))
    assert torch.equal(wrapped(ids).logits, before)
    wrapped(ids).logits.sum().backward()
    lora = [parameter for name, parameter in wrapped.named_parameters() if "lora_B" in name]
    assert [parameter.size(0) for parameter in lora] == [2 * 40, 2 * 40]
    assert all(parameter.grad.abs().max() > 0 for parameter in lora)
    with torch.no_grad():
        for parameter in lora:
            parameter.add_(0.1)
    moved = wrapped(ids).logits
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, moved, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, merged(ids).logits)


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
