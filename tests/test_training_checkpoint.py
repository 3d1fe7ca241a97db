"""Checkpoints: whole or absent, plain data, and the same model again or a clear no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import bert, clone, gpt2, one_thread, random_blocks, same_weights  # noqa: F401
from torch import nn

pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_geglu.errors import ConfigurationError, TrainingError
from hf_geglu.training import CheckpointFolder, TrainSettings, train


def run(
    model: nn.Module, folder: CheckpointFolder | None, *, blocks: Any = None, resume: bool = False, **changed: Any
) -> Any:
    settings = TrainSettings(**{"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True, **changed})
    blocks = random_blocks(9) if blocks is None else blocks
    latest = folder.latest() if folder and resume else None
    return train(model, blocks, None, settings, checkpoints=folder, resume_from=latest)


def test_a_checkpoint_is_plain_data_and_a_model(tmp_path: Path) -> None:
    model = gpt2()
    run(model, CheckpointFolder(tmp_path))
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"model.safetensors", "config.json", "optimizer.safetensors", "rng-0.safetensors", "progress.json"} <= names
    assert {Path(name).suffix for name in names} == {".safetensors", ".json"}
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4"), model)
    assert model.config.use_cache
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").config.use_cache


def test_the_newest_are_kept(tmp_path: Path) -> None:
    run(gpt2(), CheckpointFolder(tmp_path, keep=2), max_steps=11, save_steps=3)
    assert [path.name for path in CheckpointFolder(tmp_path).all()] == ["checkpoint-9", "checkpoint-11"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-11"}
    run(gpt2(), CheckpointFolder(tmp_path / "all", keep=0), max_steps=4, save_steps=1)
    assert len(CheckpointFolder(tmp_path / "all").all()) == 4


def test_a_lower_limit_makes_room_before_it_takes_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_geglu.training.checkpoints import checkpoint

    run(gpt2(), CheckpointFolder(tmp_path, keep=0), max_steps=4, save_steps=1, lr_scheduler_type="constant")
    (tmp_path / ".checkpoint-9.old").mkdir()  # a process was killed while it removed this
    there: list[set[str]] = []
    monkeypatch.setattr(
        checkpoint, "save_generators", lambda path: there.append({p.name for p in path.parent.parent.iterdir()})
    )
    how = {"max_steps": 5, "save_steps": 1, "lr_scheduler_type": "constant"}
    run(gpt2(), CheckpointFolder(tmp_path, keep=2), resume=True, **how)
    assert there == [{"checkpoint-3", "checkpoint-4", ".checkpoint-5.draft"}]


def test_numbers_are_sorted_as_numbers_and_drafts_are_none(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", ".checkpoint-11.draft", "checkpoint-best", "checkpoint-12"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-12":  # incomplete
            (tmp_path / name / "progress.json").write_text("{}")
    assert [path.name for path in CheckpointFolder(tmp_path).all()] == ["checkpoint-9", "checkpoint-10"]


def test_a_failure_while_writing_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_geglu.training.checkpoints import checkpoint

    real, calls = checkpoint.save_generators, []

    def full_disk(path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no space left on device")
        real(path)

    monkeypatch.setattr(checkpoint, "save_generators", full_disk)
    with pytest.raises(OSError, match="no space"):
        run(gpt2(), CheckpointFolder(tmp_path))
    folder = CheckpointFolder(tmp_path)
    assert [path.name for path in folder.all()] == ["checkpoint-2"]
    whole, resumed = gpt2(), gpt2()
    run(whole, None)
    run(resumed, folder, resume=True)  # over the draft that was left behind
    assert same_weights(whole, resumed)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_a_checkpoint_is_written_again_over_an_older_one(tmp_path: Path) -> None:
    run(gpt2(), CheckpointFolder(tmp_path))
    model = gpt2()
    run(model, CheckpointFolder(tmp_path), learning_rate=1e-3)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4"), model)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"learning_rate": 1e-3}, ConfigurationError, r"learning_rate: 0\.01 -> 0\.001 since checkpoint-4"),
        ({"seed": 1}, ConfigurationError, "seed: 42 -> 1"),
        ({"blocks": random_blocks(8)}, TrainingError, "blocks: 9 -> 8"),
        ({"blocks": random_blocks(9, seed=1)}, TrainingError, "first block"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, changed: Any, error: type[Exception], message: str) -> None:
    run(gpt2(), CheckpointFolder(tmp_path))
    with pytest.raises(error, match=message):
        run(gpt2(), CheckpointFolder(tmp_path), resume=True, **changed)


def test_another_model_is_not_resumed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    run(Plain(12), folder)
    with pytest.raises(TrainingError, match="does not fit the model"):
        run(Plain(16), folder, resume=True)
    smaller = gpt2()
    with pytest.raises(TrainingError, match="does not fit the model"):
        run(smaller, folder, resume=True)


@pytest.mark.parametrize("damage", ["{", '{"format": 99}', None])
def test_a_checkpoint_that_cannot_be_read(tmp_path: Path, damage: str | None) -> None:
    run(gpt2(), CheckpointFolder(tmp_path))
    path = tmp_path / "checkpoint-4" / "progress.json"
    path.unlink() if damage is None else path.write_text(damage)
    with pytest.raises(TrainingError, match="checkpoint-4"):
        train(gpt2(), random_blocks(9), None, TrainSettings(use_cpu=True), resume_from=tmp_path / "checkpoint-4")


def test_a_longer_run_takes_its_own_schedule_and_batches_may_change(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    run(gpt2(), folder)
    result = run(gpt2(), folder, resume=True, max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert [record.step for record in result.steps] == list(range(1, 9))
    assert result.steps[4].learning_rate == pytest.approx(1e-2 * 4 / 8)
    progress = json.loads((tmp_path / "checkpoint-8" / "progress.json").read_text())
    assert progress["draws"] == 4 * 8 + 4 * 6


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    folder, model, again = CheckpointFolder(tmp_path), gpt2(), gpt2()
    first = run(model, folder)
    assert run(again, folder, resume=True) == first
    assert same_weights(model, again)


class Plain(nn.Module):
    """No model of Transformers: tied weights, no config, a tuple as output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, width)
        self.head = nn.Linear(width, 96, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.head(self.embedding(input_ids)),)


def mixtral() -> nn.Module:
    """Saved under other names than it has in memory by Transformers 5."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=96,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            num_experts_per_tok=1,
            max_position_embeddings=64,
        )
    )


@pytest.mark.parametrize("make", [lambda: Plain(12), bert, mixtral], ids=["plain", "bert", "mixtral"])
def test_any_model_resumes(tmp_path: Path, make: Any) -> None:
    whole, resumed = make(), make()
    expected = run(whole, None)
    folder = CheckpointFolder(tmp_path)
    run(make(), folder, max_steps=4, save_steps=2)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    checkpoint = tmp_path / "checkpoint-2"
    settings = TrainSettings(max_steps=4, save_steps=2, learning_rate=1e-2, use_cpu=True)
    result = train(resumed, random_blocks(9), None, settings, resume_from=checkpoint)
    assert result.losses == expected.losses
    assert same_weights(whole, resumed)


def test_a_copy_of_a_trained_model_stands_alone() -> None:
    model = gpt2()
    run(model, None, bf16=True)
    copy = clone(model)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(copy(ids).logits, model(ids).logits)
