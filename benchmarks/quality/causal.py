"""SwiGLU -> GeGLU on SmolLM2-135M at step 0: the naive swap, the table's row, and calibration with several seeds."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_geglu
from benchmarks.corpora import corpus
from benchmarks.quality.measuring import Reference, distances
from benchmarks.records import earlier, write
from hf_geglu.calibration import CalibrationData, calibrate
from hf_geglu.demo.naive import naive_swap
from hf_geglu.demo.weights import smollm2_folder
from hf_geglu.planning import make_plan
from hf_geglu.training import blocks_from_texts

BLOCK = 256
DOMAINS = ("library", "prose", "manuals")
STARTS = TABLE, CALIBRATED, NAIVE = (
    "table: silu(z) ~ 1.702 gelu(z/1.702)",
    "calibrated",
    "naive swap",
)


def run(
    *, blocks: int = 12, wide: int = 44, tokens: int = 8192, seeds: int = 3, starts: Sequence[str] = STARTS
) -> None:
    """Write the record after every measurement, so that a run that is stopped leaves what it has. Rows of other starts
    in the record are kept.

    Args:
        blocks: of 256 tokens, held out, of each domain.
        wide: of the domains that were not calibrated on, for the first seed, where the question is how small a change
            of the loss is; 0 for none.
        tokens: of a calibration; a quarter of them chooses.
        seeds: of what text is calibrated on, and of the sampled labels.
        starts: some of `STARTS`.
    """
    folder = smollm2_folder(progress=print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = {name: corpus(name).held_out for name in DOMAINS}
    held = {name: held_out_blocks(texts[name], tokenizer, blocks) for name in DOMAINS}
    reference = {name: Reference(model, each) for name, each in held.items()}
    settings = {
        "model": "SmolLM2-135M",
        "calibrated_on": "library, its training side",
        "blocks": blocks,
        "block": BLOCK,
        "calibration_tokens": tokens,
    }
    rows = [row for row in earlier("quality_causal", settings) if row["start"] not in starts]
    record: dict[str, Any] = {**settings, "rows": rows}

    def measured(start: str, converted: Any, **more: Any) -> None:
        figures = {name: distances(reference[name], converted, held[name]) for name in held}
        rows.append({"start": start, **more, "domains": figures})
        rows.sort(key=lambda row: STARTS.index(row["start"]))
        shown = ", ".join(f"{name} KL {each['kl']['mean']:.6f}" for name, each in figures.items())
        print(f"{start} {more.get('seed', '')}: {shown}", flush=True)
        write("quality_causal", record)

    plan = make_plan(model)
    if TABLE in starts:
        hf_geglu.convert(model, plan, verify="sites")
        measured(TABLE, model)
        hf_geglu.revert(model)
    if NAIVE in starts:
        measured(NAIVE, naive_swap(model, plan))
    more_held = {name: held_out_blocks(texts[name], tokenizer, wide) for name in DOMAINS[1:]} if wide else {}
    more_reference = {name: Reference(model, each) for name, each in more_held.items()}
    for seed in range(seeds) if CALIBRATED in starts else ():
        data = calibration_data(("library",), tokenizer, tokens, seed)
        begin = time.process_time()
        made = calibrate(model, plan, data, seed=seed)
        seconds = time.process_time() - begin
        hf_geglu.convert(model, made.plan, fits=made.fits, verify="sites")
        chosen = [entry.fit.method for entry in made.plan.converted if entry.fit is not None]
        measured(
            CALIBRATED,
            model,
            seed=seed,
            cpu_seconds=round(seconds, 1),
            tokens=data.tokens,
            chosen={name: chosen.count(name) for name in sorted(set(chosen))},
            held_out=str(made.held_out),
        )
        if seed == 0 and wide:
            figures = {name: distances(more_reference[name], model, more_held[name]) for name in more_held}
            record["wide"] = {"blocks": wide, "domains": figures}
            print({name: each["delta_nll"] for name, each in figures.items()}, flush=True)
            write("quality_causal", record)
        hf_geglu.revert(model)


def calibration_data(
    domains: Sequence[str], tokenizer: Any, tokens: int, seed: int, *, batch_size: int = 4
) -> CalibrationData:
    """Batches of the domains in turn, of documents in an order of the seed's."""
    parts = []
    for name in domains:
        texts = list(corpus(name).train)
        for earlier_seed in range(seed + 1):
            random.Random(earlier_seed).shuffle(texts)
        share = math.ceil(tokens / len(domains))
        parts.append(CalibrationData.of(texts, tokenizer=tokenizer, tokens=share, batch_size=batch_size).batches)
    batches = [batch for together in zip(*parts, strict=True) for batch in together]
    return CalibrationData(batches=tuple(batches[: tokens // batches[0]["input_ids"].numel()]), name=", ".join(domains))


def held_out_blocks(texts: tuple[str, ...], tokenizer: Any, count: int) -> torch.Tensor:
    """The first block of each of many documents, rather than many of a few."""
    found, _ = blocks_from_texts(texts, tokenizer, block_size=BLOCK)
    step = max(1, min(len(found) // count, 20))
    return torch.stack([torch.as_tensor(found[number * step]["input_ids"]) for number in range(count)])
