"""Narrows a model to several widths, stage by stage, from one look at the original; one row for each result.

CPU seconds of a row are those of the look and of its own stages, of this process, with one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from benchmarks.records import RESULTS, write
from hf_geglu.calibration import CalibrationData
from hf_geglu.inputs import Inputs
from hf_geglu.narrowing.pipeline import narrow, study
from hf_geglu.narrowing.settings import STAGES, NarrowSettings, Stage
from hf_geglu.planning import make_plan

Row = dict[str, Any]
WIDTHS = {"2/3": 2 / 3, "3/4": 3 / 4, "5/6": 5 / 6}
BLOCKS = {"gated": True, "dense": False}
"""With and without a value branch; without is the control."""
KEY = ("model", "width", "stage", "value_branch", "seed")


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
    plans = {name: make_plan(model, width=WIDTHS[name]) for name in widths}
    smallest = min(plan.converted[0].width for plan in plans.values())
    first = time.process_time()
    everything = replace(settings, statistics_tokens=CalibrationData(batches=tuple(given)).tokens)
    studied = study(model, plans[widths[0]], given, smallest=smallest, settings=everything, progress=said(first))
    studied = replace(studied, all_batches=healing)
    learnt = time.process_time() - first
    runs: list[Stage] = [*(["closed"] if "closed" in stages else []), *_furthest(stages)]
    for name, plan in plans.items():
        for block in blocks:
            for stage in runs:
                since = time.process_time() - learnt
                found: list[Row] = []

                def reached(at: Stage, student: nn.Module, since: float = since, found: list[Row] = found) -> None:
                    spent = time.process_time() - since
                    found.append({"stage": at, "cpu_seconds": round(spent), **measure(student)})

                narrow(
                    studied,
                    plan,
                    width=plan.converted[0].width,
                    settings=replace(settings, stage=stage),
                    value_branch=BLOCKS[block],
                    progress=said(since),
                    reached=reached,
                )
                for row in found:
                    yield {
                        "width": name,
                        "neurons": plan.converted[0].width,
                        "value_branch": BLOCKS[block],
                        "seed": settings.seed,
                        "tokens": studied.tokens,
                        "healing_tokens": _healing(healing, settings) if row["stage"] == "heal" else 0,
                        **row,
                    }


def record(name: str, head: Mapping[str, Any], row: Row) -> None:
    """Add a row to a record, or replace it there."""
    print(row, flush=True)
    path = RESULTS / f"{name}.json"
    held = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    held = [old for old in held if any(old[key] != row[key] for key in KEY)] + [row]
    held.sort(key=lambda each: (*_place(each), each["seed"]))
    write(name, {**head, "rows": held})


def _place(row: Row) -> tuple[str, str, int, bool]:
    return row["model"], row["width"], STAGES.index(row["stage"]), not row["value_branch"]


def _furthest(stages: Sequence[Stage]) -> list[Stage]:
    trained = [stage for stage in stages if stage != "closed"]
    return [max(trained, key=STAGES.index)] if trained else []


def _healing(batches: Sequence[Inputs], settings: NarrowSettings) -> int:
    return round(settings.heal.passes * CalibrationData(batches=tuple(batches)).tokens)


def said(start: float) -> Callable[[str], None]:
    """Prints lines with the CPU seconds since."""
    return lambda line: print(f"  {line} ({time.process_time() - start:.0f} CPU s)", flush=True)
