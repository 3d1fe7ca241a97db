"""docs/performance.md out of a record: tables beside the targets, and two small plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
SHARE = "share of a copy's speed"
PLOTS = ("performance-time.png", "performance-peak.png")

HEAD = """# Performance

What a GeGLU block and a training step cost, beside plain Transformers ("eager HF") and beside the bare matrix products
of the block. Ratios only, medians of rounds in which every side has its turn; each measurement in a process of its own,
with the same allocator settings for all: `MALLOC_MMAP_MAX_=0` and a large `MALLOC_TRIM_THRESHOLD_` for times, the C
library's own for peaks. At one thread the CPU time counts, at two the clock. A unit is tokens x intermediate elements.
The error is that against float64 over that of eager HF in the same type, the largest over output and gradients: 2 would
be allowed.

Made by `python -m benchmarks.speed` ({device}; torch {torch}, transformers {transformers}).
"""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _block(row: Mapping[str, Any]) -> str:
    kept, x = row["saved units"], row["x units"]
    sides = row["time over eager"]
    quick = row.get("time over quick products")
    body = [
        [
            side,
            row["time over products"][side],
            *([] if quick is None else [quick[side]]),
            ratio,
            "" if side not in kept else f"{kept[side] - x:.2f} + x",
            row["error over eager"].get(side, ""),
        ]
        for side, ratio in sides.items()
    ]
    title = (
        f"**{row['hidden']} x {row['width']}, {row['tokens']} tokens, {row['dtype']}, {row['activation']}; "
        f"{row['device']}, {row['threads']} thread{'s' * (row['threads'] > 1)}**"
    )
    over = ["time over products", *([] if quick is None else ["over products by oneDNN"]), "time over eager HF"]
    head = ["side", *over, "kept for backward, units", "error over eager HF"]
    return f"{title}\n\n{table(head, body)}"


def _step(row: Mapping[str, Any]) -> str:
    peak = row.get("peak over eager", {})
    body = [
        [side, ratio, row["saved over eager"][side], peak.get(side, ""), row["error over eager"][side]]
        for side, ratio in row["time over eager"].items()
    ]
    title = (
        f"**{row['shape']['model']} shape, {row['batch'][0]} x {row['batch'][1]} tokens; "
        f"{row['device']}, {row['threads']} thread{'s' * (row['threads'] > 1)}**"
    )
    head = ["side", "time of a step", "kept for backward", "peak, activations and gradients", "error"]
    return f"{title}\n\n{table(head, body)}"


def _decode(row: Mapping[str, Any]) -> str:
    times, errors = row["time over eager"], row["error over eager"]
    sides = list(next(iter(times.values())))
    head = ["side", *(f"{tokens} token{'s' * (int(tokens) > 1)}" for tokens in times), "largest error over eager HF"]
    body = [[side, *(own[side] for own in times.values()), max(own[side] for own in errors.values())] for side in sides]
    return f"**{row['hidden']} x {row['width']}, {row['dtype']}, {row['activation']}**\n\n{table(head, body)}"


def _generation(row: Mapping[str, Any]) -> list[object]:
    work = f"{row['prompt']} + {row['new']}"
    times, held = row["time over eager"].values(), f"+ {row['packed bytes over weights']:.0%}"
    return [f"{row['shape']['model']} shape", row["dtype"], work, *times, f"{row['same tokens']:.0%}", held]


def page(record: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [HEAD.format(**record)]
    if "blocks" in record:
        parts += [
            "## One block, forward and backward",
            "Targets: 1.03 over the products in float32, 1.05 in bfloat16 from 1,024 tokens on and never above eager; "
            "2 + x units kept, x where tiled. Products are torch's own; where oneDNN multiplies float32 much more "
            "quickly than the library that torch takes for it, our blocks use it, and stand beside both.",
            *[_block(row) for row in record["blocks"]],
        ]
    if "unit" in record:
        head = ["tokens x width", "dtype", "activation", "device", "forward", "backward"]
        rows = [
            [
                f"{row['tokens']} x {row['width']}",
                row["dtype"],
                row["activation"],
                f"{row['device']}, {row['threads']} thread{'s' * (row['threads'] > 1)}",
                *(f"{row[SHARE][name]:.0%}" for name in ("forward", "backward")),
            ]
            for row in record["unit"]
        ]
        parts += [
            "The unit alone: bytes read and written in a second, over those of a copy of one tensor (target on an H200 "
            "85%).",
            table(head, rows),
        ]
    if "peak units" in record:
        peak = record["peak units"]
        parts += [
            f"Peak of one block ({peak['hidden']} x {peak['width']}, {peak['tokens']} tokens, {peak['dtype']}), units, "
            "of the second step of a process of its own, where nobody holds the answer during the backward; target for "
            "tiled: 1.6.",
            table(["side", "peak"], list(peak["sides"].items())),
        ]
    if "steps" in record:
        parts += [
            "## One training step, bfloat16, AdamW",
            "Everything over eager HF. Targets for SmolLM2-135M: time 0.85, peak 0.45. Fused AdamW and transformers' "
            "choice of attention on all sides.",
            *[f"![{name}]({plot})" for name, plot in zip(("Time of a step", "Peak of a step"), PLOTS, strict=True)],
            *[_step(row) for row in record["steps"]],
        ]
    if "decode" in record:
        parts += [
            "## Few tokens, no gradients",
            "A row of blocks that does not fit into the caches, 1 thread; time over eager HF, by tokens in a call. "
            '"ours, decode" is `optimize(model, decode=True)`: a second, packed copy of the weights.',
            *[_decode(row) for row in record["decode"]],
            "Greedy generation with a cache, time over eager HF:",
            table(
                ["model", "dtype", "prompt + new", *record["generate"][0]["time over eager"], "same tokens", "memory"],
                [_generation(row) for row in record["generate"]],
            ),
            "Memory is what the packed copies take, over the weights of the model.",
        ]
    if "rest" in record:
        rest = record["rest"]
        parts += [
            "## Everything else",
            "CPU seconds of `import hf_geglu` in a fresh process (target 0.3): "
            + ", ".join(f"{seconds:.3f} {name}" for name, seconds in rest["import_seconds"].items())
            + ".",
            f"A Llama of {rest['conversion']['parameters'] / 1e9:.2f} billion parameters in bfloat16, CPU time over "
            "one pass that sums all weights:",
            table(["call", "over reading once"], list(rest["conversion"]["over reading once"].items())),
        ]
    return "\n\n".join(parts) + "\n"


def plot(record: Mapping[str, Any], folder: Path) -> None:
    """Bars of time and peak of a step, over eager HF."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in record["steps"] if row["device"] == "cpu"]
    for key, name in (("time over eager", PLOTS[0]), ("peak over eager", PLOTS[1])):
        shown = rows if key.startswith("time") else [row for row in rows if row["threads"] == 1]
        figure, axes = pyplot.subplots(figsize=(6.0, 2.6), dpi=80)
        sides = list(shown[0][key])
        height = 0.8 / len(sides)
        for n, side in enumerate(sides):
            at = [i - n * height for i in range(len(shown))]
            axes.barh(at, [row[key][side] for row in shown], height * 0.9, label=side)
        labels = [f"{row['shape']['model']}, {row['threads']} thread{'s' * (row['threads'] > 1)}" for row in shown]
        axes.set_yticks([i - height * (len(sides) - 1) / 2 for i in range(len(shown))], labels)
        axes.axvline(1.0, color="black", linewidth=0.6)
        axes.set_xlabel(key.replace("eager", "eager HF"))
        axes.legend(fontsize=7, loc="lower right")
        figure.tight_layout()
        figure.savefig(folder / name, metadata={"Software": None})
        pyplot.close(figure)


def render(record: Mapping[str, Any], folder: Path = DOCS) -> None:
    """Write the page and its plots."""
    if record.get("steps"):
        plot(record, folder)
    (folder / "performance.md").write_text(page(record), encoding="utf-8")
