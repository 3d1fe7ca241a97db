"""Averages, best models, early stopping and a teacher inside the loop, over a resume too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import clone, llama, one_thread, random_blocks, same_weights  # noqa: F401

pytest.importorskip("accelerate")

from hf_geglu.errors import ConfigurationError
from hf_geglu.training import CheckpointFolder, TrainSettings, evaluate, train


def settings(**changed: Any) -> TrainSettings:
    defaults = {"max_steps": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "use_cpu": True}
    return TrainSettings(**{**defaults, "eval_steps": 1, "save_steps": 2, **changed})


HELD_OUT = random_blocks(4, seed=9)


@pytest.mark.parametrize("how", [{"ema_decay": 0.5}, {"load_best_model_at_end": True}, {"distill": 0.5}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, how: dict[str, Any]) -> None:
    def run(model: Any, folder: str, steps: int, resume: Path | None = None) -> Any:
        teacher = llama() if "distill" in how else None
        return train(
            model,
            random_blocks(20),
            HELD_OUT,
            settings(max_steps=steps, **how),
            checkpoints=CheckpointFolder(tmp_path / folder, keep=0),
            resume_from=resume,
            teacher=teacher,
        )

    whole, cut, again = llama(), llama(), llama()
    expected = run(whole, "whole", 6)
    run(cut, "cut", 4)
    found = run(again, "cut", 6, tmp_path / "cut" / "checkpoint-4")
    assert found.losses == expected.losses
    assert [record.nll for record in found.evals] == [record.nll for record in expected.evals]
    assert found.best_step == expected.best_step
    assert same_weights(again, whole)


def test_what_is_evaluated_is_what_is_left() -> None:
    for how in ({"ema_decay": 0.9}, {"load_best_model_at_end": True}):
        model = llama()
        result = train(model, random_blocks(20), HELD_OUT, settings(learning_rate=0.05, save_steps=0, **how))
        assert result.final is not None
        assert evaluate(model, HELD_OUT).nll == pytest.approx(result.final.nll, abs=1e-6)
    assert result.best_step == min(result.evals, key=lambda record: record.nll).step
    assert result.final.nll < result.evals[-1].nll  # overfitted: the last one is not the best


def test_an_average_does_not_disturb_the_training() -> None:
    plain, averaged = llama(), llama()
    first = train(plain, random_blocks(20), HELD_OUT, settings(save_steps=0))
    second = train(averaged, random_blocks(20), HELD_OUT, settings(save_steps=0, ema_decay=0.9))
    assert first.losses == second.losses
    assert not same_weights(plain, averaged)


def test_patience_ends_a_run_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    how = settings(learning_rate=0.2, early_stopping_patience=2, max_steps=50, save_steps=500)
    folder = CheckpointFolder(tmp_path)
    result = train(llama(), random_blocks(20), HELD_OUT, how, checkpoints=folder)
    steps = len(result.steps)
    assert steps < 50
    best = min(result.evals, key=lambda record: record.nll).step
    assert steps == best + 2
    latest = folder.latest()
    assert latest is not None
    assert latest.name == f"checkpoint-{steps}"
    again = train(llama(), random_blocks(20), HELD_OUT, how, checkpoints=folder, resume_from=latest)
    assert len(again.steps) == steps  # patience was at its end, and still is
    longer = dataclasses.replace(how, early_stopping_patience=0, max_steps=steps + 2)
    assert len(train(llama(), random_blocks(20), HELD_OUT, longer, resume_from=latest).steps) == steps + 2


def test_who_learns_from_itself_alone_has_nothing_to_learn() -> None:
    model, teacher = llama(), llama()
    before = clone(teacher)
    result = train(model, random_blocks(9), None, settings(distill=1.0, save_steps=0), teacher=teacher)
    assert result.losses[0] == pytest.approx(0, abs=1e-6)
    assert same_weights(teacher, before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    torch.manual_seed(1)
    other = llama()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    learned = train(other, random_blocks(9), None, settings(distill=1.0, save_steps=0, max_steps=20), teacher=teacher)
    assert learned.losses[-1] < 0.5 * learned.losses[0]


def test_a_teacher_and_its_share_belong_together() -> None:
    with pytest.raises(ConfigurationError, match=r"distill=0\.5 without a teacher"):
        train(llama(), random_blocks(4), None, settings(distill=0.5))
    with pytest.raises(ConfigurationError, match="distill=0 with a teacher"):
        train(llama(), random_blocks(4), None, settings(), teacher=llama())
