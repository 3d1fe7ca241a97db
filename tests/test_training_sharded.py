"""Several processes train what one trains: with copies of the model (DDP) and with shares of it (FSDP2), two processes
over gloo; and a checkpoint of either is resumed by the other and by one process.

"Equal within float32 rounding" is measured, not chosen: the same run in float64 shows how far rounding takes one
process.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_job import Job, run, to_json
from tiny_training import gpt2, one_thread, random_blocks  # noqa: F401
from transformers import AutoModelForCausalLM

pytest.importorskip("accelerate")

from accelerate import FullyShardedDataParallelPlugin

from hf_geglu.errors import ConfigurationError
from hf_geglu.training import CheckpointFolder, TrainSettings, train

JOB = Path(__file__).with_name("sharded_job.py")
HAS_FSDP2 = "fsdp_version" in inspect.signature(FullyShardedDataParallelPlugin).parameters
needs_fsdp2 = pytest.mark.skipif(not HAS_FSDP2, reason="this accelerate has FSDP 1 only")

CAREFUL = {"layerwise_lr_decay": 0.7, "max_grad_norm": 0.1}
OPTIONS: dict[str, Job] = {
    "tied and a variant of its own": Job("gpt2", "gpt2", how={**CAREFUL, "gradient_checkpointing": True}),
    "embeddings, head and bias tied": Job("bert", "bert", convert=False),
    "value branches alone": Job("value", "gpt2", how={"trainable": "value", "ops": "lean"}),
    "value branches at their own rate": Job("rate", "gpt2", how={"value_learning_rate": 1e-3, "ema_decay": 0.5}),
    "adapters": Job("lora", how={"trainable": "lora", "lora_r": 4}),
    "the best model": Job("best", how={"load_best_model_at_end": True}),
    "a teacher": Job("distill", how={"distill": 0.5}),
}
MORE: dict[str, Job] = {
    "blocks alone": Job("ffn", how={"trainable": "ffn"}),
    "tiled kernels": Job("tiled", "gpt2", how={"ops": "tiled"}),
    "whole logits": Job("logits", how={"chunked_cross_entropy": "off"}),
    "fused experts": Job("mixtral", "mixtral"),
    "soft caps": Job("gemma2", "gemma2"),
    "relu": Job("opt", "opt"),
}


@dataclass(frozen=True)
class Run:
    """What a job has found, and its weights at the end."""

    found: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]

    def distance(self, other: Run) -> float:
        """Of the weights: the largest of all differences."""
        assert self.weights.keys() == other.weights.keys()
        return max(float((self.weights[n].double() - other.weights[n].double()).abs().max()) for n in self.weights)

    def has_the_losses_of(self, other: Run, *, tolerance: float = 3e-6) -> None:
        """Losses are near 4: a step of float32 is 4.8e-7 there."""
        for name in ("losses", "norms", "nll"):
            assert self.found[name] == pytest.approx(other.found[name], rel=tolerance, abs=tolerance), name
        assert self.found["best_step"] == other.found["best_step"]


def alone(job: Job) -> Run:
    """In this process, all 8 blocks of a step in one forward."""
    return Run(*run(replace(job, forward=8, forwards=1, way="copies")))


def launched(jobs: Iterable[Job], folder: Path, **environment: str) -> dict[str, Run]:
    """In two processes."""
    jobs = list(jobs)
    (folder / "jobs.json").write_text(to_json(jobs))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(JOB), str(folder / "jobs.json"), str(folder / "found.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "found.json").read_text())
    weights = {job.name: folder / f"{job.name}.safetensors" for job in jobs}
    return {name: Run(found[name], load_file(file) if file.exists() else {}) for name, file in weights.items()}


def resumed(folder: Path, by: str, written: str, *, way: str) -> Job:
    """Steps 3 to 5 of a run whose first two were made by others."""
    checkpoint = folder / written / "checkpoint-2"
    return replace(PLAIN, name=f"{by} from {written}", way=way, resume=str(checkpoint))


PLAIN = Job("plain", "gpt2", how={"ema_decay": 0.9, "load_best_model_at_end": True, "early_stopping_patience": 9})
"""Resumed: a tied, portable variant with all that a run may keep beside its weights."""
WAYS = ("one", "copies", "shares")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Run]]:
    """Everything that two processes do in the quick tests, in one launch."""
    folder = tmp_path_factory.mktemp("sharded")
    run(replace(PLAIN, forward=8, forwards=1, way="copies", save=str(folder / "one")))
    ways = WAYS if HAS_FSDP2 else WAYS[:2]
    jobs = [replace(PLAIN, name="2x4", forward=4, forwards=1, way="copies", how={})]
    jobs += [replace(PLAIN, name=way, way=way, save=str(folder / way)) for way in ways[1:]]
    jobs += OPTIONS.values() if HAS_FSDP2 else []
    jobs += [resumed(folder, by, written, way=by) for by in ways[1:] for written in ways]
    jobs += [replace(resumed(folder, "copies", "one", way="copies"), name="twice as many", forwards=4)]
    return folder, launched(jobs, folder)


def test_accumulation_and_two_processes_end_with_the_same_weights(together: Any) -> None:
    """1x8, 8x1 and 2x4 lie no further apart than four times what rounding does to one (measured: 1.8 at most)."""
    plain = replace(PLAIN, how={}, way="copies")
    whole, cut, exact = (
        Run(*run(replace(plain, forward=forward, forwards=8 // forward, double=double)))
        for forward, double in ((8, False), (1, False), (8, True))
    )
    rounding = whole.distance(exact)
    assert 0 < rounding < 1e-4
    for other in (cut, together[1]["2x4"]):
        other.has_the_losses_of(whole)
        assert other.distance(whole) <= 4 * rounding


@needs_fsdp2
@pytest.mark.parametrize("name", OPTIONS)
def test_shares_train_as_the_whole_does(together: Any, name: str) -> None:
    job = OPTIONS[name]
    one, two = alone(job), together[1][job.name]
    assert two.found["strategy"] == "FSDP"
    two.has_the_losses_of(one)
    assert two.distance(one) <= 1e-4  # of steps of 1e-2
    assert min(run.found["counts"]["head"] for run in (one, two)) > 0
    assert (two.found["counts"]["block"] > 0) == (one.found["counts"]["block"] > 0) == (job.how.get("ops") == "lean")


@needs_fsdp2
def test_a_gate_does_not_move_where_values_are_trained(together: Any) -> None:
    fresh, trained = gpt2(), together[1]["value"].weights
    for layer in range(2):
        name = f"transformer.h.{layer}.mlp.c_fc.weight"
        gate = trained[name][:, :64]
        assert torch.equal(gate, fresh.state_dict()[name])
        assert trained[name][:, 64:].abs().max() > 1e-3


@pytest.mark.parametrize("written", WAYS)
@pytest.mark.parametrize("by", WAYS)
def test_a_checkpoint_is_resumed_by_any_number_of_processes(together: Any, by: str, written: str) -> None:
    if "shares" in (by, written) and not HAS_FSDP2:
        pytest.skip("this accelerate has FSDP 1 only")
    folder, found = together
    whole = alone(PLAIN)
    job = resumed(folder, by, written, way=by)
    again = alone(job) if by == "one" else found[job.name]
    assert len(again.found["losses"]) == 5
    again.has_the_losses_of(whole)
    assert again.distance(whole) <= 1e-4


@needs_fsdp2
def test_a_checkpoint_of_shares_is_a_model_and_plain_data(together: Any) -> None:
    checkpoints = {way: together[0] / way / "checkpoint-4" for way in WAYS}
    names = {way: {path.name for path in folder.iterdir()} for way, folder in checkpoints.items()}
    assert names["shares"] == names["copies"] == names["one"] | {"rng-1.safetensors"}
    assert {Path(name).suffix for name in names["shares"]} == {".safetensors", ".json", ".py"}
    for name in ("model", "optimizer", "average", "best"):
        one, two = (load_file(checkpoints[way] / f"{name}.safetensors") for way in ("one", "shares"))
        assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in two.items()}
    model, other = (AutoModelForCausalLM.from_pretrained(checkpoints[way]) for way in ("shares", "one"))
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    described = [json.loads((checkpoints[way] / "config.json").read_text()) for way in ("shares", "one")]
    assert described[0] == described[1]


def test_another_number_of_blocks_a_step_is_refused(together: Any) -> None:
    """By two processes, and by one."""
    message = (
        "ConfigurationError: checkpoint-2 was written by 1 process with 8 blocks a step; now it is 2 processes x 2 "
        "blocks x 4 forwards = 16: expected as many, for the same batches. Give --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 2."
    )
    assert together[1]["twice as many"].found["error"] == message
    two = together[0] / "copies" / "checkpoint-2"
    with pytest.raises(
        ConfigurationError, match=r"2 processes with 8 .* 1 process x 4 .*--gradient_accumulation_steps 2"
    ):
        run(replace(PLAIN, way="copies", forward=4, forwards=1, resume=str(two)))
    with pytest.raises(ConfigurationError, match=r"x 16 .*_batch_size 8 --gradient_accumulation_steps 1"):
        run(replace(PLAIN, way="copies", forward=16, forwards=1, resume=str(two)))


def test_one_process_may_still_take_other_batches(tmp_path: Path) -> None:
    """The number of blocks a step is a setting like others as long as the processes are the same."""
    folder = CheckpointFolder(tmp_path)
    how = {"max_steps": 2, "save_steps": 2, "use_cpu": True}
    train(gpt2(), random_blocks(9), None, TrainSettings(**how), checkpoints=folder)
    longer = TrainSettings(**how | {"max_steps": 3, "per_device_train_batch_size": 2})
    assert len(train(gpt2(), random_blocks(9), None, longer, resume_from=folder.latest()).steps) == 3


@pytest.mark.slow
@needs_fsdp2
def test_more_is_trained_by_shares_as_by_the_whole(tmp_path: Path) -> None:
    two = launched(MORE.values(), tmp_path)
    for job in MORE.values():
        one = alone(job)
        assert "error" not in two[job.name].found, two[job.name].found
        two[job.name].has_the_losses_of(one, tolerance=1e-5)
        assert two[job.name].distance(one) <= 1e-3, job.name


@pytest.mark.slow
@needs_fsdp2
def test_bfloat16_by_shares_is_near_float32(tmp_path: Path) -> None:
    job = Job("bf16", how={"bf16": True})
    two = launched([job], tmp_path)["bf16"]
    two.has_the_losses_of(alone(Job("float32")), tolerance=0.02)
    assert two.found["losses"] != alone(Job("float32")).found["losses"]


@pytest.mark.slow
def test_deepspeed_trains_and_resumes_as_one_process_does(tmp_path: Path) -> None:
    """ZeRO 2: optimizer state and gradients in shares."""
    pytest.importorskip("deepspeed")
    kept = replace(PLAIN, how={**CAREFUL, "ema_decay": 0.5})
    whole = Run(*run(replace(kept, forward=8, forwards=1, way="copies", save=str(tmp_path / "one"))))
    same = [Job("plain"), Job("value", "gpt2", how={"trainable": "value", "ops": "lean"}), OPTIONS["adapters"]]
    jobs = [replace(job, way="zero") for job in same]
    jobs += [replace(kept, name="saved", way="zero", save=str(tmp_path / "zero"))]
    for written in ("one", "zero"):
        checkpoint = str(tmp_path / written / "checkpoint-2")
        jobs += [replace(kept, name=f"from {written}", way="zero", resume=checkpoint)]
    jobs += [replace(kept, name="rate", way="zero", how={"value_learning_rate": 1e-3})]
    found = launched(jobs, tmp_path, DS_ACCELERATOR="cpu")
    assert found.pop("rate").found["error"].startswith("ConfigurationError: --value_learning_rate with DeepSpeed")
    for name, two in found.items():
        assert two.found.get("strategy") == "DEEPSPEED", two.found
        one = whole if name == "saved" or name.startswith("from") else alone(next(j for j in same if j.name == name))
        two.has_the_losses_of(one)
        assert two.distance(one) <= 1e-4, name
    again = alone(replace(kept, resume=str(tmp_path / "zero" / "checkpoint-2")))
    again.has_the_losses_of(whole)
    names = {path.name for path in (tmp_path / "zero" / "checkpoint-4").iterdir()}
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".py"}
