"""The loop: what it computes, and that nothing of it depends on how a batch is cut."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import bert, clone, gpt2, llama, one_thread, random_blocks, same_weights  # noqa: F401
from torch import nn

pytest.importorskip("accelerate")

from hf_geglu.errors import ConfigurationError, DataError, TrainingError
from hf_geglu.training import (
    CausalLM,
    CheckpointFolder,
    MaskedLM,
    StepRecord,
    TrainResult,
    TrainSettings,
    evaluate,
    train,
)
from hf_geglu.training.objectives.objective import IGNORED
from hf_geglu.training.updates.optimizer import make_optimizer, make_scheduler

MLM = MaskedLM(mask_token_id=4, vocab_size=96, special_ids=frozenset(range(6)), probability=0.3, pad_token_id=5)


def settings(**changed: Any) -> TrainSettings:
    return TrainSettings(**{"max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 1, "use_cpu": True, **changed})


def unequal_blocks(count: int) -> list[dict[str, torch.Tensor]]:
    """Blocks of 3 to 16 tokens: forwards then hold unequal numbers of tokens."""
    return [{"input_ids": block["input_ids"][: 3 + 5 * i % 14]} for i, block in enumerate(random_blocks(count))]


@pytest.mark.parametrize(
    ("model", "objective"), [(gpt2(), CausalLM()), (llama(), CausalLM()), (bert(), MLM)], ids=["gpt2", "llama", "bert"]
)
def test_one_times_eight_is_eight_times_one(model: nn.Module, objective: Any) -> None:
    results = []
    for forward, forwards in ((8, 1), (1, 8), (3, 2), (2, 3)):
        own = clone(model).double()
        cut = settings(per_device_train_batch_size=forward, gradient_accumulation_steps=forwards, dtype="auto")
        results.append((train(own, unequal_blocks(20), None, cut, objective=objective), own))
    for (a, first), (b, second) in (results[:2], results[2:]):
        # The loss is summed in float32; AdamW divides gradients by their size and so magnifies rounding.
        assert a.losses == pytest.approx(b.losses, rel=1e-6)
        assert [r.predicted for r in a.steps] == [r.predicted for r in b.steps]
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens() -> None:
    model, blocks = gpt2(), unequal_blocks(6)
    total, count = by_hand(model, blocks)
    result = train(
        clone(model), blocks, None, settings(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    )
    assert result.losses[0] == pytest.approx(total / count, rel=1e-5)
    assert result.steps[0].predicted == count
    assert result.steps[0].tokens == sum(len(block["input_ids"]) for block in blocks)


def by_hand(model: nn.Module, blocks: list[dict[str, torch.Tensor]]) -> tuple[float, int]:
    """Sum and number of the token losses, one block at a time, shifted the ordinary way."""
    total, count = 0.0, 0
    model.eval()
    for block in blocks:
        ids = block["input_ids"]
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double()
        total += float(nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
        count += len(ids) - 1
    return total, count


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_weighted_by_tokens(batch_size: int) -> None:
    model, blocks = gpt2(), unequal_blocks(7)
    total, count = by_hand(model, blocks)
    result = evaluate(model, blocks, batch_size=batch_size)
    assert result.nll == pytest.approx(total / count, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.tokens == count


def test_evaluate_leaves_the_model_as_it_was() -> None:
    model = gpt2(dropout=0.5)
    model.train()
    frozen = model.get_submodule("transformer.h.0").eval()
    first, second = evaluate(model, random_blocks(3)), evaluate(model, random_blocks(3))
    assert first == second
    assert model.training
    assert not frozen.training
    assert model.config.use_cache


def test_nothing_to_evaluate() -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        evaluate(gpt2(), [])


def test_a_masked_evaluation_has_the_same_masks_every_time() -> None:
    model = bert()
    assert evaluate(model, random_blocks(5), objective=MLM) == evaluate(model, random_blocks(5), objective=MLM)
    assert (
        evaluate(model, random_blocks(5), objective=MLM, batch_size=2).tokens
        == evaluate(model, random_blocks(5), objective=MLM, batch_size=5).tokens
    )


def test_evaluation_at_step_0_along_the_way_and_at_the_end() -> None:
    model, blocks, held = gpt2(), random_blocks(20), random_blocks(4, seed=1)
    start = evaluate(model, held)
    seen: list[int] = []
    result = train(model, blocks, held, settings(max_steps=5, eval_steps=2), on_eval=lambda r: seen.append(r.step))
    assert [record.step for record in result.evals] == seen == [0, 2, 4, 5]
    assert result.evals[0].nll == pytest.approx(start.nll, rel=1e-6)
    assert result.evals[-1].nll == pytest.approx(evaluate(model, held).nll, rel=1e-6)


def test_training_lowers_the_loss_and_tells_each_step() -> None:
    model, blocks = gpt2(dropout=0.1), random_blocks(4)
    seen: list[StepRecord] = []
    result = train(model, blocks, None, settings(max_steps=20, per_device_train_batch_size=4), on_step=seen.append)
    assert tuple(seen) == result.steps
    assert result.losses[-1] < result.losses[0] - 0.5
    assert [record.step for record in seen] == list(range(1, 21))
    assert seen[0].learning_rate == 0.0  # of the warm-up
    assert seen[1].learning_rate == pytest.approx(1e-2)
    assert result.tokens == 20 * 4 * 16
    assert result.tokens_per_second > 0


class Recorder(nn.Module):
    """Remembers what a model is shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[list[list[int]]] = []

    def forward(self, input_ids: torch.Tensor) -> Any:
        self.seen.append(input_ids.tolist())
        return self.model(input_ids)


def test_a_control_sees_the_same_batches_masks_and_order() -> None:
    recorders = []
    for model in (bert(), bert()):
        if recorders:
            with torch.no_grad():
                next(model.parameters()).mul_(2.0)  # another model, and so another loss
        recorder = Recorder(model)
        torch.rand(len(recorders) + 3)  # whatever random numbers were drawn before
        train(recorder, random_blocks(10), None, settings(per_device_train_batch_size=3), objective=MLM)
        recorders.append(recorder)
    assert recorders[0].seen == recorders[1].seen
    assert len(recorders[0].seen) == 4


@pytest.mark.parametrize(
    ("kind", "objective"), [(lambda: gpt2(dropout=0.2), CausalLM()), (bert, MLM)], ids=["clm", "mlm"]
)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, kind: Any, objective: Any) -> None:
    blocks, held = random_blocks(10), random_blocks(3, seed=1)
    how = settings(max_steps=7, save_steps=2, eval_steps=3, per_device_train_batch_size=3, lr_scheduler_type="cosine")
    whole = kind()
    expected = train(whole, blocks, held, how, objective=objective)

    folder = CheckpointFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(kind(), blocks, held, how, objective=objective, on_step=interrupt(5), checkpoints=folder)
    latest = folder.latest()
    assert latest is not None
    assert latest.name == "checkpoint-4"
    torch.rand(5)
    resumed = kind()
    with torch.no_grad():
        next(resumed.parameters()).zero_()  # all of it comes from the checkpoint
    result = train(resumed, blocks, held, how, objective=objective, checkpoints=folder, resume_from=latest)
    assert untimed(result) == untimed(expected)
    assert same_weights(resumed, whole)


def interrupt(step: int) -> Any:
    def stop(record: StepRecord) -> None:
        if record.step == step:
            raise KeyboardInterrupt

    return stop


def untimed(result: TrainResult) -> Any:
    return [(r.step, r.loss, r.learning_rate, r.grad_norm, r.predicted) for r in result.steps], result.evals


def test_a_stream_resumes_where_it_was(tmp_path: Path) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(random_blocks(7))

    how = settings(max_steps=4, save_steps=2, per_device_train_batch_size=3)
    whole, resumed = gpt2(), gpt2()
    expected = train(whole, Stream(), None, how)
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(gpt2(), Stream(), None, how, on_step=interrupt(3), checkpoints=folder)
    assert train(resumed, Stream(), None, how, resume_from=folder.latest()).losses == expected.losses
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("saving", [0, 2])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, saving: int) -> None:
    model = gpt2()

    def poison(record: StepRecord) -> None:
        if record.step == 3:
            with torch.no_grad():
                model.transformer.wte.weight[10:] = math.nan

    folder = CheckpointFolder(tmp_path)
    kept = "checkpoint-2" if saving else "no checkpoint"
    with pytest.raises(TrainingError, match=rf"loss became nan at step 4.*{kept}.*learning_rate"):
        train(
            model, random_blocks(9), None, settings(max_steps=9, save_steps=saving), on_step=poison, checkpoints=folder
        )
    assert [path.name for path in folder.all()] == ["checkpoint-2"] * bool(saving)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    model = gpt2()
    model.transformer.wpe.weight.register_hook(lambda gradient: gradient * math.inf)
    before = clone(gpt2())
    with pytest.raises(TrainingError, match="gradient norm became"):
        train(model, random_blocks(9), None, settings())
    assert same_weights(model, before)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = gpt2()

    def poison(record: StepRecord) -> None:
        with torch.no_grad():
            model.transformer.h[0].ln_1.bias[0] = math.inf

    with pytest.raises(TrainingError, match=r"h\.0\.ln_1\.bias first.*no checkpoint of them"):
        train(
            model,
            random_blocks(9),
            None,
            settings(save_steps=1),
            on_step=poison,
            checkpoints=CheckpointFolder(tmp_path),
        )
    assert CheckpointFolder(tmp_path).all() == []


def test_a_frozen_model() -> None:
    model = gpt2().requires_grad_(False)
    with pytest.raises(TrainingError, match="without trainable parameters"):
        train(model, random_blocks(2), None, settings())


def test_frozen_parameters_stay() -> None:
    model = gpt2()
    model.transformer.h[0].requires_grad_(False)
    before = clone(model)
    train(model, random_blocks(9), None, settings())
    assert same_weights(model.transformer.h[0], before.transformer.h[0])
    assert not same_weights(model.transformer.h[1], before.transformer.h[1])


def test_autocast_keeps_float32_weights_and_leaves_no_marks() -> None:
    model = gpt2()
    before = set(vars(model))
    result = train(model, random_blocks(9), random_blocks(2), settings(bf16=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert set(vars(model)) == before
    full = train(gpt2(), random_blocks(9), random_blocks(2), settings())
    assert result.losses != full.losses
    assert result.losses == pytest.approx(full.losses, rel=0.02)
    # and again: a mark left behind would make accelerate take the model for prepared
    train(model, random_blocks(9), None, settings(mixed_precision="bf16"))


def test_half_precision_weights_are_cast_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = gpt2().to(torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="hf_geglu"):
        train(model, random_blocks(9), None, settings(max_steps=1))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "weights in bfloat16 are cast to float32" in caplog.text
    left = gpt2().to(torch.bfloat16)
    train(left, random_blocks(9), None, settings(max_steps=1, dtype="auto"))
    assert {p.dtype for p in left.parameters()} == {torch.bfloat16}


def test_fp16_on_a_cpu() -> None:
    with pytest.raises(ConfigurationError, match="expected a GPU"):
        train(gpt2(), random_blocks(2), None, settings(fp16=True))


def test_gradient_checkpointing_changes_no_loss_and_is_switched_off_again() -> None:
    model = llama()
    plain = train(llama(), random_blocks(9), None, settings())
    saved = train(model, random_blocks(9), None, settings(gradient_checkpointing=True))
    assert saved.losses == pytest.approx(plain.losses, rel=1e-6)
    assert not model.is_gradient_checkpointing
    with pytest.raises(ConfigurationError, match="supports it"):
        train(Recorder(gpt2()), random_blocks(9), None, settings(gradient_checkpointing=True))


def test_modes_and_cache_are_put_back() -> None:
    model = gpt2()
    model.eval()
    train(model, random_blocks(9), None, settings(max_steps=1))
    assert not model.training
    assert model.config.use_cache


def test_decay_and_schedule() -> None:
    model = gpt2()
    optimizer = make_optimizer(model, settings(weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in spared["params"])
    share = settings(warmup_steps=0.0, warmup_ratio=0.25)
    assert share.warmup(10) == settings(warmup_steps=0.25).warmup(10) == 3
    with pytest.raises(ConfigurationError, match="at most as many"):
        settings(warmup_steps=11).warmup(10)
    with pytest.raises(ConfigurationError, match="cosine_with_min_lr"):
        make_scheduler(optimizer, settings(lr_scheduler_type="cosine_with_min_lr"), total_steps=10)
    kwargs = json.dumps({"min_lr": 1e-3})
    schedule = make_scheduler(
        optimizer, settings(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=kwargs), total_steps=10
    )
    assert schedule.get_last_lr()[0] == 0.0


def test_accelerate_has_no_say_in_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(gpt2(), random_blocks(9), None, settings(gradient_accumulation_steps=2))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    launched = train(gpt2(), random_blocks(9), None, settings(gradient_accumulation_steps=2))
    assert untimed(launched) == untimed(plain)


def test_an_example_without_labels_to_learn_from_is_no_nan() -> None:
    blocks = [{"input_ids": [7, 8, 9], "labels": [IGNORED] * 3}]
    assert train(gpt2(), blocks, None, settings(max_steps=1)).losses == (0.0,)


def test_training_needs_no_datasets() -> None:
    code = """
import sys
sys.modules["datasets"] = None
from hf_geglu.training import TrainSettings, evaluate, train
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1))
blocks = [[1, 2, 3, 4]] * 4
train(model, blocks, blocks, TrainSettings(max_steps=1, use_cpu=True))
evaluate(model, blocks)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
