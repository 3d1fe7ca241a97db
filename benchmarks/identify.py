"""Every feed-forward class of transformers identified, and every config audited.

    python -m benchmarks.identify                       # benchmarks/results/identify.json and docs/identify.md
    python -m benchmarks.identify --types bert,llama    # some; printed
    python -m benchmarks.identify --resume              # goes on where a run was stopped
    python -m benchmarks.identify --render              # docs/identify.md from the record

Fails where an identity and the second opinion (names and sources) contradict each other and nobody has decided who is
right (benchmarks/identify_resolutions.yaml).
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.identification.rendering import render
from benchmarks.identification.tallies import contradictions, headline, merged, read_decisions
from benchmarks.records import RESULTS, write
from benchmarks.sweep.pool import Limits, Server, deal

ROWS = Path(__file__).parents[1] / ".cache" / "identify.jsonl"
LOCK = threading.Lock()
PAGE = Path(__file__).parents[1] / "docs" / "identify.md"
MODULES = (
    "transformers",
    "transformers.modeling_utils",
    "hf_geglu",
    "hf_geglu.identifying.audit",
    "benchmarks.zoo.building",
    "benchmarks.identification.job",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, separated by commas [default: all]")
    parser.add_argument("--processes", type=int, default=2, help="types at a time [default: 2]")
    parser.add_argument("--seconds", type=float, default=120.0, help="longest time for one type [default: 120]")
    parser.add_argument("--audit", choices=("all", "plain"), default="all", help="plain: leave composite configs out")
    parser.add_argument("--resume", action="store_true", help="keep the rows that a stopped run left")
    parser.add_argument("--render", action="store_true", help="only write docs/identify.md again")
    options = parser.parse_args()
    if options.render:
        _page()
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    types = options.types.split(",") if options.types else sorted(CONFIG_MAPPING_NAMES)
    start = time.perf_counter()
    ROWS.parent.mkdir(exist_ok=True)
    if not options.resume:
        ROWS.unlink(missing_ok=True)
    kept = [row for row in _kept() if row["type"] in types]
    done = {row["type"] for row in kept}
    rows = [*kept, *_asked([name for name in types if name not in done], options)]
    rows = sorted(_with_the_rest(rows, options), key=_type)
    record = {
        "seconds": round(time.perf_counter() - start),
        "processes": options.processes,
        "cpu_seconds": round(sum(row.get("cpu", 0) for row in rows)),
        "cpu_seconds_of_audit": round(sum(row.get("audited", 0) for row in rows)),
        "types": [
            {key: row[key] for key in ("type", "skipped", "not_audited", "crash") if row.get(key)} for row in rows
        ],
        "classes": merged(rows),
        "findings": [{"type": row["type"], **one} for row in rows for one in row["findings"]],
    }
    console = Console()
    for line in headline(record):
        console.print(line, markup=False)
    open_ones, idle = contradictions(record, read_decisions())
    for one in open_ones:
        console.print(f"not decided: {one['class']}: {one['formula']}, but names say {one['said']}", markup=False)
    if not options.types:
        for name in idle:
            console.print(f"no longer needed: {name}", markup=False)
        write("identify", record)
        _page()
    if open_ones or (idle and not options.types):
        sys.exit(1)


def _page() -> None:
    record = json.loads((RESULTS / "identify.json").read_text(encoding="utf-8"))
    PAGE.write_text(render(record, read_decisions()), encoding="utf-8")


def _with_the_rest(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Classes that only the models of other types use are looked at there."""
    seen = {one["class"] for row in rows for one in row["classes"]}
    again: set[str] = set()
    for row in rows:
        missing = set(row.get("elsewhere", ())) - seen
        if missing:
            again.add(row["type"])
            seen |= missing
    if not again:
        return rows
    return [row for row in rows if row["type"] not in again] + _asked(sorted(again), options, everything=True)


def _type(row: dict[str, Any]) -> str:
    return str(row["type"])


def _kept() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def _asked(types: list[str], options: argparse.Namespace, *, everything: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        task = progress.add_task("identifying", total=len(types))

        def work(name: str, servers: tuple[Server, ...]) -> None:
            row = {
                "type": name,
                "classes": [],
                "findings": [],
                **servers[0].ask({"type": name, "all": everything, "audit": options.audit}),
            }
            rows.append(row)
            with LOCK, ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            progress.update(task, advance=1, description=name)

        side = ("benchmarks.identification.job:identify_type", MODULES)
        deal(types, [side], work, processes=options.processes, limits=Limits(seconds=options.seconds))
    return rows


if __name__ == "__main__":
    main()
