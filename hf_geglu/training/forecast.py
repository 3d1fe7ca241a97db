"""What a run will take, before it is started: steps, tokens, parameters, FLOPs, memory, time, disk.

Counted where it can be counted, measured on two steps of this very model on this device where it cannot.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_geglu.errors import ConfigurationError
from hf_geglu.training.data.batches import Blocks, MapBlocks
from hf_geglu.training.evaluation import evaluate
from hf_geglu.training.loop import train
from hf_geglu.training.memory import peak_memory
from hf_geglu.training.objectives.objective import Objective, Task
from hf_geglu.training.outset import ConvertFn, set_out
from hf_geglu.training.parameters.adapters import adapted
from hf_geglu.training.parameters.trainable import choose_trainable
from hf_geglu.training.reports.log import clock
from hf_geglu.training.settings.run import RunSettings, TrainSettings

GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        total_steps: optimizer steps.
        tokens_per_step: over all processes, as in the steps that were tried.
        parameters: of the model.
        trained: how many of them are trained.
        flops_per_step: of the matrix products of a step of this process, forward and backward, as torch counts them
            for one block.
        seconds_per_step: of the second step; the first one has to warm up.
        evaluation_seconds: of all evaluations together.
        peak_bytes: of the process (CPU) or of what torch allocates (GPU), training and evaluation.
        disk_bytes: of the model, the checkpoints that are kept, and one being written.
        advice: what will not work, or not well.
    """

    total_steps: int
    tokens_per_step: float
    parameters: int
    trained: int
    flops_per_step: int
    seconds_per_step: float
    evaluation_seconds: float
    peak_bytes: int
    disk_bytes: int
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        tokens, flops = self.tokens_per_step * self.total_steps, self.flops_per_step * self.total_steps
        train_seconds = self.seconds_per_step * self.total_steps
        lines = [
            f"steps       {self.total_steps:,} of {self.tokens_per_step:,.0f} tokens: {tokens:,.0f} tokens",
            f"parameters  {self.trained:,} of {self.parameters:,} are trained",
            f"FLOPs       {self.flops_per_step:.3g} a step, {flops:.3g} in all",
            f"time        {self.seconds_per_step:.2f} s a step, {clock(train_seconds)} of training and "
            f"{clock(self.evaluation_seconds)} of evaluation",
            f"memory      {self.peak_bytes / GIB:.2f} GiB at the peak",
            f"disk        {self.disk_bytes / GIB:.2f} GiB",
        ]
        return "\n".join([*lines, *(f"mind        {line}" for line in self.advice)])


def forecast_run(settings: RunSettings, task: Task, *, convert_fn: ConvertFn | None = None) -> Forecast:
    """`forecast` of what `finetune` would do with these settings. Writes nothing.

    Raises:
        HfGegluError: as `finetune` would.
    """
    most = _bytes(settings.output.max_memory)
    device = torch.device("cuda" if torch.cuda.is_available() and not settings.train.use_cpu else "cpu")
    with peak_memory(device) as opening:
        outset, model = set_out(settings, task, convert_fn=convert_fn)
    with adapted(model, settings.train):
        found = forecast(
            model,
            outset.corpus.train,
            outset.corpus.validation,
            settings.train,
            objective=outset.objective,
            total_steps=outset.total_steps,
            folder=outset.folder.path,
            keep=settings.output.save_total_limit,
            max_memory=most,
            teacher=outset.teacher,
        )
    return dataclasses.replace(found, peak_bytes=max(found.peak_bytes, opening.bytes))  # a conversion may take more


def _bytes(text: str | None) -> int | None:
    """`8GB` as accelerate and transformers read it (10**9), `8GiB` (2**30), or a number of bytes."""
    if text is None:
        return None
    from accelerate.utils import convert_file_size_to_int

    try:
        return int(text) if text.isdigit() else int(convert_file_size_to_int(text))
    except ValueError as error:
        raise ConfigurationError(
            f"--max_memory {text}: expected a size such as 8GB or 8GiB. Give a number and its unit."
        ) from error


def forecast(
    model: nn.Module,
    train_blocks: Blocks,
    eval_blocks: MapBlocks | None,
    settings: TrainSettings,
    *,
    objective: Objective,
    total_steps: int,
    folder: Path,
    keep: int,
    max_memory: int | None = None,
    teacher: nn.Module | None = None,
) -> Forecast:
    """Try two steps and an evaluation of a few blocks, and reckon. The weights of `model` are not what they were then.

    Args:
        model: to be trained; converted already.
        train_blocks: of the run.
        eval_blocks: of the run.
        settings: of the run.
        objective: of the run.
        total_steps: of the run.
        folder: where it would write; nothing is written.
        keep: how many checkpoints stay.
        max_memory: bytes that the run may take; None for no bound.
        teacher: of the run.
    """
    part = choose_trainable(model, settings.trainable)
    with part.only(model):
        parts = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained, trained_bytes = sum(each.numel() for each in parts), sum(each.nbytes for each in parts)
    short = dataclasses.replace(
        settings,
        max_steps=1,
        warmup_steps=0.0,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        lr_scheduler_kwargs=None,
        save_steps=0,
        eval_steps=0,
        load_best_model_at_end=False,
    )
    # torch sees only its own products, and those of a whole block and of whole logits are what others compute in pieces
    counted = dataclasses.replace(
        short,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        chunked_cross_entropy="off",
        ops="reference",
    )
    with FlopCounterMode(display=False) as counter:
        train(model, train_blocks, None, counted, objective=objective, teacher=teacher)
    twice = dataclasses.replace(short, max_steps=2)
    device = next(model.parameters()).device
    few = None if eval_blocks is None else _few(eval_blocks, 2 * settings.per_device_eval_batch_size)
    with peak_memory(device) as peak:
        two = train(model, train_blocks, None, twice, objective=objective, teacher=teacher)
        evaluation = _evaluation_seconds(model, few, eval_blocks, settings, objective, total_steps)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    checkpoint = weights + 8 * trained  # two moments in float32
    keeps_best = settings.load_best_model_at_end and eval_blocks is not None
    # the best weights are kept on the CPU
    beside = trained_bytes if keeps_best and device.type == "cpu" else 0
    checkpoint += (trained_bytes if keeps_best else 0) + (4 * trained if settings.ema_decay else 0)
    disk = weights + (checkpoint * (keep + 1) if settings.save_steps else 0)
    found = Forecast(
        total_steps=total_steps,
        tokens_per_step=two.tokens / 2,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=trained,
        flops_per_step=int(counter.get_total_flops())
        * settings.per_device_train_batch_size
        * settings.gradient_accumulation_steps,
        seconds_per_step=two.steps[1].seconds,
        evaluation_seconds=evaluation,
        peak_bytes=peak.bytes + beside,
        disk_bytes=disk,
    )
    advice = _about_disk(found, folder)
    if max_memory is not None and found.peak_bytes > max_memory:
        advice.append(_about_memory(found, model, train_blocks, twice, objective, max_memory, teacher))
    if eval_blocks is None:
        advice.append("nothing is held out, so that nobody will know whether it got better")
    return dataclasses.replace(found, advice=tuple(advice))


def _few(blocks: MapBlocks, count: int) -> list[Any]:
    return [blocks[index] for index in range(min(count, len(blocks)))]


def _evaluation_seconds(
    model: nn.Module,
    few: list[Any] | None,
    blocks: MapBlocks | None,
    settings: TrainSettings,
    objective: Objective,
    total_steps: int,
) -> float:
    if not few or blocks is None:
        return 0.0
    begin = time.perf_counter()
    evaluate(model, few, objective=objective, batch_size=settings.per_device_eval_batch_size)
    each = (time.perf_counter() - begin) / len(few)
    times = 2 + (total_steps - 1) // settings.eval_steps if settings.eval_steps else 2
    return each * len(blocks) * times


def _about_disk(found: Forecast, folder: Path) -> list[str]:
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if found.disk_bytes <= free:
        return []
    return [f"the disk has {free / GIB:.2f} GiB left: lower --save_total_limit, or choose another --output_dir"]


def _about_memory(
    found: Forecast,
    model: nn.Module,
    blocks: Blocks,
    settings: TrainSettings,
    objective: Objective,
    limit: int,
    teacher: nn.Module | None,
) -> str:
    """How the same steps would fit: memory is a fixed part and one that grows with the blocks of a forward."""
    said = f"{found.peak_bytes / GIB:.2f} GiB do not fit into {limit / GIB:.2f}: "
    size = settings.per_device_train_batch_size
    if size == 1:
        return said + "try --gradient_checkpointing, --mixed_precision bf16, a smaller --block_size or --train value"
    half = dataclasses.replace(settings, per_device_train_batch_size=size // 2)
    with peak_memory(next(model.parameters()).device) as peak:
        train(model, blocks, None, half, objective=objective, teacher=teacher)
    slope = max(0.0, (found.peak_bytes - peak.bytes) / (size - size // 2))
    for smaller in (number for number in range(size - 1, 0, -1) if size % number == 0):
        needed = found.peak_bytes - slope * (size - smaller)
        if needed <= limit:
            forwards = settings.gradient_accumulation_steps * size // smaller
            return (
                f"{said}--per_device_train_batch_size {smaller} --gradient_accumulation_steps {forwards} computes the "
                f"same in about {needed / GIB:.2f} GiB"
            )
    return said + "even single blocks do not; try --gradient_checkpointing, --mixed_precision bf16 or --train value"
