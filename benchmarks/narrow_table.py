"""The section on fewer neurons of docs/quality.md, from the record that benchmarks/narrow.py writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = """## Fewer neurons: {model}

Lossy by nature; the full width is exact. Calibrated on sentences of {calibrated}; measured on {sentences} held-out
sentences, half of them prose, half of *{other}*, a domain not calibrated on. *closed* chooses neurons and
solves for the down projections, *local* trains every block by itself, *heal* trains the whole model on the original's
outputs. The *dense control* went through the same without a value branch: what it reaches is not the gate's doing.

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


def section(record: Mapping[str, Any]) -> str:
    """Markdown."""
    text = HEAD.format(
        model=record["rows"][0]["model"],
        calibrated=", ".join(record["calibrated_on"]),
        sentences=record["held_out_sentences"],
        other=record["other"],
    )
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_row, record["rows"])]
    return text + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['width']} ({row['neurons']})",
        row["stage"],
        "GeGLU" if row["value_branch"] else "dense control",
        str(row["seed"]),
        f"{row['cosine']:.4f}",
        f"{row['neighbours']:.3f}",
        f"{row['cosine_calibrated']:.4f} / {row['neighbours_calibrated']:.3f}",
        f"{row['cosine_other']:.4f} / {row['neighbours_other']:.3f}",
        f"{row['tokens'] + row['healing_tokens']:,}",
        f"{row['cpu_seconds']:,}",
    )
