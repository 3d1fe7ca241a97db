"""The benchmark beside other trainers compares like with like, and its page says what its record says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny_training import causal_tokenizer, lines, llama

from benchmarks.peers import __main__ as bench
from benchmarks.peers import page
from benchmarks.peers.material import Texts, write_texts
from benchmarks.peers.sides import CONVERTED, LAUNCH, PLAIN, SCRIPT, SFT
from benchmarks.speed.process import measured

BLOCK, BATCH, STEPS = 8, 2, 3


def _run(*, cpu: float, peak: int, batches: tuple[str, ...] = ("a", "b", "c")) -> dict[str, Any]:
    steps = [9.0, cpu]  # the first is not counted
    return {
        "losses": [3.0, 2.0, 1.0],
        "batches": list(batches),
        "cpu": steps,
        "wall": steps,
        "loaded": 100,
        "peak": peak,
    }


@pytest.mark.slow
def test_recipe_and_sfttrainer_train_on_the_same_batches_with_the_same_losses(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    folder = tmp_path / "llama"  # of GPT-2 the Trainer counts a token a block too many (transformers 5.23)
    llama().save_pretrained(folder)
    causal_tokenizer().save_pretrained(folder)
    texts = write_texts(tmp_path, lines(40), causal_tokenizer(), block=BLOCK, draws=BATCH * STEPS)
    found = {}
    for side in (SFT, PLAIN):
        scratch = tmp_path / side
        scratch.mkdir()
        found[side] = measured(
            "job",
            package="benchmarks.peers",
            threads=1,
            side=side,
            model=str(folder),
            texts=asdict(texts),
            batch=BATCH,
            block=BLOCK,
            steps=STEPS,
            precision="float32",
            script="",
            scratch=str(scratch),
        )
    ours, theirs = found[PLAIN], found[SFT]
    assert ours["batches"] == theirs["batches"]
    assert len(set(ours["batches"])) == STEPS
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert len(ours["cpu"]) == STEPS - 1
    assert ours["peak"] > ours["loaded"] > 2**20


def test_other_batches_are_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: str, side: str, **__: Any) -> dict[str, Any]:
        return _run(cpu=1.0, peak=200, batches=("a", "c", "b") if side == SFT else ("a", "b", "c"))

    monkeypatch.setattr(bench, "measured", measured)
    case = {"precision": "float32", "batch": 1, "block": 8}
    with pytest.raises(RuntimeError, match="different batches"):
        bench.turns(
            "job",
            case,
            dict.fromkeys(LAUNCH, ""),
            Texts("", "", ()),
            script="",
            rounds=1,
            steps=3,
            say=lambda line: None,
        )


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    runs = {
        SCRIPT: [_run(cpu=2.0, peak=1124)],
        SFT: [_run(cpu=1.0, peak=612)],
        PLAIN: [_run(cpu=1.0, peak=356)],
        CONVERTED: [_run(cpu=0.5, peak=356)],
    }
    record = {
        "cases": [
            {"precision": "float32", "batch": 1, "block": 8, **bench.times(runs), **bench.peaks(runs)},
            {"precision": "bfloat16", "batch": 1, "block": 8, **bench.times(runs)},
            {"precision": "bfloat16", "batch": 4, "block": 8, **bench.peaks(runs)},
        ],
        "script": {"sha256": "0" * 64, "asks for transformers": "4.57.0"},
        **{"python": "3", "torch": "2", "transformers": "5", "trl": "1", "accelerate": "1", "warm": 1},
    }
    told = page.render(json.loads(json.dumps(record)), tmp_path / "peers.md").read_text(encoding="utf-8")
    assert f"| {CONVERTED} | 0.250 | 0.500 | 0.25 | 0.250 | 0.500 | 0 MiB | 0 |" in told
    assert f"| {CONVERTED} | 0.250 | 0.500 | 0.25 |  |  |  | 0 |" in told
    assert "converted: 0.25 and 0.50 of the peak (target 0.6). Times were not measured." in told
    assert "converted: 4.00 and 2.00 times the throughput (target 1.1), 0.25 and 0.50 of the peak (target 0.6)" in told
