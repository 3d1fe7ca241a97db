"""The training loop: `train(model, train_blocks, eval_blocks, settings)`. It needs accelerate, and neither files nor
datasets.

The loss of a step is the sum of the token losses over all its forwards and processes, divided by the number of tokens
predicted in all of them. The tokens are counted before the first forward, so that each forward can be scaled by the
final count; hence 1x8 equals 8x1 even where the batches hold unequal numbers of tokens.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_geglu.errors import ConfigurationError, TrainingError
from hf_geglu.modes import in_mode
from hf_geglu.training.best import BestModel
from hf_geglu.training.checkpoints.checkpoint import CheckpointFolder
from hf_geglu.training.checkpoints.generators import seed_generators
from hf_geglu.training.checkpoints.progress import Progress
from hf_geglu.training.checkpoints.state import TrainingState, fingerprint
from hf_geglu.training.data.batches import BatchShape, Blocks, MapBlocks, step_batches, step_count
from hf_geglu.training.evaluation import evaluate, to_device, without_cache
from hf_geglu.training.loss import Loss, loss_for
from hf_geglu.training.objectives.objective import Batch, CausalLM, Objective, token_count
from hf_geglu.training.objectives.objective import predicted as is_predicted
from hf_geglu.training.objectives.tied import tied_gradient
from hf_geglu.training.parameters.preparing import cast_weights, gradient_checkpointing, with_kernels
from hf_geglu.training.parameters.trainable import choose_trainable, value_masks
from hf_geglu.training.processes.accelerator import make_accelerator, without_marks
from hf_geglu.training.processes.sharded_model import reshard, share_out, shares_the_model, whole_again
from hf_geglu.training.reports.records import EvalRecord, StepRecord, TrainResult
from hf_geglu.training.settings.run import TrainSettings
from hf_geglu.training.updates.averaging import WeightAverage
from hf_geglu.training.updates.optimizer import AdamState, make_optimizer, make_scheduler, scale_value_updates
from hf_geglu.training.updates.stepping import Stepping, make_stepping
from hf_geglu.training.updates.zero import ZeroState, uses_zero

logger = logging.getLogger(__name__)


def train(
    model: nn.Module,
    train_blocks: Blocks,
    eval_blocks: MapBlocks | None = None,
    settings: TrainSettings | None = None,
    *,
    objective: Objective | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_eval: Callable[[EvalRecord], None] | None = None,
    checkpoints: CheckpointFolder | None = None,
    resume_from: Path | None = None,
    accelerator: Any = None,
    teacher: nn.Module | None = None,
) -> TrainResult:
    """Train `model` in place.

    Two models trained with the same blocks and settings see the same batches in the same order, with the same dropout
    and masks. The random generators of torch, numpy and Python are seeded. The model ends up on the device of the
    accelerator, otherwise as it came (mode, cache, wrappers); weights in half precision are cast as `settings.dtype`
    says.

    Args:
        model: anything that takes input_ids and returns logits.
        train_blocks: blocks of tokens, each a mapping with input_ids (and perhaps attention_mask, labels), a tensor or
            a list of ids; a list or Dataset of them, or a stream.
        eval_blocks: the same, to evaluate on at step 0, every `settings.eval_steps` and at the end; None: no
            evaluation.
        settings: how to train.
        objective: what is predicted; by default the next token.
        on_step: called after each step. What it raises ends the training.
        on_eval: called after each evaluation.
        checkpoints: where checkpoints go, every `settings.save_steps` and at the end; None: nowhere.
        resume_from: a checkpoint of this run to go on from.
        accelerator: by default one is made.
        teacher: what `settings.distill` learns from; moved to the device of the accelerator, otherwise left as it is.

    Returns:
        Steps and evaluations. The model has the weights of the last step, of their average (`settings.ema_decay`), or
        of the best evaluation (`settings.load_best_model_at_end`).

    Raises:
        ConfigurationError: settings that cannot be.
        DataError: blocks that cannot be trained on.
        TrainingError: a loss or gradient that is not finite, or a checkpoint of another run.
    """
    settings = settings or TrainSettings()
    objective = objective or CausalLM()
    accelerator = accelerator or make_accelerator(settings)
    shape = BatchShape(
        settings.per_device_train_batch_size, settings.gradient_accumulation_steps, int(accelerator.num_processes)
    )
    total = step_count(settings, train_blocks, shape)
    with ExitStack() as cleanup:
        cleanup.enter_context(without_marks(model))
        cleanup.enter_context(gradient_checkpointing(model, settings))
        cast_weights(model, settings)
        sharded = shares_the_model(accelerator)
        if not sharded:  # else each layer is moved when it is shared: the whole may not fit
            model.to(accelerator.device)
        cleanup.enter_context(with_kernels(model, settings))
        loss_of = loss_for(model, settings, teacher, accelerator)
        trained, zero = choose_trainable(model, settings.trainable), uses_zero(accelerator)
        cleanup.enter_context(trained.only(model, hooks=zero))
        values = trained.values or _values_of(model, settings)
        if sharded or zero:  # from here on its parameters are others: what holds on to some is made later
            cleanup.enter_context(whole_again(model))
        if sharded:
            share_out(model, accelerator)
            loss_of = loss_of.of_shares()
        elif accelerator.num_processes == 1 and not zero:
            loss_of = loss_of.with_head(cleanup.enter_context(tied_gradient(model, loss_of.head)))
        optimizer = make_optimizer(model, settings, values=values)
        scheduler = make_scheduler(optimizer, settings, total_steps=total)
        scale_value_updates(model, optimizer, settings, values)
        stepping = make_stepping(model, optimizer, accelerator, settings, trained.masks(model))
        prepared = stepping.model
        average = WeightAverage(model, settings.ema_decay) if settings.ema_decay else None
        best = BestModel(
            model,
            keep=settings.load_best_model_at_end,
            patience=settings.early_stopping_patience,
            threshold=settings.early_stopping_threshold,
        )
        seed_generators(settings.seed + int(accelerator.process_index))
        state = TrainingState(
            model,
            ZeroState(model, prepared) if zero else AdamState(model, optimizer),
            scheduler,
            accelerator.scaler,
            settings,
            fingerprint(train_blocks, objective),
            shape,
            companions={"best": best} | ({} if average is None else {"average": average}),
        )
        progress = (
            Progress.start() if resume_from is None else state.restore(resume_from, int(accelerator.process_index))
        )
        best.recall(progress.evals)
        cleanup.enter_context(in_mode(prepared, training=True))

        def evaluate_now(step: int) -> None:
            if eval_blocks is None or any(record.step == step for record in progress.evals):
                return
            with nullcontext() if average is None else average.in_place():
                result = evaluate(
                    prepared,
                    eval_blocks,
                    objective=objective,
                    batch_size=settings.per_device_eval_batch_size,
                    accelerator=accelerator,
                    head=loss_of.head,
                )
                progress.evals.append(EvalRecord.at(step, result))
                best.see(progress.evals[-1])
                reshard(model)
            if on_eval:
                on_eval(progress.evals[-1])

        if progress.step == 0:
            evaluate_now(0)
        batches = step_batches(
            train_blocks,
            objective,
            shape,
            seed=settings.seed,
            start=progress.draws,
            process=int(accelerator.process_index),
        )
        while progress.step < total and not best.should_stop:
            step = progress.step + 1
            begin = time.perf_counter()
            micro_batches = next(batches)
            rate = float(scheduler.get_last_lr()[0])
            with without_cache(model):
                loss, predicted, tokens = _accumulate(stepping, micro_batches, accelerator, loss_of)
            if not math.isfinite(loss):
                raise _not_finite("loss", loss, step, rate, checkpoints)
            norm = stepping.clip()
            # With fp16 an overflowing gradient is expected now and then: the scaler skips the step and lowers its
            # scale.
            if not math.isfinite(norm) and accelerator.scaler is None:
                raise _not_finite("gradient norm", norm, step, rate, checkpoints)
            if stepping.update():
                scheduler.step()
            if average is not None:
                average.update(step)
            record = StepRecord(step, loss, rate, norm, tokens, predicted, time.perf_counter() - begin)
            progress.advance(record, draws=shape.per_step)
            if on_step:
                on_step(record)
            if step == total or (settings.eval_steps and step % settings.eval_steps == 0):
                evaluate_now(step)
            last = step == total or best.should_stop
            if checkpoints and settings.save_steps and (last or step % settings.save_steps == 0):
                checkpoints.save(state, progress, accelerator)
        evaluate_now(progress.step)
        if best.should_stop and progress.step < total:
            logger.info(
                "stopped after step %d: the best held-out loss was that after step %s", progress.step, best.step
            )
        if settings.load_best_model_at_end and best.step is not None:
            best.give()
        elif average is not None:
            average.give()
    chosen = best.step if settings.load_best_model_at_end else None
    return TrainResult(tuple(progress.steps), tuple(progress.evals), best_step=chosen)


def _values_of(model: nn.Module, settings: TrainSettings) -> dict[str, torch.Tensor]:
    """Where the value branches of packed projections lie, if they have a learning rate of their own.

    Raises:
        ConfigurationError: there are none.
    """
    if settings.value_learning_rate is None:
        return {}
    masks = value_masks(model)
    if not masks:
        raise ConfigurationError(
            f"--value_learning_rate {settings.value_learning_rate:g}: {type(model).__name__} has no packed gated "
            "block, such as --convert makes of a dense one. Leave it out."
        )
    return masks


def _accumulate(stepping: Stepping, batches: list[Batch], accelerator: Any, loss_of: Loss) -> tuple[float, int, int]:
    """Backward of the mean loss over all forwards and processes of a step; returns (loss, predicted, tokens)."""
    counts = torch.tensor(
        [
            sum(int(is_predicted(batch["labels"]).sum()) for batch in batches),
            sum(token_count(batch) for batch in batches),
        ],
        device=accelerator.device,
    )
    predicted, tokens = (int(n) for n in accelerator.reduce(counts, reduction="sum").tolist())
    # A step without anything to predict has loss 0 and gradient 0.
    divisor = max(predicted, 1) / accelerator.num_processes  # DDP takes the mean over processes; we want the sum
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)
        with nullcontext() if last else stepping.accumulating():
            loss = loss_of(stepping.model, to_device(batch, accelerator.device), divisor=divisor)
            stepping.backward(loss)
        total += loss.detach()
    return float(accelerator.reduce(total, reduction="mean")), predicted, tokens


def _not_finite(what: str, value: float, step: int, rate: float, checkpoints: CheckpointFolder | None) -> TrainingError:
    kept = checkpoints.latest() if checkpoints else None
    left = f"the last good state is kept in {kept.name}" if kept else "no checkpoint had been written yet"
    return TrainingError(
        f"{what} became {value} at step {step} (learning rate {rate:.3g}): expected a finite number. Training stopped "
        f"before the update; {left}. Lower --learning_rate, add --warmup_steps, or use bf16 rather than fp16."
    )
