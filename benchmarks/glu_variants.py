"""Shazeer's comparison (arXiv:2002.05202, table 1) again, small: which FFN unit learns best at equal parameters?

Eight language models of one shape (Llama's, bias-free) that differ in their FFN blocks only, trained from scratch on
the same batches of real text. Dense blocks have F neurons, gated ones 2F/3, so that all have as many parameters
and of multiplications. Seeds are paired: one seed fixes the data order and every weight outside the blocks.

    python -m benchmarks.glu_variants [--seeds 3] [--steps 500]

Goes on where it was interrupted. Writes benchmarks/results/glu_variants.json and docs/glu_variants.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

from benchmarks.corpora import corpus
from benchmarks.from_scratch import blocks_of, train, word_pieces
from benchmarks.records import RESULTS, write

PAGE = Path(__file__).parents[1] / "docs" / "glu_variants.md"
NAME = "glu_variants"

DOMAINS = ("library", "prose", "manuals", "glosses", "computing")

D, LAYERS, HEADS, WIDTH, VOCABULARY = 192, 4, 3, 768, 4096
BLOCK, BATCH, RATE, WARMUP, FINAL = 128, 16, 3e-3, 50, 0.1
HELD_OUT = 200_000
"""Tokens that are measured on, of held-out documents in random order."""


@dataclass(frozen=True)
class Unit:
    """One row of the table; log-perplexity as published, after 65,536 and 524,288 steps of T5 base."""

    name: str
    activation: str
    gated: bool
    published: tuple[float, float]


UNITS = (
    Unit("ReLU", "relu", False, (1.997, 1.677)),
    Unit("GELU", "gelu", False, (1.983, 1.679)),
    Unit("Swish", "silu", False, (1.994, 1.683)),
    Unit("GLU", "sigmoid", True, (1.982, 1.663)),
    Unit("Bilinear", "linear", True, (1.960, 1.648)),
    Unit("ReGLU", "relu", True, (1.953, 1.645)),
    Unit("GEGLU", "gelu", True, (1.942, 1.633)),
    Unit("SwiGLU", "silu", True, (1.944, 1.636)),
)


class Dense(nn.Module):
    """``W2 f(W1 x)``, the block that the gated ones are compared with."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.up_proj = nn.Linear(D, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, D, bias=False)
        self.activation = ACT2FN[activation]

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x_BTD)))


def build(unit: Unit, seed: int) -> LlamaForCausalLM:
    """The model with that unit; what is outside its blocks depends on the seed alone."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=2 * WIDTH // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=BLOCK,
        hidden_act=unit.activation,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        if not unit.gated:
            layer.mlp = Dense(unit.activation)
        for weight in layer.mlp.parameters():
            nn.init.normal_(weight, std=config.initializer_range, generator=generator)
    return model


def text(vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out blocks, (N, BLOCK) each, of all domains together; documents end with token 0."""
    parts = [corpus(domain) for domain in DOMAINS]
    train_texts, held_out = (
        [document for part in parts for document in getattr(part, side)] for side in ("train", "held_out")
    )
    tokenizer = word_pieces(train_texts, vocabulary)
    for documents in (train_texts, held_out):
        random.Random(0).shuffle(documents)
    return blocks_of(train_texts, tokenizer, BLOCK), blocks_of(held_out, tokenizer, BLOCK)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, held_out_NT: torch.Tensor) -> float:
    """Held-out log-perplexity: nats a token, in float32."""
    model.eval()
    blocks = held_out_NT[: HELD_OUT // BLOCK]
    losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in blocks.split(BATCH)]
    return sum(losses) / len(blocks)


def run(unit: Unit, seed: int, steps: int, train_NT: torch.Tensor, held_out_NT: torch.Tensor) -> dict[str, Any]:
    """One row of the record."""
    model = build(unit, seed)
    blocks = sum(weight.numel() for layer in model.model.layers for weight in layer.mlp.parameters())
    start = time.process_time()
    losses = train(model, train_NT, steps=steps, batch=BATCH, rate=RATE, warmup=WARMUP, final=FINAL, seed=seed)
    return {
        "unit": unit.name,
        "seed": seed,
        "steps": steps,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "ffn_parameters": blocks,
        "train_nll": statistics.fmean(losses[-max(1, steps // 10) :]),
        "nll": evaluate(model, held_out_NT),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, for values without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (one, other)]
    return statistics.correlation(*ranks)


def render(record: dict[str, Any]) -> str:
    """The page; rows are in the order of the published table."""
    rows = record["rows"]
    seeds = sorted({row["seed"] for row in rows})
    found = {unit.name: [row["nll"] for row in rows if row["unit"] == unit.name] for unit in UNITS}
    base = {row["seed"]: row["nll"] for row in rows if row["unit"] == "ReLU"}
    first = rows[0]
    lines = [
        "# The GLU family, trained from scratch",
        "",
        f"Generated by `python -m benchmarks.glu_variants` ({record['device']}, torch {record['torch']}, transformers "
        f"{record['transformers']}). Do not edit.",
        "",
        f"Eight models of {first['parameters']:,} parameters ({first['ffn_parameters']:,} in FFN blocks) each, which "
        f"differ in the unit of their blocks only: {first['steps']:,} steps of {BATCH * BLOCK:,} tokens of real text, "
        f"{len(seeds)} paired seeds. Log-perplexity in nats a token on held-out documents; the last two columns are of "
        "Shazeer 2020 (arXiv:2002.05202, table 1: T5 base, span filling), after 65k and 524k steps.",
        "",
        "| unit | ours, mean | against ReLU, paired (each seed) | published, 65k | 524k |",
        "|---|---|---|---|---|",
    ]
    for unit in UNITS:
        pairs = [row["nll"] - base[row["seed"]] for row in rows if row["unit"] == unit.name]
        each = ", ".join(f"{pair:+.4f}" for pair in pairs)
        lines.append(
            f"| {unit.name} | {statistics.fmean(found[unit.name]):.4f} | {statistics.fmean(pairs):+.4f} ({each}) "
            f"| {unit.published[0]:.3f} | {unit.published[1]:.3f} |"
        )
    means = [statistics.fmean(found[unit.name]) for unit in UNITS]
    spread = statistics.fmean(statistics.stdev(found[unit.name]) for unit in UNITS) if len(seeds) > 1 else math.nan
    early, late = (rank_correlation(means, [unit.published[n] for unit in UNITS]) for n in (0, 1))
    gated = statistics.fmean(mean for mean, unit in zip(means, UNITS, strict=True) if unit.gated)
    dense = statistics.fmean(mean for mean, unit in zip(means, UNITS, strict=True) if not unit.gated)
    lines += [
        "",
        f"Rank correlation (Spearman) with the published order: {early:.2f} (65k), {late:.2f} (524k). Gated against "
        f"dense: {gated - dense:+.4f}. Standard deviation between seeds: {spread:.4f}.",
        "",
        "A difference smaller than the spread between seeds says something only where every pair agrees on its sign.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="[default: 3]")
    parser.add_argument("--steps", type=int, default=500, help=f"of {BATCH * BLOCK} tokens [default: 500]")
    options = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    rows = [row for row in rows if row["steps"] == options.steps and row["seed"] < options.seeds]
    done = {(row["unit"], row["seed"]) for row in rows}
    train_NT, held_out_NT = text()
    about = {"shape": {"hidden": D, "layers": LAYERS, "heads": HEADS, "dense width": WIDTH, "vocabulary": VOCABULARY}}
    about |= {"train_tokens": train_NT.numel(), "held_out_tokens": HELD_OUT, "units": [asdict(unit) for unit in UNITS]}
    with Progress() as progress:
        task = progress.add_task("training", total=len(UNITS) * options.seeds, completed=len(done))
        for seed, unit in itertools.product(range(options.seeds), UNITS):
            if (unit.name, seed) in done:
                continue
            rows.append(run(unit, seed, options.steps, train_NT, held_out_NT))
            write(NAME, {**about, "rows": rows})
            progress.console.print(
                f"{unit.name:8} seed {seed}: {rows[-1]['nll']:.4f}  ({rows[-1]['cpu_seconds']:.0f} s)"
            )
            progress.advance(task)
    PAGE.write_text(render(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
