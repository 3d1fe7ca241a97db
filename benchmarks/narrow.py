"""How much of a model survives fewer neurons? MiniLM's sentence embeddings, stage by stage, beside the dense control.

Calibrated on sentences of four domains (essays, Python's documentation, WordNet, a dictionary of computing). Measured
on 800 held-out sentences: half of them essays, half Debian's manuals, which calibration never saw. CPU seconds are
those of the process, with one thread.

    python -m benchmarks.narrow closed --seeds 0 1 2
    python -m benchmarks.narrow local --seeds 0 1 2
    python -m benchmarks.narrow heal --seeds 0

Every run adds its rows to benchmarks/results/quality_narrow.json, or replaces them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.corpora import corpus
from benchmarks.records import RESULTS, write
from benchmarks.sentences import batches, in_order, mixture, sentences
from hf_geglu.calibration import CalibrationData
from hf_geglu.demo.weights import minilm_folder
from hf_geglu.narrowing.fidelity import embeddings, neighbour_agreement
from hf_geglu.narrowing.pipeline import narrow, study
from hf_geglu.narrowing.settings import STAGES, NarrowSettings, Stage
from hf_geglu.planning import make_plan

CALIBRATED = ("prose", "library", "glosses", "computing")
OTHER = "manuals"
HELD_OUT = 400
WORDS = {"closed": 45_000, "local": 45_000, "heal": 380_000}
"""Words of calibration text at each stage; MiniLM makes about 1.35 tokens of a word."""
WIDTHS = {"2/3": 2 / 3, "3/4": 3 / 4, "5/6": 5 / 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration text [default: 0]")
    parser.add_argument("--widths", nargs="+", default=["2/3"], choices=list(WIDTHS), help="shares [default: 2/3]")
    parser.add_argument("--control", action="store_true", help="without a value branch: a dense block of that width")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = minilm_folder(progress=print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    texts = {name: corpus(name) for name in (*CALIBRATED, OTHER)}
    train = {name: sentences(texts[name].train) for name in CALIBRATED}
    draw = random.Random(0)
    measured = [draw.sample(sentences(texts[name].held_out), HELD_OUT) for name in ("prose", OTHER)]
    on = list(in_order(measured[0] + measured[1], tokenizer))
    reference = embeddings(model, on)
    for seed in asked.seeds:
        _run(model, mixture(train, words=WORDS[asked.stage], seed=seed), tokenizer, on, reference, asked, seed)


def _run(model: Any, texts: list[str], tokenizer: Any, on: Any, reference: torch.Tensor, asked: Any, seed: int) -> None:
    """Every width that was asked for, from one look at the original."""
    given = batches(texts, tokenizer, tokens=2048, seed=seed)
    settings = NarrowSettings(stage=asked.stage, seed=seed)
    plans = {name: make_plan(model, width=WIDTHS[name]) for name in asked.widths}
    smallest = min(plan.sites[0].width for plan in plans.values())
    start = time.process_time()
    studied = study(model, plans[asked.widths[0]], given, smallest=smallest, settings=settings, progress=_say(start))
    learnt = time.process_time() - start
    for name, plan in plans.items():
        start = time.process_time() - learnt
        common = {
            "model": "all-MiniLM-L6-v2",
            "width": name,
            "neurons": plan.sites[0].width,
            "value_branch": not asked.control,
            "seed": seed,
            "tokens": studied.tokens,
        }

        def measured_row(stage: Stage, student: Any, common: Any = common, since: float = start) -> None:
            row = {
                **common,
                "stage": stage,
                "healing_tokens": CalibrationData(batches=tuple(given)).tokens if stage == "heal" else 0,
                "cpu_seconds": round(time.process_time() - since),
                **_measured(reference, embeddings(student, on)),
            }
            print(row, flush=True)
            _record(row)

        narrow(
            studied,
            plan,
            width=plan.sites[0].width,
            settings=settings,
            value_branch=not asked.control,
            progress=_say(start),
            reached=measured_row,
        )


def _say(start: float) -> Any:
    return lambda line: print(f"  {line} ({time.process_time() - start:.0f} CPU s)", flush=True)


def _measured(reference: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    cosine, agreement = (reference * found).sum(-1), neighbour_agreement(reference, found)
    parts = {"": slice(None), "_calibrated": slice(0, HELD_OUT), "_other": slice(HELD_OUT, None)}
    return {
        name + suffix: round(float(values[part].mean()), 4)
        for suffix, part in parts.items()
        for name, values in (("cosine", cosine), ("neighbours", agreement))
    }


def _record(row: dict[str, Any]) -> None:
    path = RESULTS / "quality_narrow.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    key = ("model", "width", "stage", "value_branch", "seed")
    rows = [old for old in rows if any(old[name] != row[name] for name in key)] + [row]
    rows.sort(key=lambda each: (each["width"], STAGES.index(each["stage"]), not each["value_branch"], each["seed"]))
    write(
        "quality_narrow",
        {"calibrated_on": CALIBRATED, "other": OTHER, "held_out_sentences": 2 * HELD_OUT, "rows": rows},
    )


if __name__ == "__main__":
    main()
