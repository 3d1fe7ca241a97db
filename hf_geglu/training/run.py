"""From settings to a saved model: `finetune(settings, task)`.

Everything that can be refused is refused before the output folder is touched: output, settings, tokenizer, data,
model, conversion are gone through in that order, and the folder is opened when the first record of the training
comes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_geglu.errors import ConfigurationError, DataError, HfGegluError
from hf_geglu.hub import load
from hf_geglu.training.accelerator import make_accelerator
from hf_geglu.training.adapters import adapted
from hf_geglu.training.batches import BatchShape, step_count
from hf_geglu.training.checkpoint import CheckpointFolder, read_progress
from hf_geglu.training.corpus import Corpus, load_corpus
from hf_geglu.training.curves import LiveCurves
from hf_geglu.training.lineage import training_record
from hf_geglu.training.log import Narrator, RunLog, to_json
from hf_geglu.training.loop import train
from hf_geglu.training.objectives import Objective, Task, objective_for
from hf_geglu.training.optimizer import make_optimizer, make_scheduler
from hf_geglu.training.output import RunFolder, check_output
from hf_geglu.training.packing import TokenBlocks
from hf_geglu.training.records import EvalRecord, StepRecord, TrainResult
from hf_geglu.training.settings import ModelSettings, RunSettings, TrainSettings
from hf_geglu.training.trainable import choose_trainable

DEFAULT_BLOCK_SIZE = 1024
ConvertFn = Callable[[Any], Any]
"""Converts a model in place and returns a report that can be printed."""


@dataclass(frozen=True)
class RunResult:
    """What `finetune` did.

    Attributes:
        task: "clm" or "mlm".
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
        rows: list[tuple[str, ...]] = [
            ("", "first loss", "last loss", "nll at step 0", "nll at the end", "perplexity", "tokens/s")
        ]
        runs = [("model" if self.control is None else "converted", self.trained)]
        if self.control is not None:
            runs.append(("control", self.control))
        for name, run in runs:
            losses = [f"{run.losses[0]:.4f}", f"{run.losses[-1]:.4f}"] if run.steps else ["-", "-"]
            evals = ["-"] * 3
            if run.final is not None:
                evals = [f"{run.evals[0].nll:.4f}", f"{run.final.nll:.4f}", f"{run.final.perplexity:.2f}"]
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
    """Fine-tune a causal or masked language model and save it.

    Leaves in the output folder: the model with tokenizer and generation config (a variant also with manifest, golden
    outputs and model card, which have the run's numbers), train_log.jsonl, eval_log.jsonl,
    settings.json, results.json, the newest checkpoints, and for a control the folder control with the same logs.

    Args:
        settings: all of them.
        task: "clm" predicts the next token, "mlm" hidden ones.
        convert_fn: what --convert calls; by default `hf_geglu.convert` with --variant and --layers.
        command: words of the command line, for the manifest.

    Raises:
        ConfigurationError: settings that cannot be.
        OutputError: a folder that must not be written.
        DataError: no data, no text in it, or too little.
        TrainingError: a run that cannot be resumed, or whose loss is no longer finite.
        HfGegluError: what the conversion raises.
    """
    model_settings, output = settings.model, settings.output
    files = [*(settings.data.train_file or ()), *(settings.data.validation_file or ())]
    sources = [model_settings.model_name_or_path, settings.data.dataset_name or "", *files]
    folder, resume_from = check_output(output, sources=[source for source in sources if source])
    accelerator = make_accelerator(settings.train)
    if settings.train.max_steps >= 1:
        _check_schedule(settings.train, settings.train.max_steps)
    config, tokenizer = _load_config(model_settings), _load_tokenizer(model_settings)
    objective = objective_for(task, tokenizer, mlm_probability=settings.data.mlm_probability)
    block_size = choose_block_size(settings.data.block_size, config, tokenizer)
    corpus = load_corpus(settings.data, tokenizer, task=task, block_size=block_size, seed=settings.train.seed)
    shape = BatchShape(
        settings.train.per_device_train_batch_size,
        settings.train.gradient_accumulation_steps,
        int(accelerator.num_processes),
    )
    total = step_count(settings.train, corpus.train, shape)
    _check_schedule(settings.train, total)
    curves = LiveCurves(folder.path, title=f"{Path(model_settings.model_name_or_path).name}: held-out loss")
    model = _load_model(model_settings, task, settings.train.dtype)
    _check_vocabulary(model, corpus)
    report = None
    teacher = _load_model(model_settings, task, settings.train.dtype) if settings.train.distill else None
    if model_settings.control and settings.train.trainable != "lora":  # has it what is to be trained?
        choose_trainable(model, settings.train.trainable)
    if model_settings.convert:
        report = (convert_fn or _converter(model_settings))(model)
        _tell(accelerator, str(report))
    for line in corpus.lines:
        _tell(accelerator, line)
    run = _Run(settings, objective, corpus, tokenizer, folder, total, curves, teacher)
    trained = run.train("model", model, folder.path, resume_from)
    if accelerator.is_main_process:
        record = training_record(settings, task, corpus, trained)
        folder.publish(model, tokenizer, record, command, curves.picture)
    del model  # before the control is loaded: both would need twice the memory

    control = None
    if model_settings.control:
        unconverted = _load_model(model_settings, task, settings.train.dtype)
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
    objective: Objective
    corpus: Corpus
    tokenizer: Any
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
        checkpoints = CheckpointFolder(place, keep=self.settings.output.save_total_limit, tokenizer=self.tokenizer)
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
        _write_json(self.folder.path / "settings.json", asdict(self.settings))


def choose_block_size(wanted: int | None, config: Any, tokenizer: Any) -> int:
    """Length of a block: what was wanted, or `DEFAULT_BLOCK_SIZE` as far as model and tokenizer go, in tokens.

    Raises:
        ConfigurationError: more than the model has positions for.
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text_config, "max_position_embeddings", None) or 0  # some models write -1 for no limit
    if wanted is None:
        sizes = [DEFAULT_BLOCK_SIZE, limit, int(tokenizer.model_max_length)]
        return min(size for size in sizes if size > 0)
    if 0 < limit < wanted:
        raise ConfigurationError(
            f"--block_size {wanted}: expected at most {limit}, the positions that the model has. Lower it."
        )
    return wanted


def _write_json(path: Path, content: Any) -> None:
    path.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")


def _tell(accelerator: Any, line: str) -> None:
    if accelerator.is_main_process:
        print(line, file=sys.stderr)


def _check_schedule(settings: TrainSettings, total_steps: int) -> None:
    """Make optimizer and schedule once for nothing, to hear their complaints before the data is read."""
    make_scheduler(make_optimizer(nn.Linear(1, 1), settings), settings, total_steps=total_steps)


def _check_vocabulary(model: nn.Module, corpus: Corpus) -> None:
    embeddings: Any = model
    rows = int(embeddings.get_input_embeddings().weight.shape[0])
    for blocks in (corpus.train, corpus.validation):
        if isinstance(blocks, TokenBlocks) and len(blocks.tokens) and int(blocks.tokens.max()) >= rows:
            raise DataError(
                f"the tokenizer gives token {int(blocks.tokens.max())}, the model has embeddings for {rows}: expected "
                "a tokenizer that belongs to the model. Give --tokenizer_name, or resize the embeddings first."
            )


def _converter(settings: ModelSettings) -> ConvertFn:
    def convert(model: Any) -> Any:
        import hf_geglu

        report = hf_geglu.convert(model, variant=settings.variant, layers=settings.layers)
        hf_geglu.forget_original(model)  # the originals are kept for `revert`; training would carry them along
        return report

    return convert


def _source(settings: ModelSettings) -> dict[str, Any]:
    return {"revision": settings.model_revision or "main", "trust_remote_code": settings.trust_remote_code}


def _load_config(settings: ModelSettings) -> Any:
    from transformers import AutoConfig

    import hf_geglu  # noqa: F401 - makes the Auto classes know the variants

    with _readable(settings.model_name_or_path):
        return AutoConfig.from_pretrained(settings.model_name_or_path, **_source(settings))


def _load_tokenizer(settings: ModelSettings) -> Any:
    from transformers import AutoTokenizer

    name = settings.tokenizer_name or settings.model_name_or_path
    source = {"trust_remote_code": settings.trust_remote_code} if settings.tokenizer_name else _source(settings)
    with _readable(name, "a tokenizer; name another with --tokenizer_name"):
        return AutoTokenizer.from_pretrained(name, **source)


def _load_model(settings: ModelSettings, task: Task, dtype: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    kind = AutoModelForCausalLM if task == "clm" else AutoModelForMaskedLM
    more = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
    with _readable(settings.model_name_or_path, "a causal model" if task == "clm" else "a masked language model"):
        model: nn.Module = load(
            kind,
            settings.model_name_or_path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            **_source(settings),
            **more,
        )
    return model


@contextmanager
def _readable(name: str, expected: str = "a model") -> Iterator[None]:
    """Turn what Transformers raises about a model that it cannot find or take into one of our errors."""
    try:
        yield
    except HfGegluError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigurationError(
            f"{name if not Path(name).is_absolute() else Path(name).name} cannot be loaded: {reason} Expected "
            f"{expected} on the Hub or in a local folder. Check --model_name_or_path."
        ) from error
