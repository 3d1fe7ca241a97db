"""SwiGLU -> GeGLU on SmolLM2-135M at step 0, calibrated on text of several domains: what more of it is worth on domains
that none of it comes from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_geglu
from benchmarks.corpora import corpus
from benchmarks.quality.causal import BLOCK, calibration_data, held_out_blocks
from benchmarks.quality.measuring import Reference, distances
from benchmarks.records import earlier, write
from hf_geglu.calibration import calibrate
from hf_geglu.demo.weights import smollm2_folder
from hf_geglu.planning import make_plan

MIX = ("library", "glosses", "computing")
DOMAINS = ("prose", "manuals")
"""Never calibrated on."""
TOKENS = (32_768, 16_384, 8_192)


def run(*, blocks: int = 44, tokens: Sequence[int] = TOKENS, seeds: int = 1) -> None:
    """Write the record after every measurement. Rows of other amounts in the record are kept.

    Args:
        blocks: of 256 tokens, held out, of each domain.
        tokens: of a calibration; a quarter of them chooses.
        seeds: of what text is calibrated on, and of the sampled labels.
    """
    folder = smollm2_folder(progress=print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    held = {name: held_out_blocks(corpus(name).held_out, tokenizer, blocks) for name in DOMAINS}
    reference = {name: Reference(model, each) for name, each in held.items()}
    settings = {"model": "SmolLM2-135M", "calibrated_on": list(MIX), "blocks": blocks, "block": BLOCK}
    rows = [row for row in earlier("quality_mixed", settings) if row["tokens"] not in tokens]
    plan = make_plan(model)
    for amount, seed in [(amount, seed) for amount in tokens for seed in range(seeds)]:
        data = calibration_data(MIX, tokenizer, amount, seed, batch_size=2)
        begin = time.process_time()
        made = calibrate(model, plan, data, seed=seed)
        seconds = time.process_time() - begin
        hf_geglu.convert(model, made.plan, fits=made.fits, verify="sites")
        chosen = [entry.fit.method for entry in made.plan.converted if entry.fit is not None]
        rows.append(
            {
                "tokens": amount,
                "seed": seed,
                "cpu_seconds": round(seconds, 1),
                "chosen": {name: chosen.count(name) for name in sorted(set(chosen))},
                "held_out": str(made.held_out),
                "domains": {name: distances(reference[name], model, held[name]) for name in held},
            }
        )
        hf_geglu.revert(model)
        rows.sort(key=lambda row: (row["tokens"], row["seed"]))
        write("quality_mixed", {**settings, "rows": rows})
        print(rows, flush=True)
