"""What `test_training_sharded.py` trains, in one process or in two: ``torch.distributed.run ... JOBS OUTPUT``.

A job says which model, how its 8 blocks a step are cut, and how the processes share the model ("copies" or "shares").
All jobs go in one launch; the final weights of each lie beside OUTPUT.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_models import tiny
from tiny_training import VOCABULARY, bert, gpt2, llama, random_blocks

import hf_geglu
from hf_geglu.optimizing import running
from hf_geglu.training import CausalLM, CheckpointFolder, MaskedLM, TrainSettings, train
from hf_geglu.training.objectives import head
from hf_geglu.training.parameters.adapters import adapted
from hf_geglu.training.processes.accelerator import make_accelerator

MLM = MaskedLM(mask_token_id=4, vocab_size=96, special_ids=frozenset(range(6)), probability=0.3, pad_token_id=5)
MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "opt": lambda: tiny("opt", vocab_size=VOCABULARY, dropout=0.0),  # processes draw other numbers than one would
}
WAYS = {
    "copies": {},
    "shares": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    },
    "zero": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}
"""What `accelerate launch` says for each way."""


@dataclass(frozen=True)
class Job:
    """One training. As it stands, two processes take 8 blocks a step.

    Attributes:
        name: of its results.
        model: one of MODELS or of `tiny_models`.
        forward: blocks of a forward of a process.
        forwards: of a process in a step.
        way: of several processes: "copies" of the model (DDP), "shares" of it (FSDP2), or "zero" (DeepSpeed).
        convert: make it a variant first.
        double: train it in float64.
        how: more settings.
        save: folder for checkpoints.
        resume: a checkpoint to go on from.
    """

    name: str
    model: str = "llama"
    forward: int = 2
    forwards: int = 2
    way: str = "shares"
    convert: bool = True
    double: bool = False
    how: dict[str, Any] = field(default_factory=dict)
    save: str | None = None
    resume: str | None = None


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often the loss was computed in the head, and a gated block by a kernel, while this lasts."""
    counts = {"head": 0, "block": 0}

    def counting(name: str, function: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "linear_cross_entropy", counting("head", head.linear_cross_entropy))
        patch.setattr(running, "run_block", counting("block", running.run_block))
        yield counts


def made(name: str) -> Any:
    """A model with the vocabulary of `random_blocks`, the same one each time."""
    return MODELS[name]() if name in MODELS else tiny(name, vocab_size=VOCABULARY)


def unequal_blocks() -> list[dict[str, torch.Tensor]]:
    """11 blocks of 3 to 16 tokens: forwards and processes then hold unequal numbers of tokens."""
    return [{"input_ids": block["input_ids"][: 3 + 5 * i % 14]} for i, block in enumerate(random_blocks(11))]


def run(job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What it reports, and the weights at the end."""
    how = {"max_steps": 5, "learning_rate": 1e-2, "eval_steps": 2, "weight_decay": 0.1, "use_cpu": True, **job.how}
    settings = TrainSettings(
        per_device_train_batch_size=job.forward,
        gradient_accumulation_steps=job.forwards,
        dtype="auto" if job.double else "float32",
        save_steps=2 if job.save else 0,
        **how,
    )
    model = made(job.model)
    if job.convert:
        hf_geglu.convert(model)
    if job.double:
        model.double()
    kind = type(model)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in WAYS[job.way].items():
            patch.setenv(name, value)
        accelerator = make_accelerator(settings)
        with adapted(model, settings), counted() as counts:
            result = train(
                model,
                unequal_blocks(),
                random_blocks(5, seed=9),
                settings,
                objective=MLM if job.model == "bert" else CausalLM(),
                checkpoints=CheckpointFolder(Path(job.save), keep=0) if job.save else None,
                resume_from=Path(job.resume) if job.resume else None,
                accelerator=accelerator,
                teacher=made(job.model) if settings.distill else None,
            )
    assert type(model) is kind  # nothing of the sharding is left
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    found = {
        "losses": list(result.losses),
        "norms": [record.grad_norm for record in result.steps],
        "nll": [record.nll for record in result.evals],
        "best_step": result.best_step,
        "strategy": str(accelerator.distributed_type.value),
        "counts": counts,
    }
    return found, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run_all(jobs: list[Job], output: Path) -> None:
    """In every process of a launch."""
    found = {}
    for job in jobs:
        try:
            found[job.name], weights = run(job)
        except hf_geglu.HfGegluError as error:  # the same in both processes: the next job goes on
            found[job.name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        if os.environ["RANK"] == "0":
            save_file(weights, output.with_name(f"{job.name}.safetensors"))
    if os.environ["RANK"] == "0":
        output.write_text(json.dumps(found))


def to_json(jobs: list[Job]) -> str:
    """For the launch."""
    return json.dumps([asdict(job) for job in jobs])


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("error")
    for kind in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", kind)
    # OPT's layer ends in a view, which nobody writes to
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    run_all([Job(**job) for job in json.loads(Path(sys.argv[1]).read_text())], Path(sys.argv[2]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
