"""Causal language models with fewer neurons: how much likelihood is lost, stage by stage, beside the dense control.

A dense GPT-2, trained here (`benchmarks.small_gpt2`), calibrated on a part of what it was trained on; or SmolLM2-135M,
gated to fewer neurons, calibrated on the same four domains. Measured on held-out essays, and on Debian's manuals, which
neither training here nor calibration saw.

    python -m benchmarks.narrow_causal gpt2 closed heal --blocks gated dense
    python -m benchmarks.narrow_causal smollm2 closed local --blocks gated swiglu

Every run adds its rows to benchmarks/results/quality_narrow_causal.json, or replaces them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import small_gpt2
from benchmarks.corpora import corpus
from benchmarks.narrow_runs import BLOCKS, WIDTHS, Row, record, rows
from benchmarks.quality.measuring import Reference, distances
from hf_geglu.conversions.whitened import FitSettings
from hf_geglu.demo.weights import smollm2_folder
from hf_geglu.narrowing.settings import STAGES, NarrowSettings

MEASURED = ("prose", "manuals")
HELD_OUT = {"gpt2": 60, "smollm2": 24}
"""Blocks of each domain."""
TOKENS = {"gpt2": (40_000, 200_000), "smollm2": (16_000, 16_000)}
"""Of calibration text, and of what healing trains on."""
STEPS = {"gpt2": 500, "smollm2": 100}
"""Of the fit of a block; SmolLM2 has 30, and twelve passes over its text do."""
BATCH = {"gpt2": 2048, "smollm2": 512}
"""Tokens; what a backward of SmolLM2 holds for 1,024 of them took the process to 4.4 GiB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(TOKENS))
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--widths", nargs="+", default=["2/3"], choices=list(WIDTHS), help="shares [default: 2/3]")
    parser.add_argument(
        "--blocks", nargs="+", default=["gated"], choices=list(BLOCKS), help="dense and swiglu are controls"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    name, model, train, held_out = {"gpt2": gpt2, "smollm2": smollm2}[asked.model]()
    block = train.shape[1]
    given: list[Any] = [
        [{"input_ids": part} for part in train[: tokens // block].split(BATCH[asked.model] // block)]
        for tokens in TOKENS[asked.model]
    ]
    reference = {domain: Reference(model, each) for domain, each in held_out.items()}
    nll = {domain: _nll(reference[domain], each) for domain, each in held_out.items()}

    def measure(student: nn.Module) -> Row:
        found = {domain: distances(reference[domain], student, each) for domain, each in held_out.items()}
        return {"nll": nll, "domains": found}

    head = {"measured_on": MEASURED, "blocks": HELD_OUT}
    for row in rows(
        model,
        *given,
        widths=asked.widths,
        stages=asked.stages,
        blocks=asked.blocks,
        settings=NarrowSettings(fit=FitSettings(steps=STEPS[asked.model])),
        measure=measure,
    ):
        record("quality_narrow_causal", head, {"model": name, **row})


def gpt2() -> tuple[str, Any, torch.Tensor, dict[str, torch.Tensor]]:
    """Its name, the model, blocks to calibrate on and blocks to measure on."""
    model, tokenizer = small_gpt2.trained()
    texts = [document for domain in small_gpt2.TRAINED_ON for document in corpus(domain).train]
    held_out = {
        domain: small_gpt2.blocks_of(corpus(domain).held_out, tokenizer)[: HELD_OUT["gpt2"]] for domain in MEASURED
    }
    return "GPT-2, trained here", model, small_gpt2.blocks_of(texts, tokenizer, seed=1), held_out


def smollm2() -> tuple[str, Any, torch.Tensor, dict[str, torch.Tensor]]:
    """The same of SmolLM2-135M."""
    folder = smollm2_folder(progress=print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def blocks(texts: tuple[str, ...], count: int) -> torch.Tensor:
        ids: list[int] = []
        for text in texts:
            if len(ids) >= 256 * count:
                break
            ids += tokenizer(text)["input_ids"]
        return torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)[:count]

    held_out = {domain: blocks(corpus(domain).held_out, HELD_OUT["smollm2"]) for domain in MEASURED}
    parts = [blocks(corpus(domain).train, 16) for domain in small_gpt2.TRAINED_ON]
    return "SmolLM2-135M", model, torch.stack(parts, dim=1).flatten(0, 1), held_out


def _nll(reference: Iterable[torch.Tensor], blocks_NT: torch.Tensor) -> float:
    losses = [-each.gather(1, block[1:, None]).mean().item() for each, block in zip(reference, blocks_NT, strict=True)]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
