"""Everything that a run needs, looked at before anything is written.

Output, settings, tokenizer, data, model and conversion are gone through in that order; whatever can be refused is
refused here. The folder is opened when the first record of the training comes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_geglu.errors import ConfigurationError
from hf_geglu.training.data.batches import BatchShape, step_count
from hf_geglu.training.data.corpus import Corpus
from hf_geglu.training.leak import find_isolation
from hf_geglu.training.objectives.objective import CausalLM, MaskedLM, Objective, Task
from hf_geglu.training.opening import (
    check_causal,
    check_positions,
    check_vocabulary,
    choose_block_size,
    load_config,
    load_model,
    load_processor,
    set_padding,
)
from hf_geglu.training.output import RunFolder, check_output
from hf_geglu.training.parameters.trainable import choose_trainable
from hf_geglu.training.processes.accelerator import check_trackers, make_accelerator
from hf_geglu.training.pushing import check_variant, place_on_hub
from hf_geglu.training.reports.generations import Sampler, sampler_for
from hf_geglu.training.settings.run import ModelSettings, RunSettings, TrainSettings
from hf_geglu.training.tasks import TASKS, Request
from hf_geglu.training.updates.optimizer import make_optimizer, make_scheduler

ConvertFn = Callable[[Any], Any]
"""Converts a model in place and returns a report that can be printed."""


@dataclass(frozen=True, kw_only=True)
class Outset:
    """A run that could start.

    Attributes:
        settings: all of them.
        task: one of `tasks.TASKS`.
        accelerator: of this process.
        folder: where the result goes; nothing was written yet.
        resume_from: checkpoint to go on from.
        processor: tokenizer or image processor.
        corpus: training and held-out blocks.
        objective: what is predicted.
        total_steps: of each training.
        report: what the conversion reported; None without one.
        teacher: what is distilled from, if anything is.
        unconverted: loads the model as it was, for the control.
        sampler: completes prompts before and after; None where none were asked for.
        repo: on the Hub, where the finished model is pushed to; None: nowhere.
    """

    settings: RunSettings
    task: Task
    accelerator: Any
    folder: RunFolder
    resume_from: Path | None
    processor: Any
    corpus: Corpus
    objective: Objective
    total_steps: int
    report: Any
    teacher: nn.Module | None
    unconverted: Callable[[], nn.Module]
    sampler: Sampler | None
    repo: str | None


def set_out(settings: RunSettings, task: Task, *, convert_fn: ConvertFn | None = None) -> tuple[Outset, nn.Module]:
    """Get everything ready, and the model, converted if that was asked for.

    The model comes apart from the rest, so that whoever trains it can let go of it.

    Raises:
        HfGegluError: as `finetune` says.
    """
    kind, model_settings, output = TASKS[task], settings.model, settings.output
    files = [*(settings.data.train_file or ()), *(settings.data.validation_file or ())]
    mixed = [source.rpartition("=")[0] for source in settings.data.dataset_mixture or ()]
    sources = [model_settings.model_name_or_path, settings.data.dataset_name or "", *files, *mixed]
    folder, resume_from = check_output(output, sources=[source for source in sources if source])
    accelerator = make_accelerator(settings.train)
    check_trackers(output.report_to or ())
    repo = place_on_hub(output, folder.path)
    if settings.train.max_steps >= 1:
        _check_schedule(settings.train, settings.train.max_steps)
    config, processor = load_config(model_settings), load_processor(model_settings, kind)
    block_size = target_size = 0
    if kind.reads == "tokens":
        block_size = choose_block_size(settings.data.block_size, config, processor)
        target_size = choose_block_size(
            settings.data.max_target_length, config, processor, default=128, flag="--max_target_length"
        )
    prepared = kind.prepare(Request(settings.data, processor, config, block_size, settings.train.seed, target_size))
    objective, corpus = prepared.objective, prepared.corpus
    if settings.train.distill and not prepared.distils:
        raise ConfigurationError(
            f"--distill {settings.train.distill:g} of a model whose logits are no distribution over classes: expected "
            "a classification with one class each. Leave it out."
        )
    sampler = None
    if kind.writes:
        sampler = sampler_for(
            task,
            output,
            settings.data,
            tokenizer=processor,
            config=config,
            held_out=corpus.validation,
            block_size=block_size,
            seed=settings.train.seed,
        )
    shape = BatchShape(
        settings.train.per_device_train_batch_size,
        settings.train.gradient_accumulation_steps,
        int(accelerator.num_processes),
    )
    total = step_count(settings.train, corpus.train, shape)
    _check_schedule(settings.train, total)

    def open_model() -> nn.Module:
        options, seed = prepared.model_options, settings.train.seed
        model = load_model(model_settings, kind, settings.train.dtype, options=options, seed=seed)
        set_padding(model, processor)
        return model

    model = open_model()
    if kind.reads == "tokens":
        check_vocabulary(model, corpus)
        check_positions(model, block_size)
    if task in ("clm", "sft"):
        check_causal(model)
    if corpus.validation is None:
        _check_not_needed(settings.train)
    report = None
    teacher = open_model() if settings.train.distill else None
    if model_settings.control and settings.train.trainable != "lora":  # has it what is to be trained?
        choose_trainable(model, settings.train.trainable)
    if model_settings.convert:
        report = (convert_fn or _converter(model_settings))(model)
        _tell(accelerator, str(report))
    if repo is not None:
        check_variant(model)
    for line in corpus.lines:
        _tell(accelerator, line)
    if corpus.side_by_side and isinstance(objective, CausalLM | MaskedLM):
        objective = _keeping_apart(objective, model, block_size, accelerator)
    return (
        Outset(
            settings=settings,
            task=task,
            accelerator=accelerator,
            folder=folder,
            resume_from=resume_from,
            processor=processor,
            corpus=corpus,
            objective=objective,
            total_steps=total,
            report=report,
            teacher=teacher,
            unconverted=open_model,
            sampler=sampler,
            repo=repo,
        ),
        model,
    )


def _check_not_needed(settings: TrainSettings) -> None:
    """Refuse what goes by evaluations where there are none.

    Raises:
        ConfigurationError: something does.
    """
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(settings, name):
            raise ConfigurationError(
                f"--{name} without held-out data: expected some to evaluate on. Give --validation_file or "
                "--validation_split_percentage, or leave it out."
            )


def _keeping_apart(
    objective: CausalLM | MaskedLM, model: nn.Module, block_size: int, accelerator: Any
) -> CausalLM | MaskedLM:
    """The objective that keeps the documents of a block apart as this model wants it; says which way, or that there is
    none."""
    model.to(accelerator.device)
    causal = isinstance(objective, CausalLM)
    found = find_isolation(model, causal=causal, longest=block_size, autocast=accelerator.autocast())
    _tell(
        accelerator,
        f"packing: documents of a block are kept apart by {found}, tried on this model"
        if found
        else "packing: this model cannot keep the documents of a block apart; attention reaches over their ends "
        "(--packing false gives each a block of its own)",
    )
    return replace(objective, isolation=found)


def _tell(accelerator: Any, line: str) -> None:
    if accelerator.is_main_process:
        print(line, file=sys.stderr)


def _check_schedule(settings: TrainSettings, total_steps: int) -> None:
    """Make optimizer and schedule once for nothing, to hear their complaints before the data is read."""
    make_scheduler(make_optimizer(nn.Linear(1, 1), settings), settings, total_steps=total_steps)


def _converter(settings: ModelSettings) -> ConvertFn:
    def convert(model: Any) -> Any:
        import hf_geglu

        report = hf_geglu.convert(model, variant=settings.variant, layers=settings.layers)
        hf_geglu.forget_original(model)  # the originals are kept for `revert`; training would carry them along
        return report

    return convert
