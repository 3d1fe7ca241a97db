"""What a checkpoint holds: the live objects of a run, written into a folder and brought back from it.

    config.json, model.safetensors, tokenizer...   the model, as save_pretrained writes it: from_pretrained reads it
    optimizer.safetensors                          AdamW's state by parameter name
    best.safetensors, average.safetensors          weights that a run keeps beside its own
    rng-P.safetensors                              random generators of process P
    progress.json                                  step, position in the data, schedule, settings, history

All of it is plain data; nothing is pickled. When and where it is written is `checkpoint`'s.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hf_geglu.conversions.precision import all_finite
from hf_geglu.errors import ConfigurationError, TrainingError
from hf_geglu.training.checkpoints.generators import load_generators
from hf_geglu.training.checkpoints.progress import FILE, FORMAT, Progress, read_progress
from hf_geglu.training.checkpoints.weights import load_weights, write_weights
from hf_geglu.training.data.batches import BatchShape, Blocks, MapBlocks
from hf_geglu.training.objectives.objective import Example, Objective
from hf_geglu.training.processes.sharding import is_shared, share
from hf_geglu.training.processes.tensor_file import FilesTogether, Held, Source, stored_tensors
from hf_geglu.training.reports.records import EvalRecord, StepRecord
from hf_geglu.training.settings.run import TrainSettings
from hf_geglu.training.updates.optimizer import load_scheduler_state, scheduler_state

logger = logging.getLogger(__name__)

MAY_CHANGE = frozenset(
    {
        # How long, how often, where and how fast, but not what is computed from a draw.
        *("max_steps", "num_train_epochs", "eval_steps", "save_steps", "logging_steps", "use_cpu"),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("early_stopping_patience", "early_stopping_threshold", "load_best_model_at_end"),
        *("mixed_precision", "bf16", "fp16", "gradient_checkpointing", "chunked_cross_entropy"),
        "ddp_find_unused_parameters",
    }
)
"""Settings that a resumed run may have different from the run before."""


def fingerprint(blocks: Blocks, objective: Objective) -> dict[str, Any]:
    """What tells the data of two runs apart cheaply: the objective; number and ends of blocks that do not stream."""
    told: Any = objective
    found: dict[str, Any] = {"objective": type(objective).__name__}
    if is_dataclass(told):
        settings = {f.name: getattr(told, f.name) for f in fields(told)}
        found |= {name: sorted(value) if isinstance(value, frozenset) else value for name, value in settings.items()}
    if isinstance(blocks, MapBlocks):
        first, last = (_checksum(blocks[i]) for i in (0, len(blocks) - 1))
        found |= {"blocks": len(blocks), "first block": first, "last block": last}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))  # as it will be read back
    return plain


class Companion(Protocol):
    """What keeps weights of its own during a run."""

    def tensors(self) -> Mapping[str, Held]:
        """All of them, by parameter; empty for none."""

    def load(self, tensors: Mapping[str, Source], /) -> None:
        """Go on from what `tensors` gave."""


def _checksum(example: Example) -> int:
    """Of the tensors and numbers of an example, whatever they are called."""
    parts = example if isinstance(example, Mapping) else {"input_ids": example}
    total = 0
    for name in sorted(parts):
        value = parts[name]
        data = value.tobytes() if hasattr(value, "tobytes") else torch.as_tensor(value).numpy().tobytes()
        total = zlib.crc32(data, total)
    return total


@dataclass(frozen=True)
class TrainingState:
    """The live objects that a checkpoint is a picture of. The model may be sharded between processes."""

    model: nn.Module
    moments: Companion
    scheduler: LambdaLR
    scaler: Any
    settings: TrainSettings
    data: dict[str, Any]
    shape: BatchShape
    companions: Mapping[str, Companion] = field(default_factory=dict)
    """By the name of their file."""

    @property
    def spread(self) -> bool:
        """Whether no process has all of it."""
        return any(map(is_shared, [*self.model.parameters(), *self.moments.tensors().values()]))

    def write(self, folder: Path, progress: Progress, tokenizer: Any, *, main: bool = True) -> None:
        """Everything but the random generators, into an existing folder.

        Every process calls it. The main one writes; where the model is sharded the others hand over their shares, one
        tensor at a time.

        Raises:
            TrainingError: weights that are not finite; a checkpoint of them would be worth nothing.
        """
        if not main and not self.spread:
            return
        self._check_finite(progress.step)
        files = FilesTogether(folder, main=main)
        write_weights(self.model, files)
        files.tensors("optimizer", self.moments.tensors())
        for name, companion in self.companions.items():
            if tensors := companion.tensors():
                files.tensors(name, tensors)
        files.finish()
        if not main:
            return
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        state = {
            "format": FORMAT,
            "step": progress.step,
            "draws": progress.draws,
            "processes": self.shape.processes,
            "blocks_per_step": self.shape.per_step,
            "data": self.data,
            "scheduler": scheduler_state(self.scheduler),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "settings": asdict(self.settings),
            "steps": [asdict(record) for record in progress.steps],
            "evals": [asdict(record) for record in progress.evals],
        }
        (folder / FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def _check_finite(self, step: int) -> None:
        parameters = dict(self.model.named_parameters())
        device = next(iter(parameters.values())).device
        flags = torch.tensor([not all_finite(share(p).detach()) for p in parameters.values()], device=device).int()
        if self.spread:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        broken = [name for name, flag in zip(parameters, flags.tolist(), strict=True) if flag]
        if broken:
            raise TrainingError(
                f"{len(broken)} parameters hold NaN or infinity after step {step}, {broken[0]} first: "
                "expected finite weights; no checkpoint of them was written. Lower --learning_rate and resume from "
                "the checkpoint before."
            )

    def restore(self, folder: Path, process: int) -> Progress:
        """Bring the live objects to the state in `folder`; returns how far that run was.

        Raises:
            TrainingError: no complete checkpoint, or that of another run.
            ConfigurationError: settings that have changed though the result depends on them.
        """
        saved = read_progress(folder)
        if saved["data"] != self.data:
            names = sorted(saved["data"].keys() | self.data.keys())
            pairs = [(name, saved["data"].get(name), self.data.get(name)) for name in names]
            raise TrainingError(
                f"other data than {folder.name} was made with: "
                + "; ".join(f"{name}: {old} -> {new}" for name, old, new in pairs if old != new)
                + ". Expected the same, for the same batches. Give dataset, tokenizer, --block_size and split as then."
            )
        changed = [
            f"{name}: {saved['settings'][name]} -> {value}"
            for name, value in asdict(self.settings).items()
            if name in saved["settings"] and saved["settings"][name] != value
        ]
        refused = [change for change in changed if change.split(":")[0] not in MAY_CHANGE]
        if refused:
            raise ConfigurationError(
                f"{'; '.join(refused)} since {folder.name}: expected the same values in a resumed run. Give the old "
                "ones, or start a new run with the checkpoint as --model_name_or_path."
            )
        self._check_processes(saved, folder)
        if changed:
            logger.info("resuming with other settings: %s", "; ".join(changed))
        load_weights(self.model, folder)
        with stored_tensors(folder / "optimizer.safetensors") as tensors:
            self.moments.load(tensors)
        for name, companion in self.companions.items():
            if _file_of(folder, name).exists():
                with stored_tensors(_file_of(folder, name)) as tensors:
                    companion.load(tensors)
        load_scheduler_state(self.scheduler, saved["scheduler"])
        if self.scaler is not None and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        generators = folder / f"rng-{process}.safetensors"
        if generators.exists():
            load_generators(generators)
        else:
            logger.info("%s holds no random state of process %d: its dropout starts anew", folder.name, process)
        return Progress(
            step=int(saved["step"]),
            draws=int(saved["draws"]),
            steps=[StepRecord(**record) for record in saved["steps"]],
            evals=[EvalRecord(**record) for record in saved["evals"]],
        )

    def _check_processes(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Another number of processes must go through the same blocks in each step.

        Raises:
            ConfigurationError: it would not.
        """
        before, now = saved.get("processes", self.shape.processes), self.shape.processes
        if before == now:
            return
        per_step, shape = int(saved["blocks_per_step"]), self.shape
        if per_step != shape.per_step:
            raise ConfigurationError(
                f"{folder.name} was written by {_processes(before)} with {per_step} blocks a step; now it is "
                f"{_processes(now)} x {shape.per_forward} blocks x {shape.forwards} forwards = {shape.per_step}: "
                f"expected as many, for the same batches. {_remedy(per_step, shape)}"
            )
        logger.info(
            "%s was written by %s, %s go on: the same batches; dropout draws other numbers",
            *(folder.name, _processes(before), now),
        )


def _processes(count: int) -> str:
    return f"{count} process" if count == 1 else f"{count} processes"


def _remedy(per_step: int, shape: BatchShape) -> str:
    """How these processes could take so many blocks a step."""
    own, rest = divmod(per_step, shape.processes)
    if rest:
        return f"Use a number of processes that divides {per_step}."
    forward = shape.per_forward if own % shape.per_forward == 0 else own
    return f"Give --per_device_train_batch_size {forward} --gradient_accumulation_steps {own // forward}."


def _file_of(folder: Path, companion: str) -> Path:
    return folder / f"{companion}.safetensors"
