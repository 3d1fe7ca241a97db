"""What a run tells manifest and card: data, settings, and the ledger of what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_geglu.provenance import LedgerRow, Sample, TrainingRecord
from hf_geglu.training.data.corpus import Corpus
from hf_geglu.training.objectives.objective import Task
from hf_geglu.training.reports.records import EvalRecord, TrainResult
from hf_geglu.training.settings.run import DataSettings, RunSettings

_TOLD = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dtype", "mixed_precision", "bf16", "fp16"),
)


def training_record(
    settings: RunSettings,
    task: Task,
    corpus: Corpus,
    trained: TrainResult,
    *,
    control: TrainResult | None = None,
    samples: tuple[Sample, ...] = (),
) -> TrainingRecord:
    """The record of a finished run; once more with its control when that is there."""
    rows = []
    if control is not None and control.evals:
        rows.append(_row("original", control.evals[0]))
    if trained.evals:
        rows.append(_row("step 0" if settings.model.convert else "before this training", trained.evals[0]))
    for name, run in (("", trained), ("control, ", control)):
        if run is not None and run.final is not None:
            rows.append(_row(f"{name}step {run.final.step}", run.final))
    name, hub_id = _data_name(settings.data)
    told = {key: getattr(settings.train, key) for key in _TOLD}
    return TrainingRecord(
        task=task,
        steps=len(trained.steps),
        tokens=trained.tokens,
        seed=settings.train.seed,
        data=name,
        dataset_id=hub_id,
        revision=corpus.revision,
        data_fingerprint=tokens_sha256(corpus.train),
        settings={key: value for key, value in told.items() if value not in (None, False, 0, 0.0)},
        ledger=tuple(rows),
        held_out_tokens=trained.evals[-1].tokens if trained.evals else 0,
        control=control is not None and bool(control.evals),
        samples=samples,
        loss=trained.evals[-1].loss_name if trained.evals else "nll",
    )


def tokens_sha256(blocks: Any) -> str | None:
    """SHA-256 of the training data in order (see `TokenBlocks.sha256`); None for a stream, or where none is at hand."""
    return blocks.sha256() if hasattr(blocks, "sha256") else None


def _row(name: str, record: EvalRecord) -> LedgerRow:
    return LedgerRow(name=name, nll=record.nll, perplexity=record.perplexity)


def _data_name(data: DataSettings) -> tuple[str, str | None]:
    """(name for people, Hub id): files by their last component."""
    if data.dataset_name is None:
        return ", ".join(Path(name).name for name in data.train_file or ()), None
    on_hub = not Path(data.dataset_name).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.dataset_name)
    name = data.dataset_name if on_hub else Path(data.dataset_name).resolve().name
    return name + (f" ({data.dataset_config_name})" * bool(data.dataset_config_name)), name if on_hub else None
