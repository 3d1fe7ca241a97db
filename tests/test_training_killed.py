"""Killed at any moment, a run goes on with the same command and leaves what an uninterrupted one leaves, bit by bit."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from killed_runs import Forge
from safetensors import safe_open
from tiny_tasks import sentence, write_task
from tiny_training import causal_tokenizer, gpt2

pytest.importorskip("accelerate")
load_dataset = pytest.importorskip("datasets").load_dataset

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs fork, memfd and SIGKILL")

STEPS = 12
FLAGS = (
    f"--max_steps {STEPS} --save_steps 2 --eval_steps 3 --warmup_steps 3 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 1e-2 --weight_decay 0.1 --use_cpu "
    "--ema_decay 0.9 --load_best_model_at_end --max_eval_samples 4 --logging_steps 0"
).split()
TEXT = ["--model_name_or_path", "model", "--block_size", "16", "--train_file"]
DATA = {
    # 60 rows of a table; 20 rows of a stream, which is read more than twice, and 40 of another
    "map": ("clm", [*TEXT, "long.jsonl"]),
    "streaming": ("clm", [*TEXT, "short.jsonl", "--streaming"]),
    "pictures": (
        "image_classification",
        ["--model_name_or_path", "image_classification-model", "--train_file", "pictures.parquet", "--streaming"],
    ),
}


def make_place(folder: Path, kind: str) -> None:
    if kind == "pictures":
        write_task(folder, "image_classification")
        rows = load_dataset("imagefolder", data_dir=str(folder / "image_classification-data"), split="train")
        rows.select([i // 2 + 20 * (i % 2) for i in range(40)]).to_parquet(folder / "pictures.parquet")
        return
    gpt2(dropout=0.1).save_pretrained(folder / "model")
    causal_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("long", 60), ("short", 20)):
        text = "".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(rows))
        (folder / f"{name}.jsonl").write_text(text)


def lines(path: Path) -> list[dict[str, Any]]:
    """Of a log, without what a clock said."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in found]


def tensors(path: Path) -> dict[str, Any]:
    """Bytes of each, and the words beside them, whose order safetensors does not keep."""
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()} | {  # noqa: SIM118 - no mapping
            "words": file.metadata()
        }


def left(out: Path) -> dict[str, Any]:
    """All that must not depend on interruptions; of other files their names."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        found[name] = None
        if path.suffix == ".safetensors":
            found[name] = tensors(path)
        elif path.name in ("config.json", "loss.png"):
            found[name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            found[name] = lines(path)
        elif path.name == "progress.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "steps"}
        elif path.name == "results.json":
            trained = json.loads(path.read_text())["trained"]
            found[name] = {key: trained[key] for key in ("losses", "evals", "best_step", "tokens")}
    return found


def check(place: Path, kind: str, *, processes: int, kills: int, seed: int) -> None:
    make_place(place, kind)
    forge = Forge(place, processes=processes)
    chance = random.Random(seed)
    task, more = DATA[kind]
    flags = [*FLAGS, *more]
    try:
        word, moments = forge.run(task, [*flags, "--output_dir", "whole"])
        assert word == "done"
        whole = left(place / "whole")
        assert [row["step"] for row in whole["train_log.jsonl"]] == list(range(1, STEPS + 1))
        assert len({row["loss"] for row in whole["train_log.jsonl"]}) == STEPS
        killed = 0
        while True:
            resume = ["--resume"] if (place / "out").exists() else []
            process = chance.randrange(processes)
            at = chance.randint(1, moments[process] // 3) if killed < kills else -1
            word, _ = forge.run(task, [*flags, "--output_dir", "out", *resume], at=at, process=process)
            told = f"process {process} {word}" + f" at moment {at} of {moments[process]}" * (at > 0)
            print(f"{kind}, {processes} process(es), seed {seed}: {told}")
            killed += word == "killed"
            if word == "done":
                compare(whole, left(place / "out"))
                if killed == kills:
                    return
                shutil.rmtree(place / "out")
    finally:
        forge.close()


def compare(whole: dict[str, Any], again: dict[str, Any]) -> None:
    assert again.keys() == whole.keys()
    for name, content in whole.items():
        assert again[name] == content, name


@pytest.mark.parametrize("kind", ["map", "streaming"])
def test_killed_at_3_random_moments(tmp_path: Path, kind: str) -> None:
    check(tmp_path, kind, processes=1, kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", DATA)
def test_killed_at_10_random_moments(tmp_path: Path, kind: str, processes: int) -> None:
    check(tmp_path, kind, processes=processes, kills=10, seed=10 * processes)
