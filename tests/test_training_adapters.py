"""LoRA for the time of a training: on, trained, merged; off again where it fails; resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import bert, clone, gpt2, llama, one_thread, random_blocks, same_weights  # noqa: F401

pytest.importorskip("accelerate")
pytest.importorskip("peft")

import hf_geglu
from hf_geglu.errors import ConfigurationError
from hf_geglu.training import CheckpointFolder, MaskedLM, TrainSettings, train
from hf_geglu.training.parameters.adapters import adapted
from hf_geglu.training.parameters.trainable import choose_trainable

MLM = MaskedLM(mask_token_id=4, vocab_size=96, special_ids=frozenset(range(6)), probability=0.3, pad_token_id=5)


def settings(**changed: Any) -> TrainSettings:
    how = {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "trainable": "lora", "use_cpu": True}
    return TrainSettings(**{**how, "lora_r": 4, **changed})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(6, 20)[None]).logits
    return found


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_adapters_are_trained_and_merged(make: Any) -> None:
    model = make()
    hf_geglu.convert(model)
    before = clone(model)
    how = settings(save_steps=0)
    with adapted(model, how):
        torch.testing.assert_close(logits(model), logits(before))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(".lora_" in name for name in trained)
        result = train(model, random_blocks(9), None, how, objective=MLM if make is bert else None)
        during = logits(model)
    assert result.losses[-1] != result.losses[0]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), during, rtol=1e-4, atol=1e-5)
    changed = {
        name for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True) if (p != q).any()
    }
    assert changed
    assert not any("norm" in name.lower() or "ln_" in name or "bias" in name for name in changed)


def test_a_failed_training_leaves_no_adapters() -> None:
    model = llama()
    before = clone(model)

    def fail(_: Any) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"), adapted(model, settings()):
        train(model, random_blocks(9), None, settings(save_steps=0), on_step=fail)
    assert same_weights(model, before)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(folder: str, steps: int, resume: Path | None = None) -> tuple[Any, Any]:
        model = gpt2()
        hf_geglu.convert(model)
        how = settings(max_steps=steps, save_steps=2, lora_dropout=0.1)
        with adapted(model, how):
            result = train(
                model, random_blocks(9), None, how, checkpoints=CheckpointFolder(tmp_path / folder), resume_from=resume
            )
        return model, result

    whole, expected = run("whole", 4)
    run("cut", 2)
    again, found = run("cut", 4, tmp_path / "cut" / "checkpoint-2")
    assert found.losses == expected.losses
    assert same_weights(again, whole)


def test_only_named_layers() -> None:
    with adapted(model := llama(), settings(lora_target_modules=["up_proj"])):
        assert choose_trainable(model, "lora").names == {
            f"model.layers.{layer}.mlp.up_proj.lora_{part}.default.weight" for layer in range(2) for part in "AB"
        }
    with (
        pytest.raises(ConfigurationError, match="lora_target_modules nonsense"),
        adapted(llama(), settings(lora_target_modules=["nonsense"])),
    ):
        pass


def test_without_adapters_there_is_nothing_to_train() -> None:
    with pytest.raises(ConfigurationError, match="has no adapters on it"):
        train(llama(), random_blocks(4), None, settings())
