"""docs/quality.md, rendered from the records of the parts that have run. Nothing on it is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.narrow_table import causal_section as _narrow_causal
from benchmarks.narrow_table import section as _narrow
from benchmarks.records import RESULTS

PAGE = Path("docs") / "quality.md"
Record = Mapping[str, Any]

HEAD = """# What conversions cost in quality

Rendered by `python -m benchmarks.quality page` from `benchmarks/results/quality_*.json`, which `python -m
benchmarks.quality` measures. Intervals are 95 %, over blocks or sentences. *library* is the documentation of Python's
standard library (texts that were not calibrated on); *prose* is an FAQ that Debian packages (`anarchism`), *manuals*
are those of Debian (`benchmarks/corpora.py`): domains that are calibrated on only where a section says so. The prior
of the fits was chosen while looking at the first two, rank and penalty of the correction on other documents of
prose and on a dictionary of computing; *manuals* were measured on once they stood.
"""


def render(page: Path = PAGE) -> Path:
    """Write the page from the records that there are."""
    parts = [HEAD]
    for name, section in PARTS.items():
        path = RESULTS / f"quality_{name}.json"
        if path.is_file():
            parts.append(section(json.loads(path.read_text(encoding="utf-8"))))
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]]) + "\n"


def shown(figures: Mapping[str, float], digits: int) -> str:
    """Mean and interval."""
    return f"{figures['mean']:.{digits}f} ± {figures['half']:.{digits}f}"


def _causal(record: Record) -> str:
    head = ("start", "domain", "KL", "Δ nll", "top-1 agreement")
    rows = []
    for row in record["rows"]:
        name = row["start"] + (f", seed {row['seed']}" if "seed" in row else "")
        for domain, figures in row["domains"].items():
            rows.append(
                (name, domain, shown(figures["kl"], 5), shown(figures["delta_nll"], 5), shown(figures["top1"], 4))
            )
    calibrated = [row for row in record["rows"] if "seed" in row]
    by_start = {row["start"]: [each for each in calibrated if each["start"] == row["start"]] for row in calibrated}
    notes = [
        f"{row['start'].capitalize()}, seed {row['seed']}: {row['tokens']:,} tokens, "
        f"{row['cpu_seconds']:,.0f} CPU seconds, "
        f"chosen: {', '.join(f'{count} {name}' for name, count in row['chosen'].items())}."
        for row in calibrated
    ]
    source = f"Calibrated on {record['calibration_tokens']:,} tokens of {record['calibrated_on']}."
    spread = ""
    for start, of_start in by_start.items():
        for domain in of_start[0]["domains"] if len(of_start) > 1 else ():
            kls = [row["domains"][domain]["kl"]["mean"] for row in of_start]
            spread += (
                f"{start.capitalize()}, over {len(kls)} seeds, KL on {domain}: {min(kls):.5f} to {max(kls):.5f}.\n"
            )
    text = (
        f"## SwiGLU -> GeGLU: {record['model']} at step 0\n\n"
        f"Held out: {record['blocks']} blocks of {record['block']} tokens of each domain. "
        + (source if calibrated else "")
        + "\n\n"
    )
    if "wide" in record:
        notes += [
            f"Calibrated, seed 0, on {record['wide']['blocks']} blocks of {domain}: KL {shown(figures['kl'], 5)}, "
            f"Δ nll {shown(figures['delta_nll'], 5)}."
            for domain, figures in record["wide"]["domains"].items()
        ]
    lines = "".join(f"{line}\n" for line in filter(None, [spread.strip(), *notes]))
    return f"{text}{table(head, rows)}\n{lines}"


def _mixed(record: Record) -> str:
    head = ("tokens", "seed", "domain", "KL", "Δ nll", "top-1 agreement", "CPU seconds")
    rows = [
        (
            f"{row['tokens']:,}",
            str(row["seed"]),
            domain,
            shown(figures["kl"], 5),
            shown(figures["delta_nll"], 5),
            shown(figures["top1"], 4),
            f"{row['cpu_seconds']:,.0f}",
        )
        for row in record["rows"]
        for domain, figures in row["domains"].items()
    ]
    text = (
        f"## The same, calibrated on text of several domains\n\n{record['model']}, calibrated on equal parts of "
        f"{', '.join(record['calibrated_on'])} (`benchmarks/corpora.py`); none of it is of the domains below. "
        f"Held out: {record['blocks']} blocks of {record['block']} tokens of each. How rank and penalty of the "
        "correction follow the amount of text was chosen on other documents of prose.\n\n"
    )
    return text + table(head, rows)


def _encoder(record: Record) -> str:
    rows = [
        (row["start"], domain, shown(figures["cosine"], 5), shown(figures["neighbours"], 4))
        for row in record["rows"]
        for domain, figures in row["domains"].items()
    ]
    text = f"## Dense GELU: {record['model']}\n\n{record['sentences']} sentences of each domain, in float32.\n\n"
    return text + table(("start", "domain", "cosine to the original", "10-neighbour agreement"), rows)


def _dense(record: Record) -> str:
    rows = [
        (
            row["activation"],
            row["start"],
            domain,
            f"{row['nll'][domain]:.3f}",
            f"{figures['kl']['mean']:.2e}",
            f"{row['relative'][domain]:.1e}",
            f"{figures['delta_nll']['mean']:+.2e}",
        )
        for row in record["rows"]
        for domain, figures in row["domains"].items()
    ]
    text = (
        "## Dense blocks that are no GELU: small models trained on real text\n\n"
        "Trained here, since no pretrained weights with these activations were found in packages: names and\n"
        "descriptions of the 886,323 packages of PyPI and the 226,994 of npm were searched for OPT, T5, NLLB, Marian,\n"
        "CLIP, ViT, GPT-2 and Whisper, Debian's for the same. Those that say they hold weights of transformers hold\n"
        "embedding models (MiniLM), a Whisper and a RoBERTa: GELU all of them, which is exact.\n\n"
        f"GPT-2 of bytes, {record['layers']} layers of width {record['width']}, {record['steps']} steps; "
        f"{record['blocks']} blocks of {record['block']} bytes held out of each domain; nats a byte.\n\n"
    )
    head = ("activation", "start", "domain", "nll of the original", "KL", "relative error of the logits", "Δ nll")
    return text + table(head, rows)


def _recovery(record: Record) -> str:
    text = (
        "## Fine-tuned: converted against control on identical batches\n\n"
        f"{record['model']}, {record['steps']} steps, held-out nll of the prose domain; seeds of the data order: "
        f"{record['seeds']}.\n\n"
    )
    steps = record["rows"][0]["steps"]
    rows = [(row["start"], str(row["seed"]), *(f"{value:.4f}" for value in row["nll"])) for row in record["rows"]]
    return text + table(("start", "seed", *(f"step {step}" for step in steps)), rows) + "\n" + _gaps(record)


def _gaps(record: Record) -> str:
    last: dict[str, dict[int, float]] = {}
    for row in record["rows"]:
        last.setdefault(row["start"], {})[row["seed"]] = row["nll"][-1]
    control = last.get("control", {})
    if len(control) < 2:
        return ""
    spread = max(control.values()) - min(control.values())
    lines = [f"Spread of the control over seeds at the last step: {spread:.4f}."]
    for start, by_seed in last.items():
        gaps = [by_seed[seed] - control[seed] for seed in by_seed if seed in control]
        if start != "control" and gaps:
            lines.append(f"{start} minus control: {', '.join(f'{gap:+.4f}' for gap in gaps)}.")
    return "\n".join(lines) + "\n"


PARTS: dict[str, Callable[[Record], str]] = {
    "causal": _causal,
    "mixed": _mixed,
    "encoder": _encoder,
    "dense": _dense,
    "narrow": _narrow,
    "narrow_causal": _narrow_causal,
    "recovery": _recovery,
}
"""Part -> how its record reads; a record that is not there is left out."""
