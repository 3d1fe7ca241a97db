"""The training loop: `train(model, train_blocks, eval_blocks, settings)`. It needs accelerate, and neither files nor
datasets.

The loss of a step is the sum of the token losses over all its forwards and processes, divided by the number of tokens
predicted in all of them. The tokens are counted before the first forward, so that each forward can be scaled by the
final count; hence 1x8 equals 8x1 even where the batches hold unequal numbers of tokens.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_geglu.errors import ConfigurationError, TrainingError
from hf_geglu.modes import in_mode
from hf_geglu.training.batches import BatchShape, Blocks, MapBlocks, step_batches, step_count
from hf_geglu.training.checkpoint import CheckpointFolder, Progress, TrainingState, fingerprint
from hf_geglu.training.evaluation import evaluate, summed_nll, to_device, without_cache
from hf_geglu.training.head import Head, NoHead, find_head
from hf_geglu.training.objectives import IGNORED, Batch, CausalLM, Objective
from hf_geglu.training.optimizer import make_optimizer, make_scheduler
from hf_geglu.training.records import EvalRecord, StepRecord, TrainResult
from hf_geglu.training.settings import TrainSettings
from hf_geglu.training.trainable import choose_trainable, value_masks

logger = logging.getLogger(__name__)


def make_accelerator(settings: TrainSettings) -> Any:
    """An `accelerate.Accelerator` for these settings, for the process that `accelerate launch` or plain python started.

    Raises:
        ConfigurationError: accelerate is not installed, the precision does not go with the device, or the strategy is
        not supported.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ConfigurationError(
            "accelerate is not installed: expected it for training. Run: pip install 'hf_geglu[train]'"
        ) from error
    # accelerate keeps one state a process and refuses another precision; a second run in the same process may want one.
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(
            mixed_precision=settings.precision(),
            cpu=settings.use_cpu,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=settings.ddp_find_unused_parameters)],
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"mixed_precision={settings.precision() or 'as launched'}: {error} Use --mixed_precision bf16 or no, or "
            "another device."
        ) from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigurationError(
            "fp16 mixed precision on a CPU: expected a GPU, which has fp16 arithmetic. Use bf16, or no mixed precision."
        )
    # The loop weighs forwards by tokens; accelerate would divide by their number once more (`accelerate launch` can
    # set it).
    accelerator.gradient_accumulation_steps = 1
    strategy = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if strategy not in {"NO", "MULTI_CPU", "MULTI_GPU"}:
        raise ConfigurationError(
            f"distributed strategy {strategy}: expected one process, or several with whole copies of the model (DDP). "
            "Run `accelerate config` again without FSDP, DeepSpeed or Megatron."
        )
    return accelerator


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
) -> TrainResult:
    """Train `model` in place.

    Two models trained with the same blocks and settings see the same batches in the same order, with the same dropout
    and masks. The random generators of torch, numpy and Python are seeded. The model ends up on the device of the
    accelerator, otherwise as it came (mode, cache, wrappers); weights in half precision are cast as `settings.dtype`
    says.

    Args:
        model: anything that takes input_ids and returns logits.
        train_blocks: blocks of tokens, each a mapping with input_ids (and perhaps attention_mask, labels), a tensor
        or a list of ids;
            a list or Dataset of them, or a stream.
        eval_blocks: the same, to evaluate on at step 0, every `settings.eval_steps` and at the end; None: no
        evaluation. settings: how to train. objective: what is predicted; by default the next token. on_step: called
        after each step. What it raises ends the training. on_eval: called after each evaluation. checkpoints: where
        checkpoints go, every `settings.save_steps` and at the end; None: nowhere. resume_from: a checkpoint of this
        run to go on from. accelerator: by default one is made.

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
        cleanup.enter_context(_without_marks(model))
        cleanup.enter_context(_gradient_checkpointing(model, settings))
        _cast(model, settings)
        model.to(accelerator.device)
        head = _head(model, settings)
        trained = choose_trainable(model, settings.trainable)
        cleanup.enter_context(trained.only(model))
        optimizer = make_optimizer(model, settings, values=trained.values or _values_of(model, settings))
        scheduler = make_scheduler(optimizer, settings, total_steps=total)
        _seed(settings.seed + int(accelerator.process_index))
        state = TrainingState(
            model, optimizer, scheduler, accelerator.scaler, settings, fingerprint(train_blocks, objective)
        )
        progress = (
            Progress.start() if resume_from is None else state.restore(resume_from, int(accelerator.process_index))
        )
        prepared, stepper = accelerator.prepare(model, optimizer)
        cleanup.enter_context(in_mode(prepared, training=True))

        def evaluate_now(step: int) -> None:
            if eval_blocks is None or any(record.step == step for record in progress.evals):
                return
            result = evaluate(
                prepared,
                eval_blocks,
                objective=objective,
                batch_size=settings.per_device_eval_batch_size,
                accelerator=accelerator,
                head=head,
            )
            progress.evals.append(EvalRecord.at(step, result))
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
        while progress.step < total:
            step = progress.step + 1
            begin = time.perf_counter()
            micro_batches = next(batches)
            rate = float(scheduler.get_last_lr()[0])
            with without_cache(model):
                loss, predicted, tokens = _accumulate(prepared, micro_batches, accelerator, head)
            if not math.isfinite(loss):
                raise _not_finite("loss", loss, step, rate, checkpoints)
            norm = float(accelerator.clip_grad_norm_(prepared.parameters(), settings.max_grad_norm or math.inf))
            # With fp16 an overflowing gradient is expected now and then: the scaler skips the step and lowers its
            # scale.
            if not math.isfinite(norm) and accelerator.scaler is None:
                raise _not_finite("gradient norm", norm, step, rate, checkpoints)
            stepper.step()
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            stepper.zero_grad()
            record = StepRecord(step, loss, rate, norm, tokens, predicted, time.perf_counter() - begin)
            progress.advance(record, draws=shape.per_step)
            if on_step:
                on_step(record)
            if step == total or (settings.eval_steps and step % settings.eval_steps == 0):
                evaluate_now(step)
            if checkpoints and settings.save_steps and (step == total or step % settings.save_steps == 0):
                checkpoints.save(state, progress, accelerator)
        evaluate_now(total)
    return TrainResult(tuple(progress.steps), tuple(progress.evals))


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


def _head(model: nn.Module, settings: TrainSettings) -> Head | NoHead:
    """Where the loss is computed; says so where the logits are needed for it."""
    if settings.chunked_cross_entropy == "off":
        return NoHead("chunked_cross_entropy is off")
    head = find_head(model)
    if isinstance(head, NoHead):
        logger.info("the logits of a forward are made whole: %s", head.reason)
    return head


def _accumulate(
    model: nn.Module, batches: list[Batch], accelerator: Any, head: Head | NoHead
) -> tuple[float, int, int]:
    """Backward of the mean loss over all forwards and processes of a step; returns (loss, predicted, tokens)."""
    counts = torch.tensor(
        [
            sum(int((batch["labels"] != IGNORED).sum()) for batch in batches),
            sum(
                int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel())
                for batch in batches
            ),
        ],
        device=accelerator.device,
    )
    predicted, tokens = (int(n) for n in accelerator.reduce(counts, reduction="sum").tolist())
    # A step without anything to predict has loss 0 and gradient 0.
    share = accelerator.num_processes / max(predicted, 1)  # DDP takes the mean over processes; we want the sum
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)
        with nullcontext() if last else accelerator.no_sync(model):
            loss = summed_nll(model, to_device(batch, accelerator.device), head) * share
            accelerator.backward(loss)
        total += loss.detach()
    return float(accelerator.reduce(total, reduction="mean")), predicted, tokens


def _not_finite(what: str, value: float, step: int, rate: float, checkpoints: CheckpointFolder | None) -> TrainingError:
    kept = checkpoints.latest() if checkpoints else None
    left = f"the last good state is kept in {kept.name}" if kept else "no checkpoint had been written yet"
    return TrainingError(
        f"{what} became {value} at step {step} (learning rate {rate:.3g}): expected a finite number. Training stopped "
        f"before the update; {left}. Lower --learning_rate, add --warmup_steps, or use bf16 rather than fp16."
    )


def _seed(seed: int) -> None:
    """Seed what dropout and remote code may draw from. Processes differ, so that their dropout does."""
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed % 2**32)


def _cast(model: nn.Module, settings: TrainSettings) -> None:
    """Weights in the type they are trained in; says so where that changes something."""
    if settings.dtype == "auto":
        return
    wanted: torch.dtype = getattr(torch, settings.dtype)
    found = {p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16, torch.float32)} - {
        wanted
    }
    if found:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        logger.info("weights in %s are cast to %s for training (--dtype auto leaves them)", names, settings.dtype)
        model.to(wanted)


@contextmanager
def _gradient_checkpointing(model: nn.Module, settings: TrainSettings) -> Iterator[None]:
    """Gradient checkpointing for the run, if it is wanted and not on already.

    Raises:
        ConfigurationError: a model that cannot.
    """
    module: Any = model
    if not settings.gradient_checkpointing or getattr(module, "is_gradient_checkpointing", False):
        yield
        return
    if not getattr(module, "supports_gradient_checkpointing", False):
        raise ConfigurationError(
            f"--gradient_checkpointing with {type(model).__name__}: expected a model that supports it. Leave it out."
        )
    # The reentrant form loses the gradients of blocks whose inputs need none.
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        module.gradient_checkpointing_disable()


@contextmanager
def _without_marks(model: nn.Module) -> Iterator[None]:
    """Take off what accelerate hangs on the instance (a wrapped `forward`, a mark that it is prepared).

    They would outlive the accelerator: the next `train` would take the model for prepared, and a later conversion
    would keep calling the old forward.
    """
    before = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - before:
            vars(model).pop(name)
