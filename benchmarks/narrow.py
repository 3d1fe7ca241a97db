"""How much of a model survives fewer neurons? MiniLM's sentence embeddings, stage by stage, beside the dense control.

Calibrated on sentences of four domains (essays, Python's documentation, WordNet, a dictionary of computing). Measured
on 800 held-out sentences: half of them essays, half Debian's manuals, which calibration never saw.

    python -m benchmarks.narrow closed --widths 2/3 3/4 5/6 --seeds 0 1 2
    python -m benchmarks.narrow local --blocks gated dense --seeds 0 1 2
    python -m benchmarks.narrow heal

Every run adds its rows to benchmarks/results/quality_narrow.json, or replaces them.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from benchmarks.corpora import corpus
from benchmarks.narrow_runs import WIDTHS, Row, record, rows
from benchmarks.sentences import batches, in_order, mixture, sentences
from hf_geglu.demo.weights import minilm_folder
from hf_geglu.narrowing.fidelity import embeddings, neighbour_agreement
from hf_geglu.narrowing.settings import STAGES, HealSettings, NarrowSettings

CALIBRATED = ("prose", "library", "glosses", "computing")
OTHER = "manuals"
HELD_OUT = 400
WORDS = {"closed": 45_000, "local": 128_000, "heal": 128_000}
"""Of calibration text, by the furthest stage; MiniLM makes about 1.5 tokens of a word."""
HEALING_WORDS = 1_600_000
"""Of the text that healing trains on."""
HEALING_STEPS = 930
"""Of about 2,048 tokens: what 15 CPU minutes leave beside the other stages."""
HEAD = {"calibrated_on": CALIBRATED, "other": OTHER, "held_out_sentences": 2 * HELD_OUT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration text [default: 0]")
    parser.add_argument("--widths", nargs="+", default=["2/3"], choices=list(WIDTHS), help="shares [default: 2/3]")
    parser.add_argument(
        "--blocks", nargs="+", default=["gated"], choices=["gated", "dense"], help="dense is the control"
    )
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

    def measure(student: nn.Module) -> Row:
        return figures(reference, embeddings(student, on))

    for seed in asked.seeds:
        amounts = [max(WORDS[stage] for stage in asked.stages), *([HEALING_WORDS] if "heal" in asked.stages else [])]
        given: list[Any] = [
            batches(mixture(train, words=words, seed=seed), tokenizer, tokens=2048, seed=seed) for words in amounts
        ]
        settings = NarrowSettings(seed=seed, heal=HealSettings(passes=HEALING_STEPS / len(given[-1])))
        for row in rows(
            model,
            given[0],
            given[-1],
            widths=asked.widths,
            stages=asked.stages,
            blocks=asked.blocks,
            settings=settings,
            measure=measure,
        ):
            record("quality_narrow", HEAD, {"model": "all-MiniLM-L6-v2", **row})


def figures(reference: torch.Tensor, found: torch.Tensor) -> Row:
    """Mean cosine and neighbour agreement: of all, of the domain calibrated on, of the other one."""
    cosine, agreement = (reference * found).sum(-1), neighbour_agreement(reference, found)
    parts = {"": slice(None), "_calibrated": slice(0, HELD_OUT), "_other": slice(HELD_OUT, None)}
    return {
        name + suffix: round(float(values[part].mean()), 4)
        for suffix, part in parts.items()
        for name, values in (("cosine", cosine), ("neighbours", agreement))
    }


if __name__ == "__main__":
    main()
