"""From settings to a saved model: `finetune(settings, task)`.

Everything that can be refused is refused before the output folder is touched: output, settings, tokenizer, data,
model, conversion are gone through in that order, and the folder is opened when the first record of the training
comes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_geglu.training.accelerator import make_accelerator
from hf_geglu.training.adapters import adapted
from hf_geglu.training.batches import BatchShape, step_count
from hf_geglu.training.checkpoint import CheckpointFolder, read_progress
from hf_geglu.training.config_file import replayable
from hf_geglu.training.corpus import Corpus
from hf_geglu.training.curves import LiveCurves
from hf_geglu.training.leak import find_isolation
from hf_geglu.training.lineage import training_record
from hf_geglu.training.log import Narrator, RunLog, to_json
from hf_geglu.training.loop import train
from hf_geglu.training.objectives import CausalLM, MaskedLM, Objective, Task
from hf_geglu.training.opening import (
    check_positions,
    check_vocabulary,
    choose_block_size,
    load_config,
    load_model,
    load_processor,
    set_padding,
)
from hf_geglu.training.optimizer import make_optimizer, make_scheduler
from hf_geglu.training.output import RunFolder, check_output
from hf_geglu.training.records import EvalRecord, StepRecord, TrainResult
from hf_geglu.training.settings import ModelSettings, RunSettings, TrainSettings
from hf_geglu.training.tasks import TASKS, Request
from hf_geglu.training.trainable import choose_trainable

ConvertFn = Callable[[Any], Any]
"""Converts a model in place and returns a report that can be printed."""


@dataclass(frozen=True)
class RunResult:
    """What `finetune` did.

    Attributes:
        task: one of `tasks.TASKS`.
        trained: the run of the model.
        control: that of the unconverted model on the same batches, if it was asked for.
        conversion: what the conversion reported.
        data: lines about the corpus.
        total_steps: steps of each run.
    """

    task: Task
    trained: TrainResult
    control: TrainResult | None
    conversion: Any
    data: tuple[str, ...]
    total_steps: int

    def table(self) -> str:
        """The runs side by side, for people."""
        names = list(self.trained.final.metrics) if self.trained.final is not None else []
        heads = ("", "first loss", "last loss", "nll at step 0", "nll at the end", "perplexity", *names, "tokens/s")
        rows: list[tuple[str, ...]] = [heads]
        runs = [("model" if self.control is None else "converted", self.trained)]
        if self.control is not None:
            runs.append(("control", self.control))
        for name, run in runs:
            losses = [f"{run.losses[0]:.4f}", f"{run.losses[-1]:.4f}"] if run.steps else ["-", "-"]
            evals = ["-"] * (3 + len(names))
            if run.final is not None:
                last = run.final
                evals = [f"{run.evals[0].nll:.4f}", f"{last.nll:.4f}", f"{last.perplexity:.2f}"]
                evals += [f"{last.metrics[metric]:.4f}" for metric in names]
            rows.append((name, *losses, *evals, f"{run.tokens_per_second:,.0f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        report = self.conversion
        return {
            "task": self.task,
            "total_steps": self.total_steps,
            "data": list(self.data),
            "conversion": report.to_dict() if hasattr(report, "to_dict") else report and str(report),
            "trained": _summary(self.trained),
            "control": self.control and _summary(self.control),
        }


def _summary(run: TrainResult) -> dict[str, Any]:
    return {
        "losses": run.losses,
        "evals": [asdict(record) for record in run.evals],
        "best_step": run.best_step,
        "tokens": run.tokens,
        "seconds": round(run.seconds, 3),
        "tokens_per_second": round(run.tokens_per_second, 1),
    }


def finetune(
    settings: RunSettings, task: Task, *, convert_fn: ConvertFn | None = None, command: Sequence[str] = ()
) -> RunResult:
    """Fine-tune a model and save it.

    Leaves in the output folder: the model with tokenizer and generation config (a variant also with manifest, golden
    outputs and model card, which have the run's numbers), train_log.jsonl, eval_log.jsonl,
    settings.json, results.json, the newest checkpoints, and for a control the folder control with the same logs.

    Args:
        settings: all of them.
        task: one of `tasks.TASKS`: "clm" predicts the next token, "mlm" hidden ones, and so on.
        convert_fn: what --convert calls; by default `hf_geglu.convert` with --variant and --layers.
        command: words of the command line, for the manifest.

    Raises:
        ConfigurationError: settings that cannot be.
        OutputError: a folder that must not be written.
        DataError: no data, no text in it, or too little.
        TrainingError: a run that cannot be resumed, or whose loss is no longer finite.
        HfGegluError: what the conversion raises.
    """
    kind, model_settings, output = TASKS[task], settings.model, settings.output
    files = [*(settings.data.train_file or ()), *(settings.data.validation_file or ())]
    mixed = [source.rpartition("=")[0] for source in settings.data.dataset_mixture or ()]
    sources = [model_settings.model_name_or_path, settings.data.dataset_name or "", *files, *mixed]
    folder, resume_from = check_output(output, sources=[source for source in sources if source])
    accelerator = make_accelerator(settings.train)
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
    shape = BatchShape(
        settings.train.per_device_train_batch_size,
        settings.train.gradient_accumulation_steps,
        int(accelerator.num_processes),
    )
    total = step_count(settings.train, corpus.train, shape)
    _check_schedule(settings.train, total)
    curves = LiveCurves(folder.path, title=f"{Path(model_settings.model_name_or_path).name}: held-out loss")

    def open_model() -> nn.Module:
        options, seed = prepared.model_options, settings.train.seed
        model = load_model(model_settings, kind, settings.train.dtype, options=options, seed=seed)
        set_padding(model, processor)
        return model

    model = open_model()
    if kind.reads == "tokens":
        check_vocabulary(model, corpus)
        check_positions(model, block_size)
    report = None
    teacher = open_model() if settings.train.distill else None
    if model_settings.control and settings.train.trainable != "lora":  # has it what is to be trained?
        choose_trainable(model, settings.train.trainable)
    if model_settings.convert:
        report = (convert_fn or _converter(model_settings))(model)
        _tell(accelerator, str(report))
    for line in corpus.lines:
        _tell(accelerator, line)
    if corpus.side_by_side and isinstance(objective, CausalLM | MaskedLM):
        objective = _keeping_apart(objective, model, block_size, accelerator)
    run = _Run(settings, task, objective, corpus, processor, folder, total, curves, teacher)
    trained = run.train("model", model, folder.path, resume_from)
    if accelerator.is_main_process:
        record = training_record(settings, task, corpus, trained)
        folder.publish(model, processor, record, command, curves.picture)
    del model  # before the control is loaded: both would need twice the memory

    control = None
    if model_settings.control:
        unconverted = open_model()
        place = folder.path / "control"
        control = run.train("control", unconverted, place, CheckpointFolder(place).latest() if resume_from else None)
    result = RunResult(task, trained, control, report, corpus.lines, total)
    if accelerator.is_main_process:
        if control is not None:
            folder.amend(training_record(settings, task, corpus, trained, control=control), curves.picture)
        _write_json(folder.path / "results.json", result.to_dict())
    accelerator.wait_for_everyone()
    return result


@dataclass(frozen=True)
class _Run:
    """What the trainings of a run share, so that they cannot differ."""

    settings: RunSettings
    task: Task
    objective: Objective
    corpus: Corpus
    processor: Any
    folder: RunFolder
    total: int
    curves: LiveCurves
    teacher: nn.Module | None

    def train(self, name: str, model: nn.Module, place: Path, resume_from: Path | None) -> TrainResult:
        # One for each training: an accelerator holds on to the models that it prepared.
        accelerator = make_accelerator(self.settings.train)
        main = bool(accelerator.is_main_process)
        before: dict[str, Any] = read_progress(resume_from) if resume_from else {"step": 0, "evals": []}
        done = int(before["step"])
        self.curves.known(name, [EvalRecord(**record) for record in before["evals"]])
        log = RunLog(place, prepare=self._begin, resumed_at=done if resume_from else None)
        checkpoints = CheckpointFolder(place, keep=self.settings.output.save_total_limit, tokenizer=self.processor)
        narrator = Narrator(name, total=self.total, done=done, every=self.settings.train.logging_steps, quiet=not main)

        def on_step(record: StepRecord) -> None:
            narrator.step(record)
            if main:
                log.step(record)

        def on_eval(record: EvalRecord) -> None:
            narrator.evaluation(record)
            if main:
                log.evaluation(record)
                self.curves.add(name, record)

        with narrator, adapted(model, self.settings.train):
            if resume_from:
                narrator.say(f"{name}  resumed from {resume_from.name}")
            return train(
                model,
                self.corpus.train,
                self.corpus.validation,
                self.settings.train,
                objective=self.objective,
                on_step=on_step,
                on_eval=on_eval,
                checkpoints=checkpoints,
                resume_from=resume_from,
                accelerator=accelerator,
                teacher=self.teacher,
            )

    def _begin(self) -> None:
        self.folder.open()
        _write_json(self.folder.path / "settings.json", replayable(self.settings, self.task))


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


def _write_json(path: Path, content: Any) -> None:
    path.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")


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
