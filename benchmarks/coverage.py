"""Every model type of transformers: built small, searched, converted, saved, reloaded elsewhere, and trained one step.

    python -m benchmarks.coverage                       # all; docs/coverage.md, docs/crosscheck.md and their records
    python -m benchmarks.coverage --resume              # goes on where a run was stopped
    python -m benchmarks.coverage --types bert,llama    # some; printed, nothing is written to docs
    python -m benchmarks.coverage --sample              # about 60 that stand for all
    python -m benchmarks.coverage --render              # docs/coverage.md from the rows at hand

`make coverage` installs the packages that some types need, and runs the first of these.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import crosscheck
from benchmarks.records import RESULTS, write
from benchmarks.sweep.pool import Limits, sweep
from benchmarks.sweep.rendering import headline, render
from benchmarks.sweep.sample import SAMPLE
from benchmarks.sweep.verdict import compact, problems, settle

ROWS = Path(__file__).parents[1] / ".cache" / "coverage.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, separated by commas [default: all]")
    parser.add_argument("--sample", action="store_true", help="the sample that the tests take")
    parser.add_argument("--resume", action="store_true", help="keep the rows that a stopped run left")
    parser.add_argument("--render", action="store_true", help="only write docs/coverage.md again")
    parser.add_argument("--processes", type=int, default=2, help="types at a time [default: 2]")
    parser.add_argument("--seconds", type=float, default=120.0, help="longest time for one job [default: 120]")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="address space of one type [default: 8]")
    options = parser.parse_args()
    if options.render:
        PAGE.write_text(render(json.loads((RESULTS / "coverage.json").read_text(encoding="utf-8"))), encoding="utf-8")
        return
    some = bool(options.types or options.sample)
    types = _types(options)
    rows_file = ROWS.with_name("coverage-some.jsonl") if some else ROWS
    rows_file.parent.mkdir(exist_ok=True)
    if not options.resume:
        rows_file.unlink(missing_ok=True)
    start = time.perf_counter()
    before = _seconds(rows_file)
    missing = [name for name in types if name not in {row["type"] for row in _rows(rows_file)}]
    _run(missing, rows_file, Limits(seconds=options.seconds, gigabytes=options.gigabytes), options.processes)
    rows = sorted((row for row in _rows(rows_file) if row["type"] in types), key=lambda row: row["type"])
    seconds = before + time.perf_counter() - start
    rows_file.with_suffix(".seconds").write_text(str(seconds), encoding="utf-8")
    record = {"seconds": round(seconds), "processes": options.processes, "rows": [compact(row) for row in settle(rows)]}
    console = Console()
    for row in rows if some else []:
        console.print(f"{row['type']}: {'; '.join(problems(row)) or 'complete'}", markup=False)
    for line in headline(record):
        console.print(line, markup=False)
    if not some:
        write("coverage", record)
        PAGE.write_text(render(json.loads((RESULTS / "coverage.json").read_text(encoding="utf-8"))), encoding="utf-8")
        crosscheck.publish(crosscheck.from_rows(rows), whole=True)


def _types(options: argparse.Namespace) -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = sorted(CONFIG_MAPPING_NAMES)
    if options.types:
        wanted = options.types.split(",")
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise SystemExit(f"transformers has no model type {', '.join(unknown)}")
        return list(wanted)
    return [name for name in SAMPLE if name in known] if options.sample else known


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _seconds(rows_file: Path) -> float:
    """What the stopped runs took that this one goes on from."""
    kept = rows_file.with_suffix(".seconds")
    return float(kept.read_text(encoding="utf-8")) if kept.exists() and rows_file.exists() else 0.0


def _run(types: list[str], rows_file: Path, limits: Limits, processes: int) -> None:
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("starting", total=len(types))

        def done(row: dict[str, Any]) -> None:
            progress.update(task, advance=1, description=row["type"])

        if types:
            partial = SAMPLE
            sweep(types, rows_file, partial=partial.__contains__, processes=processes, limits=limits, done=done)


if __name__ == "__main__":
    main()
