"""Narrows a model to several widths, stage by stage, from one look at the original; one row for each result.

CPU seconds of a row are those of the look and of its own stages, of this process, with one thread.

Controls go through the same: `dense` has no value branch, for a model that had none; `swiglu` keeps the activation of
one that was gated by SiLU.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from benchmarks.records import RESULTS, write
from hf_geglu.calibration import CalibrationData
from hf_geglu.inputs import Inputs
from hf_geglu.narrowing.pipeline import Narrower, narrow, study
from hf_geglu.narrowing.settings import STAGES, NarrowSettings, Stage
from hf_geglu.plan import Plan
from hf_geglu.planning import make_plan

Row = dict[str, Any]
WIDTHS = {"2/3": 2 / 3, "3/4": 3 / 4, "5/6": 5 / 6}
BLOCKS = {"gated": ("geglu", True), "dense": ("geglu", False), "swiglu": ("swiglu", True)}
"""Variant, and whether the value branch learns. The first is what is made, the others are controls."""
KEY = ("model", "width", "stage", "block", "seed")


def rows(
    model: nn.Module,
    given: Sequence[Inputs],
    healing: Sequence[Inputs],
    *,
    widths: Sequence[str],
    stages: Sequence[Stage],
    blocks: Sequence[str],
    settings: NarrowSettings,
    measure: Callable[[nn.Module], Row],
) -> Iterator[Row]:
    """Narrow and measure.

    Args:
        model: the original; not changed.
        given: calibration data; neurons are chosen and blocks fitted on all of it.
        healing: what healing trains on.
        widths: some of `WIDTHS`.
        stages: to be reached. Healing starts where the local fit ended, so it gives that row too.
        blocks: some of `BLOCKS`.
        settings: all but the stage.
        measure: takes the narrow model, returns figures.
    """
    for variant in dict.fromkeys(BLOCKS[block][0] for block in blocks):
        alike = [block for block in blocks if BLOCKS[block][0] == variant]
        plans = {name: make_plan(model, variant=variant, width=WIDTHS[name]) for name in widths}
        smallest = min(plan.converted[0].width for plan in plans.values())
        first = time.process_time()
        everything = replace(settings, statistics_tokens=CalibrationData(batches=tuple(given)).tokens)
        studied = study(model, plans[widths[0]], given, smallest=smallest, settings=everything, progress=said(first))
        studied = replace(studied, all_batches=healing)
        learnt = time.process_time() - first
        for (name, plan), block, stage in itertools.product(plans.items(), alike, _runs(stages)):
            chosen = replace(settings, stage=stage)
            for row in _run(studied, plan, block, chosen, measure=measure, since=time.process_time() - learnt):
                yield {
                    "width": name,
                    "neurons": plan.converted[0].width,
                    "block": block,
                    "seed": settings.seed,
                    "tokens": studied.tokens,
                    "healing_tokens": _healing(healing, settings) if row["stage"] == "heal" else 0,
                    **row,
                }


def _run(
    studied: Narrower,
    plan: Plan,
    block: str,
    settings: NarrowSettings,
    *,
    measure: Callable[[nn.Module], Row],
    since: float,
) -> list[Row]:
    """One narrow model; a row for each stage that it was seen at. `since` is when its CPU seconds began."""
    found: list[Row] = []
    measured = 0.0

    def reached(at: Stage, student: nn.Module) -> None:
        nonlocal measured
        begun = time.process_time()
        found.append({"stage": at, "cpu_seconds": round(begun - since - measured), **measure(student)})
        measured += time.process_time() - begun

    width = plan.converted[0].width
    value_branch = BLOCKS[block][1]
    narrow(
        studied,
        plan,
        width=width,
        settings=settings,
        value_branch=value_branch,
        progress=said(since),
        reached=reached,
    )
    return found


def record(name: str, head: Mapping[str, Any], row: Row) -> None:
    """Add a row to a record, or replace it there."""
    print(row, flush=True)
    path = RESULTS / f"{name}.json"
    held = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    held = [old for old in held if any(old[key] != row[key] for key in KEY)] + [row]
    held.sort(key=lambda each: (*_place(each), each["seed"]))
    write(name, {**head, "rows": held})


def _place(row: Row) -> tuple[str, str, int, int]:
    return row["model"], row["width"], STAGES.index(row["stage"]), list(BLOCKS).index(row["block"])


def _runs(stages: Sequence[Stage]) -> list[Stage]:
    """The closed form by itself, and one run to the furthest of the others, which passes through them."""
    trained = [stage for stage in stages if stage != "closed"]
    return [*(["closed"] if "closed" in stages else []), *([max(trained, key=STAGES.index)] if trained else [])]  # type: ignore[list-item]


def _healing(batches: Sequence[Inputs], settings: NarrowSettings) -> int:
    return round(settings.heal.passes * CalibrationData(batches=tuple(batches)).tokens)


def said(start: float) -> Callable[[str], None]:
    """Prints lines with the CPU seconds since."""
    return lambda line: print(f"  {line} ({time.process_time() - start:.0f} CPU s)", flush=True)
