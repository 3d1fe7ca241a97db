"""Checkpoints: all that a run needs to go on as if it had not stopped, written whole or not at all, and without a
pickle.

    checkpoint-N/
      config.json, model.safetensors, tokenizer...   the model, as save_pretrained writes it: from_pretrained reads it
      optimizer.safetensors                          AdamW's state by parameter name
      best.safetensors, average.safetensors          weights that a run keeps beside its own
      rng-P.safetensors                              random generators of process P
      progress.json                                  step, position in the data, schedule, settings, history

A checkpoint is written beside its place, synced and renamed: a folder called checkpoint-N is complete.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from hf_geglu.errors import ConfigurationError, TrainingError
from hf_geglu.training.batches import Blocks, MapBlocks
from hf_geglu.training.objectives import Example, Objective
from hf_geglu.training.optimizer import load_optimizer_tensors, load_scheduler_state, optimizer_tensors, scheduler_state
from hf_geglu.training.records import EvalRecord, StepRecord
from hf_geglu.training.settings import TrainSettings

logger = logging.getLogger(__name__)

FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")

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


@dataclass
class Progress:
    """How far a run is. The one mutable thing of a run besides the model and its optimizer."""

    step: int
    draws: int
    steps: list[StepRecord] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)

    @classmethod
    def start(cls) -> Progress:
        """The beginning of a run."""
        return cls(step=0, draws=0)

    def advance(self, record: StepRecord, *, draws: int) -> None:
        """Count a step that took so many blocks."""
        self.step = record.step
        self.draws += draws
        self.steps.append(record)


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

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by parameter; empty for none."""

    def load(self, tensors: Mapping[str, Tensor], /) -> None:
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
    """The live objects that a checkpoint is a picture of."""

    model: nn.Module
    optimizer: AdamW
    scheduler: LambdaLR
    scaler: Any
    settings: TrainSettings
    data: dict[str, Any]
    companions: Mapping[str, Companion] = field(default_factory=dict)
    """By the name of their file."""

    def write(self, folder: Path, progress: Progress, tokenizer: Any) -> None:
        """Everything but the random generators, into an existing folder.

        Raises:
            TrainingError: weights that are not finite; a checkpoint of them would be worth nothing.
        """
        broken = [name for name, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())]
        if broken:
            raise TrainingError(
                f"{len(broken)} parameters hold NaN or infinity after step {progress.step}, {broken[0]} first: "
                "expected finite weights; no checkpoint of them was written. Lower --learning_rate and resume from "
                "the checkpoint before."
            )
        _save_weights(self.model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        save_file(optimizer_tensors(self.model, self.optimizer), folder / "optimizer.safetensors")
        for name, companion in self.companions.items():
            if tensors := companion.tensors():
                save_file({key: value.contiguous() for key, value in tensors.items()}, _file_of(folder, name))
        state = {
            "format": FORMAT,
            "step": progress.step,
            "draws": progress.draws,
            "data": self.data,
            "scheduler": scheduler_state(self.scheduler),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "settings": asdict(self.settings),
            "steps": [asdict(record) for record in progress.steps],
            "evals": [asdict(record) for record in progress.evals],
        }
        (folder / "progress.json").write_text(json.dumps(state, indent=1), encoding="utf-8")

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
        if changed:
            logger.info("resuming with other settings: %s", "; ".join(changed))
        _load_weights(self.model, folder)
        load_optimizer_tensors(self.model, self.optimizer, load_file(folder / "optimizer.safetensors"))
        for name, companion in self.companions.items():
            if _file_of(folder, name).exists():
                companion.load(load_file(_file_of(folder, name)))
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


def _file_of(folder: Path, companion: str) -> Path:
    return folder / f"{companion}.safetensors"


@dataclass(frozen=True)
class CheckpointFolder:
    """Where the checkpoints of one run are.

    Attributes:
        folder: the folder that holds the folders checkpoint-N.
        keep: how many to keep, newest first; 0 keeps all.
        tokenizer: saved with each, if given.
    """

    folder: Path
    keep: int = 2
    tokenizer: Any = None

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [(int(m[1]), path) for path in self.folder.glob("checkpoint-*") if (m := NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found) if (path / "progress.json").exists()]

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = self.all()
        return found[-1] if found else None

    def save(self, state: TrainingState, progress: Progress, accelerator: Any) -> None:
        """Write checkpoint-N, then remove what is older than the `keep` newest. Called by every process."""
        main = bool(accelerator.is_main_process)
        target = self.folder / f"checkpoint-{progress.step}"
        draft = self.folder / f".{target.name}.draft"
        if main:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            state.write(draft, progress, self.tokenizer)
        accelerator.wait_for_everyone()
        save_generators(draft / f"rng-{accelerator.process_index}.safetensors")
        accelerator.wait_for_everyone()
        if main:
            move_into_place(draft, target)
            for old in self.all()[: -self.keep] if self.keep else []:
                if old != target:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()


def read_progress(folder: Path) -> dict[str, Any]:
    """`progress.json` of a checkpoint.

    Raises:
        TrainingError: no complete checkpoint, or one that this version cannot read.
    """
    path = folder / "progress.json"
    if not path.exists():
        raise TrainingError(
            f"{folder.name} holds no progress.json: expected a checkpoint folder written by this package. Name one "
            "called checkpoint-N, or give --resume alone for the newest."
        )
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TrainingError(
            f"{folder.name}/progress.json is damaged ({error}). Resume from another checkpoint."
        ) from error
    if read.get("format") != FORMAT:
        raise TrainingError(
            f"{folder.name} has format {read.get('format')}: expected {FORMAT}. Resume it with the version that wrote "
            "it."
        )
    return dict(read)


def move_into_place(draft: Path, target: Path) -> None:
    """Sync a finished folder to disk and give it its name; an older folder of that name goes away only afterwards."""
    for path in [*draft.rglob("*"), draft]:
        _sync(path)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    draft.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_weights(model: nn.Module, folder: Path) -> None:
    saver: Any = model
    if hasattr(saver, "save_pretrained"):
        saver.save_pretrained(folder)
        return
    seen: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if seen.setdefault(tensor.data_ptr(), name) == name or tensor.numel() == 0:  # tied weights are saved once
            tensors[name] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a checkpoint into the live model.

    Most architectures are saved under the names they have in memory. Some are renamed or split when they are saved
    (experts in Transformers 5): those are read by `from_pretrained`, which knows how.

    Raises:
        TrainingError: the checkpoint is not one of this model.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
    own = model.state_dict()
    shared = tensors.keys() & own.keys()
    at = {own[name].data_ptr() for name in shared}
    absent = [name for name in own if name not in tensors and own[name].data_ptr() not in at]
    if absent or len(shared) < len(tensors):
        tensors = _load_renamed_weights(model, folder)
    different = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    if different:
        raise _other_model(folder, f"{min(different)} has another shape")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _load_renamed_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    kind: Any = type(model)
    config: Any = getattr(model, "config", None)
    described = folder / "config.json"
    saved_type = json.loads(described.read_text(encoding="utf-8")).get("model_type") if described.exists() else None
    # of the class: an instance that was read from a file keeps what stood there, also when it was converted since
    if saved_type is None or saved_type != getattr(type(config), "model_type", None):
        raise _other_model(folder, "the names of the weights differ")
    try:
        loaded, info = kind.from_pretrained(folder, dtype=next(model.parameters()).dtype, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise _other_model(folder, str(error).split("\n")[0]) from error
    # from_pretrained makes up what it does not find, and only logs it.
    made_up = [*info["missing_keys"], *info["mismatched_keys"]]
    if made_up or loaded.state_dict().keys() != model.state_dict().keys():
        raise _other_model(folder, f"{len(made_up)} weights are missing or have another shape")
    tensors: dict[str, Tensor] = loaded.state_dict()
    return tensors


def _other_model(folder: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"{folder.name} does not fit the model: {reason}. Expected a checkpoint of this very model. Give the model, "
        "--convert, --variant and --layers that the checkpoint was made with."
    )


def save_generators(path: Path) -> None:
    """The states of the random generators of torch, numpy and Python of this process."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    words: dict[str, str] = {"python": json.dumps(random.getstate())}
    try:
        import numpy
    except ImportError:
        pass
    else:
        words["numpy"] = json.dumps(numpy.random.get_state(), default=lambda array: array.tolist())
    save_file(tensors, path, metadata=words)


def load_generators(path: Path) -> None:
    """Put back what `save_generators` wrote, as far as this machine has such generators."""
    with safe_open(path, framework="pt") as file:
        words = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, state, gauss = json.loads(words["python"])
    random.setstate((version, tuple(state), gauss))
    if "numpy" in words:
        import numpy

        numpy.random.set_state(tuple(json.loads(words["numpy"])))
