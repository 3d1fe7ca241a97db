"""From settings to a saved model: `finetune(settings, task)`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_geglu.provenance import Sample
from hf_geglu.training.checkpoints.checkpoint import CheckpointFolder
from hf_geglu.training.checkpoints.progress import read_progress
from hf_geglu.training.checkpoints.room import room_for
from hf_geglu.training.config_file import replayable
from hf_geglu.training.loop import train
from hf_geglu.training.objectives.objective import Task
from hf_geglu.training.outset import ConvertFn, Outset, set_out
from hf_geglu.training.parameters.adapters import adapted
from hf_geglu.training.processes.accelerator import make_accelerator
from hf_geglu.training.pushing import push_finished
from hf_geglu.training.reports.curves import LiveCurves
from hf_geglu.training.reports.generations import samples_of
from hf_geglu.training.reports.lineage import training_record
from hf_geglu.training.reports.log import BEFORE, Narrator, RunLog, to_json
from hf_geglu.training.reports.records import EvalRecord, SampleRecord, StepRecord, TrainResult, numbers
from hf_geglu.training.settings.run import RunSettings


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
        samples: what the models wrote to prompts, if that was asked for.
        pushed: address of the commit on the Hub, if it was pushed.
    """

    task: Task
    trained: TrainResult
    control: TrainResult | None
    conversion: Any
    data: tuple[str, ...]
    total_steps: int
    samples: tuple[Sample, ...] = ()
    pushed: str | None = None

    def table(self) -> str:
        """The runs side by side, for people."""
        final = self.trained.final
        names = [] if final is None else [name for name in final.metrics if name != final.loss_name]
        loss = "nll" if final is None else final.loss_name
        of_text = final is None or final.perplexity is not None
        told = [f"{loss} at step 0", f"{loss} at the end", *["perplexity"] * of_text, *names]
        heads = ("", "first loss", "last loss", *told, "tokens/s")
        rows: list[tuple[str, ...]] = [heads]
        runs = [("model" if self.control is None else "converted", self.trained)]
        if self.control is not None:
            runs.append(("control", self.control))
        for name, run in runs:
            losses = [f"{run.losses[0]:.4f}", f"{run.losses[-1]:.4f}"] if run.steps else ["-", "-"]
            evals = ["-"] * len(told)
            if run.final is not None:
                last = run.final
                evals = [f"{run.evals[0].nll:.4f}", f"{last.nll:.4f}"]
                evals += [] if last.perplexity is None else [f"{last.perplexity:.2f}"]
                evals += [f"{last.metrics[metric]:.4f}" for metric in names]
            rows.append((name, *losses, *evals, f"{run.tokens_per_second:,.0f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )

    def told_samples(self) -> str:
        """Prompts and what was written to them, for people."""
        return "\n\n".join(
            "\n".join(f"{head + ':':9} {' '.join(text.split())}" for head, text in sample.texts().items())
            for sample in self.samples
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
            "samples": [asdict(sample) for sample in self.samples],
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
    outputs and model card, which have the run's numbers), train_log.jsonl, eval_log.jsonl, sample_log.jsonl (where
    completions were asked for), settings.json, results.json, the newest checkpoints, and for a control the folder
    control with the same logs.

    Args:
        settings: all of them.
        task: one of `tasks.TASKS`: "clm" predicts the next token, "mlm" hidden ones, and so on.
        convert_fn: what --convert calls; by default `hf_geglu.convert` with --variant and --layers.
        command: words of the command line, for the manifest.

    Raises:
        ConfigurationError: settings that cannot be.
        OutputError: a folder that must not be written, or no room on the disk; checkpoints stay as they were.
        PushError: --push_to_hub without a login that may write there, or after the training a card without a licence.
        DataError: no data, no text in it, or too little.
        TrainingError: a run that cannot be resumed, or whose loss is no longer finite.
        HfGegluError: what the conversion raises.
    """
    outset, model = set_out(settings, task, convert_fn=convert_fn)
    run, folder, corpus = _Run(outset), outset.folder, outset.corpus
    accelerator = outset.accelerator
    then = "The checkpoints that are there are whole. Make room, and give the same command with --resume."
    with room_for("the log of the run", folder.path, then=then):
        trained, before, after = run.train("model", model, folder.path, outset.resume_from)
        samples = samples_of(outset.sampler, before, after)
        if accelerator.is_main_process:
            record = training_record(settings, task, corpus, trained, samples=samples)
            folder.publish(model, outset.processor, record, command, run.curves.picture)
        del model  # before the control is loaded: both would need twice the memory

        control = None
        if settings.model.control:
            place = folder.path / "control"
            resume_from = CheckpointFolder(place).latest() if outset.resume_from else None
            control, _, controls = run.train("control", outset.unconverted(), place, resume_from)
            samples = samples_of(outset.sampler, before, after, controls)
        result = RunResult(task, trained, control, outset.report, corpus.lines, outset.total_steps, samples)
        if accelerator.is_main_process:
            if control is not None:
                record = training_record(settings, task, corpus, trained, control=control, samples=samples)
                folder.amend(record, run.curves.picture)
            _write_json(folder.path / "results.json", result.to_dict())
    if outset.repo is not None and accelerator.is_main_process:
        result = replace(result, pushed=push_finished(folder.path, outset.repo))
    accelerator.wait_for_everyone()
    return result


_Trained = tuple[TrainResult, tuple[str, ...], tuple[str, ...]]
"""And what the model wrote before and after; nothing in other processes than the main one."""


class _Run:
    """What the trainings of a run share, so that they cannot differ."""

    def __init__(self, outset: Outset) -> None:
        self._outset = outset
        name = Path(outset.settings.model.model_name_or_path).name
        self.curves = LiveCurves(outset.folder.path, title=f"{name}: held-out loss")

    def train(self, name: str, model: nn.Module, place: Path, resume_from: Path | None) -> _Trained:
        outset, settings = self._outset, self._outset.settings
        # One for each training: an accelerator holds on to the models that it prepared.
        trackers = settings.output.report_to or ()
        accelerator = make_accelerator(settings.train, trackers=trackers, folder=place)
        main = bool(accelerator.is_main_process)
        before: dict[str, Any] = read_progress(resume_from) if resume_from else {"step": 0, "evals": []}
        done = int(before["step"])
        self.curves.known(name, [EvalRecord(**record) for record in before["evals"]])
        again = None if outset.resume_from is None else done if resume_from else BEFORE
        log = RunLog(place, prepare=lambda: self._begin(accelerator), resumed_at=again)
        checkpoints = CheckpointFolder(place, keep=settings.output.save_total_limit, tokenizer=outset.processor)
        narrator = Narrator(
            name, total=outset.total_steps, done=done, every=settings.train.logging_steps, quiet=not main
        )

        def write() -> tuple[str, ...]:
            return outset.sampler.complete(model, accelerator.device) if outset.sampler and main else ()

        def tell(step: int, completions: tuple[str, ...]) -> None:
            prompts = outset.sampler.prompts if outset.sampler else ()
            rows = [SampleRecord(step, *pair) for pair in zip((p.text for p in prompts), completions, strict=False)]
            log.samples(rows)
            narrator.samples(rows)

        before_it = write()  # a resumed run too: the checkpoint is not in the model yet
        untold = [before_it]  # until there is something to write: a run that is refused leaves nothing behind

        def on_step(record: StepRecord) -> None:
            narrator.step(record)
            if main:
                while untold:
                    tell(0, untold.pop())
                log.step(record)
            accelerator.log({f"train/{key}": value for key, value in numbers(record).items()}, step=record.step)

        def on_eval(record: EvalRecord) -> None:
            narrator.evaluation(record)
            if main:
                while untold:
                    tell(0, untold.pop())
                log.evaluation(record)
                self.curves.add(name, record)
            accelerator.log({f"eval/{key}": value for key, value in numbers(record).items()}, step=record.step)

        with narrator, adapted(model, settings.train):
            if resume_from:
                narrator.say(f"{name}  resumed from {resume_from.name}")
            trained = train(
                model,
                outset.corpus.train,
                outset.corpus.validation,
                settings.train,
                objective=outset.objective,
                on_step=on_step,
                on_eval=on_eval,
                checkpoints=checkpoints,
                resume_from=resume_from,
                accelerator=accelerator,
                teacher=outset.teacher,
            )
        after_it = write()
        tell(trained.left_at, after_it)
        if trackers:
            accelerator.end_training()
        return trained, before_it, after_it

    def _begin(self, accelerator: Any) -> None:
        """When there is something to write."""
        outset = self._outset
        outset.folder.open()
        resolved = replayable(outset.settings, outset.task)
        _write_json(outset.folder.path / "settings.json", resolved)
        told = json.loads(to_json(resolved))  # trackers take plain values only
        config = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in told.items()}
        accelerator.init_trackers("hf_geglu", config=config)


def _write_json(path: Path, content: Any) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)
