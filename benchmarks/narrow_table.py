"""The sections on fewer neurons of docs/quality.md, from the records that benchmarks/narrow*.py write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = """## Fewer neurons: {model}

Lossy by nature; the full width is exact. Calibrated on sentences of {calibrated}; measured on {sentences} held-out
sentences, half of them prose, half of *{other}*, a domain not calibrated on. *closed* chooses neurons and
solves for the down projections, *local* trains every block by itself, *heal* trains the whole model on the original's
outputs. {control}

"""
CONTROL = "The *dense control* went through the same without a value branch: what it reaches is not the gate's doing."
SWIGLU = "The *SwiGLU control* lost as many neurons and kept its activation."
OWN = "After *closed* the value branch of what was dense is constant still: that row is its own dense control."

CAUSAL = """## Fewer neurons: causal language models

The same stages; KL and change of the negative log-likelihood in nats a token, against the original, on held-out blocks:
prose (of the domains that the small GPT-2 was trained and calibrated on) and *manuals* (of none). That GPT-2 was not
trained to its end: it does not fill its neurons, so losing a third of them says little about a model that does, as
SmolLM2 shows.
{control}

"""

COLUMNS = (
    "width",
    "stage",
    "block",
    "seed",
    "cosine",
    "10-neighbour agreement",
    "prose",
    "other domain",
    "tokens",
    "CPU s",
)
BLOCKS = {"gated": "GeGLU", "dense": "dense control", "swiglu": "SwiGLU control"}
CAUSAL_COLUMNS = ("model", "width", "stage", "block", "domain", "nll of the original", "Δ nll", "KL", "tokens", "CPU s")


def section(record: Mapping[str, Any]) -> str:
    """Markdown: of the encoder."""
    text = HEAD.format(
        model=record["rows"][0]["model"],
        calibrated=", ".join(record["calibrated_on"]),
        sentences=record["held_out_sentences"],
        other=record["other"],
        control=_control(record),
    )
    return text + _table(COLUMNS, [_row(row) for row in record["rows"]])


def causal_section(record: Mapping[str, Any]) -> str:
    """Markdown: of causal models."""
    lines = [_causal_row(row, domain) for row in record["rows"] for domain in row["domains"]]
    return CAUSAL.format(control=_control(record)) + _table(CAUSAL_COLUMNS, lines)


def _control(record: Mapping[str, Any]) -> str:
    """What is said of controls: of those that are on record."""
    blocks = {row["block"] for row in record["rows"]}
    said = {"dense": CONTROL, "swiglu": SWIGLU}
    return " ".join([*(text for block, text in said.items() if block in blocks), OWN])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['width']} ({row['neurons']})",
        row["stage"],
        BLOCKS[row["block"]],
        str(row["seed"]),
        f"{row['cosine']:.4f}",
        f"{row['neighbours']:.3f}",
        f"{row['cosine_calibrated']:.4f} / {row['neighbours_calibrated']:.3f}",
        f"{row['cosine_other']:.4f} / {row['neighbours_other']:.3f}",
        f"{row['tokens'] + row['healing_tokens']:,}",
        f"{row['cpu_seconds']:,}",
    )


def _causal_row(row: Mapping[str, Any], domain: str) -> tuple[str, ...]:
    figures = row["domains"][domain]
    return (
        row["model"],
        f"{row['width']} ({row['neurons']})",
        row["stage"],
        BLOCKS[row["block"]],
        domain,
        f"{row['nll'][domain]:.3f}",
        f"{figures['delta_nll']['mean']:+.4f} ± {figures['delta_nll']['half']:.4f}",
        f"{figures['kl']['mean']:.4f} ± {figures['kl']['half']:.4f}",
        f"{row['tokens'] + row['healing_tokens']:,}",
        f"{row['cpu_seconds']:,}",
    )
