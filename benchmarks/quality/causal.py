"""SwiGLU -> GeGLU on SmolLM2-135M at step 0: the naive swap, the table's row, and calibration with several seeds."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_geglu
from benchmarks.corpora import corpus
from benchmarks.quality.measuring import distances, log_probabilities
from benchmarks.records import write
from hf_geglu.calibration import CalibrationData, calibrate
from hf_geglu.demo.naive import naive_swap
from hf_geglu.demo.weights import smollm2_folder
from hf_geglu.planning import make_plan
from hf_geglu.training import blocks_from_texts

BLOCK = 256


def run(*, blocks: int = 12, tokens: int = 8192, seeds: int = 3) -> None:
    """Write the record after every measurement, so that a run that is stopped leaves what it has.

    Args:
        blocks: of 256 tokens, held out, of each domain.
        tokens: of a calibration; a quarter of them chooses.
        seeds: of what text is calibrated on, and of the sampled labels.
    """
    folder = smollm2_folder(progress=print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    domains = {name: corpus(name).held_out for name in ("library", "prose", "manuals")}
    held = {name: _blocks(texts, tokenizer, blocks) for name, texts in domains.items()}
    reference = {
        # 16 bits keep three digits of a log-probability: not enough for a KL of 1e-4
        name: list(log_probabilities(model, each))
        for name, each in held.items()
    }
    record: dict[str, Any] = {
        "model": "SmolLM2-135M",
        "calibrated_on": "library, its training side",
        "blocks": blocks,
        "block": BLOCK,
        "calibration_tokens": tokens,
        "rows": [],
    }

    def measured(start: str, converted: Any, **more: Any) -> None:
        figures = {name: distances(reference[name], converted, held[name]) for name in held}
        record["rows"].append({"start": start, **more, "domains": figures})
        shown = ", ".join(f"{name} KL {each['kl']['mean']:.6f}" for name, each in figures.items())
        print(f"{start} {more.get('seed', '')}: {shown}", flush=True)
        write("quality_causal", record)

    plan = make_plan(model)
    hf_geglu.convert(model, plan, verify="sites")
    measured("table: silu(z) ~ 1.702 gelu(z/1.702)", model)
    hf_geglu.revert(model)
    train = list(corpus("library").train)
    for seed in range(seeds):
        random.Random(seed).shuffle(train)
        data = CalibrationData.of(train, tokenizer=tokenizer, tokens=tokens, name="Python's documentation")
        begin = time.process_time()
        made = calibrate(model, plan, data, seed=seed)
        seconds = time.process_time() - begin
        hf_geglu.convert(model, made.plan, fits=made.fits, verify="sites")
        chosen = [entry.fit.method for entry in made.plan.converted if entry.fit is not None]
        measured(
            "calibrated, per neuron",
            model,
            seed=seed,
            cpu_seconds=round(seconds, 1),
            tokens=data.tokens,
            chosen={name: chosen.count(name) for name in set(chosen)},
            held_out=str(made.held_out),
        )
        hf_geglu.revert(model)
    measured("naive swap", naive_swap(model, plan))


def _blocks(texts: tuple[str, ...], tokenizer: Any, count: int) -> torch.Tensor:
    """The first block of each of many documents, rather than many of a few."""
    found, _ = blocks_from_texts(texts, tokenizer, block_size=BLOCK)
    step = max(1, min(len(found) // count, 20))
    return torch.stack([torch.as_tensor(found[number * step]["input_ids"]) for number in range(count)])
