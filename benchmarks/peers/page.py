"""docs/peers.md out of a record: each case beside its targets. Nothing on the page is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.sides import CONVERTED, PLAIN, SCRIPT, SFT
from benchmarks.speed.render import table

PEAK = "peak bytes beyond the model"
PAGE = Path(__file__).parents[2] / "docs" / "peers.md"

HEAD = """# Beside other training loops

One training step of SmolLM2-135M (real weights, real text) by `hf-geglu finetune clm`, by transformers'
`run_clm_no_trainer.py` and by TRL's SFTTrainer: the same blocks in the same order, AdamW, learning rate, precision and
allocator settings, one thread; every side in a process of its own, in turns. Made by `python -m benchmarks.peers`
(Python {python}, torch {torch}, transformers {transformers}, TRL {trl}, accelerate {accelerate}; the script as of the
release that asks for transformers {asks}, SHA-256 `{sha}`).

- A step lasts from the end of one optimizer step to the end of the next. The first {uncounted} are not counted;
  evaluation and saving come before or after. What a side computes in a step of its own accord stays in it: our log of
  every step and its gradient norm, TRL's entropy and token accuracy.
- Time is the CPU time of the process; the ratio is that of the medians of a round, and what is shown the median over
  the rounds. The clock on the wall is beside it, but the machine was shared.
- Peak is the high-water mark of the process less what it held when the model was loaded: gradients, moments,
  activations, logits. Measured in a run of its own, with the allocator as a user has it. Gradients and moments are the
  same for all sides, 770 MiB in 16 bits and 1,540 in 32: of one block they are half of a peak and more, of four a sixth
  of the peers', and the rest is what loops can differ in.
- Settings are the sides' own defaults but for what would make them incomparable: no gradient clipping (the script has
  none), no checkpointing, no autocast where a line does not say so (TRL has both on by default).
- In float32 our blocks multiply by oneDNN where it is measured to be quicker than the library that torch takes
  (`--ops auto`, [performance.md](performance.md)); the numbers are float32 all the same.
- Targets: not slower than either, 1.1 times their throughput (0.909 of their time) with the converted model; peak at
  most 0.6 of theirs.
"""


def render(record: Mapping[str, Any], page: Path = PAGE) -> Path:
    """Write the page."""
    script = record["script"]
    head = HEAD.format(
        **record, asks=script["asks for transformers"], sha=script["sha256"], uncounted=record["warm"] + 1
    )
    page.write_text("\n".join([head, *map(_section, record["cases"])]), encoding="utf-8")
    return page


def _section(case: Mapping[str, Any]) -> str:
    title = f"## {case['precision']}, {case['batch']} x {case['block']} tokens"
    if "rounds" not in case:
        rows = [[side, *_memory(case, side)] for side in case[PEAK]]
        return (
            "\n\n".join([title, table(["side", "peak over script", "peak over TRL", "peak"], rows), _verdict(case)])
            + "\n"
        )
    rows = [
        [
            side,
            f"{ratio:.3f}",
            f"{case['cpu over TRL'][side]:.3f}",
            f"{case['wall over script'][side]:.2f}",
            *_memory(case, side),
            f"{case['largest difference of losses to the script'][side]:.1g}",
        ]
        for side, ratio in case["cpu over script"].items()
    ]
    heads = ["side", "time over script", "time over TRL", "wall over script", "peak over script", "peak over TRL"]
    heads += ["peak", "losses differ by at most"]
    return "\n\n".join([title, table(heads, rows), _verdict(case)]) + "\n"


def _memory(case: Mapping[str, Any], side: str) -> list[str]:
    if PEAK not in case:
        return ["", "", ""]
    most = case[PEAK]
    return [*(f"{most[side] / most[of]:.3f}" for of in (SCRIPT, SFT)), f"{most[side] / 2**20:,.0f} MiB"]


def _verdict(case: Mapping[str, Any]) -> str:
    """Targets beside figures."""
    said = []
    for side, name, wanted in ((PLAIN, "unconverted", 1.0), (CONVERTED, "converted", 1.1)):
        parts = []
        if "rounds" in case:
            times = [case["cpu over script"][side], case["cpu over TRL"][side]]
            parts.append(f"{1 / times[0]:.2f} and {1 / times[1]:.2f} times the throughput (target {wanted:.1f})")
        if PEAK in case:
            shares = [case[PEAK][side] / case[PEAK][of] for of in (SCRIPT, SFT)]
            parts.append(f"{shares[0]:.2f} and {shares[1]:.2f} of the peak (target 0.6)")
        said.append(f"{name}: {', '.join(parts)}")
    if "rounds" not in case:
        return f"Against the script and TRL, {'; '.join(said)}. Times were not measured{case.get('note', '')}."
    rounds, steps = case["rounds"], case["steps of a run"]
    many = f"{rounds} round{'s' * (rounds > 1)} of {steps} counted steps"
    more = ("" if PEAK in case else "; peaks were not measured") + case.get("note", "")
    return f"Against the script and TRL, {'; '.join(said)}. {many}{more}."
