"""What a model writes before and after: seeded, in log, report and card, and nothing that the training would notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tasks import sentence, write_task
from tiny_training import gpt2, interrupted, one_thread, same_weights, snapshot  # noqa: F401

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import transformers

from hf_geglu.errors import ConfigurationError
from hf_geglu.training import RunResult
from hf_geglu.training.command_line import main, parse
from hf_geglu.training.outset import set_out
from hf_geglu.training.reports.generations import Prompt, Sampler
from hf_geglu.training.run import finetune

RUN = "--max_steps 3 --save_steps 2 --per_device_train_batch_size 3 --learning_rate 1e-2 --use_cpu --convert"
ASK = ["--generation_max_new_tokens", "8", "--sample_prompts", "the quick brown", "a gated"]

pytestmark = pytest.mark.usefixtures("place")


def run(task: Any, flags: list[str], *more: str, out: str = "out") -> RunResult:
    return finetune(parse([*flags, *RUN.split(), "--output_dir", out, *more], task), task)


def log(out: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "sample_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["clm", "sft", "seq2seq"])
def test_training_does_not_notice(place: Path, task: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = write_task(place, task)
    if task != "seq2seq":
        gpt2(dropout=0.1).save_pretrained(f"{task}-model")
    asked = run(task, flags, *ASK, "--num_generation_samples", "2", out="asked")
    silent = run(task, flags, out="silent")
    assert asked.trained.losses == silent.trained.losses
    assert asked.trained.evals == silent.trained.evals
    for name in ("model.safetensors", "generation_config.json", "config.json", "checkpoint-2/optimizer.safetensors"):
        assert Path("asked", name).read_bytes() == Path("silent", name).read_bytes(), name
    assert not (place / "silent" / "sample_log.jsonl").exists()

    assert len(asked.samples) == 4
    assert [sample.prompt for sample in asked.samples[:2]] == ["the quick brown", "a gated"]
    assert all(sample.prompt for sample in asked.samples)
    assert any(sample.before != sample.after for sample in asked.samples)
    rows = log("asked")
    assert [row["step"] for row in rows] == [0] * 4 + [3] * 4
    assert [row["completion"] for row in rows] == [s.before for s in asked.samples] + [s.after for s in asked.samples]
    card = (place / "asked" / "README.md").read_text(encoding="utf-8")
    assert "## What it writes" in card
    assert f"    prompt:   the quick brown\n    before:   {asked.samples[0].before.splitlines()[0]}" in card
    assert "model  step 0/3  ...the quick brown -> " in capsys.readouterr().err
    results = json.loads((place / "asked" / "results.json").read_text())
    assert results["samples"][1]["after"] == asked.samples[1].after
    manifest = json.loads((place / "asked" / "geglu" / "manifest.json").read_text())
    assert manifest["provenance"]["trainings"][0]["samples"] == results["samples"]


def test_an_interrupted_run_has_each_completion_once_and_the_control_writes_too(place: Path) -> None:
    flags = write_task(place, "clm")
    whole = run("clm", flags, *ASK, "--control", out="whole")
    interrupted(lambda: run("clm", flags, *ASK, "--control"), after=3)
    assert [row["step"] for row in log()] == [0, 0]
    resumed = run("clm", flags, *ASK, "--control", "--resume")
    assert resumed.samples == whole.samples
    assert log() == log("whole")
    assert log("out/control") == log("whole/control")
    assert [sample.control for sample in whole.samples] == [row["completion"] for row in log("whole/control")[2:]]
    assert "    control: " in (place / "out" / "README.md").read_text(encoding="utf-8")
    assert whole.told_samples().count("control:") == 2


def test_completions_depend_on_the_seed_only(place: Path) -> None:
    write_task(place, "clm")
    tokenizer = transformers.AutoTokenizer.from_pretrained("clm-model")
    model: Any = gpt2(dropout=0.5).train()
    prompts = (Prompt("the", tuple(tokenizer("the")["input_ids"])),) * 2
    state = torch.get_rng_state()
    first = Sampler(tokenizer, prompts, 12, 1.0, 0).complete(model, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert first[0] != first[1]  # each prompt has random numbers of its own
    torch.rand(3)
    assert Sampler(tokenizer, prompts, 12, 1.0, 0).complete(model, torch.device("cpu")) == first
    assert Sampler(tokenizer, prompts, 12, 1.0, 7).complete(model, torch.device("cpu")) != first
    greedy = Sampler(tokenizer, prompts, 12, 0.0, 0).complete(model, torch.device("cpu"))
    assert greedy[0] == greedy[1]


def test_prompts_are_shown_as_in_training(place: Path) -> None:
    """A chat template is applied, and of a held-out conversation the model gets all before the first answer."""
    flags = write_task(place, "sft")
    ask = ["--sample_prompts", "the fox", "--num_generation_samples", "1", "--generation_max_new_tokens", "8"]
    found = run("sft", flags, *ask, "--packing")
    typed, held_out = found.samples
    assert typed.prompt == "the fox"
    asked = [" ".join(sentence(i).split()[:3]) for i in range(40)]
    assert held_out.prompt in asked
    sampler = set_out(parse([*flags, *RUN.split(), "--output_dir", "again", *ask], "sft"), "sft")[0].sampler
    assert sampler is not None
    shown = sampler.tokenizer.decode(sampler.prompts[0].ids)
    assert shown.replace(" ", "") == "<eos><unk>thefox<eos><eos><unk>"  # the template, as a prompt for an answer


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("clm", ["--sample_prompts", ""], "0 tokens; expected at least 1"),
        ("clm", ["--sample_prompts", "the " * 60], "60 tokens.* at most 56, so that 8 more fit into the 64 positions"),
        ("clm", ["--num_generation_samples", "1", "--validation_split_percentage", "0"], "nothing is held out"),
        ("clm", ["--num_generation_samples", "1", "--generation_max_new_tokens", "64"], "all 64 positions"),
        ("clm", ["--num_generation_samples", "-1"], "num_generation_samples=-1"),
        ("clm", ["--generation_max_new_tokens", "0"], "generation_max_new_tokens=0"),
    ],
)
def test_refused_before_anything_is_written(place: Path, task: Any, flags: list[str], message: str) -> None:
    given = write_task(place, task)
    before = snapshot(place)
    with pytest.raises(ConfigurationError, match=message):
        run(task, [*given, "--generation_max_new_tokens", "8"], *flags)
    assert snapshot(place) == before


def test_a_masked_model_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("mlm", [*write_task(place, "mlm"), "--output_dir", "out", "--sample_prompts", "a"]) == 2
    assert "--sample_prompts is a flag of clm, seq2seq, sft" in capsys.readouterr().err
