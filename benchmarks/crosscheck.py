"""Does the finder find what is there? A second opinion from the autograd graph of every model, and every difference
resolved in writing.

    python -m benchmarks.crosscheck                     # all types; fails where a disagreement is not resolved
    python -m benchmarks.crosscheck --types bert,llama

Writes benchmarks/results/crosscheck.json and docs/crosscheck.md. The coverage sweep compares too, and writes the same.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.opinions.comparing import Comparison
from benchmarks.opinions.resolutions import Key, Resolution, read_resolutions, unresolved
from benchmarks.records import write
from benchmarks.sweep.pool import CONVERTING, Limits, Server, deal
from benchmarks.sweep.scrubbing import scrub

PAGE = Path(__file__).parents[1] / "docs" / "crosscheck.md"
MODULES = (*CONVERTING, "benchmarks.opinions.job")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, separated by commas [default: all]")
    parser.add_argument("--processes", type=int, default=2, help="types at a time [default: 2]")
    options = parser.parse_args()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    types = options.types.split(",") if options.types else sorted(CONFIG_MAPPING_NAMES)
    comparisons = _compare(types, options.processes)
    if not publish(comparisons, whole=not options.types):
        sys.exit(1)


def publish(comparisons: list[dict[str, Any]], *, whole: bool) -> bool:
    """Say what differs and, for the `whole` list of types, write the record and the page.

    Returns:
        Whether every difference is decided, and no decision about the whole list is idle.
    """
    resolutions = read_resolutions()
    groups = _groups(comparisons)
    missing, idle = unresolved(groups, resolutions)
    console = Console()
    for line in _totals(comparisons, groups):
        console.print(line, markup=False)
    for key in missing:
        name, first = groups[key][0]
        console.print(
            f"not resolved: {key[0]} ({key[1]}), in {name}: finder: {first['finder']}; graph: {first['graph']}"
        )
    if whole:
        for key in idle:
            console.print(f"no longer needed: {key[0]} ({key[1]})", markup=False)
        write("crosscheck", {"comparisons": comparisons})
        PAGE.write_text(render(comparisons, resolutions), encoding="utf-8")
    return not missing and not (idle and whole)


def from_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons that a coverage sweep has made on its way."""
    return [row.get("comparison") or asdict(Comparison(type=row["type"], skipped=_why_not(row))) for row in rows]


def _why_not(row: Mapping[str, Any]) -> str:
    if row.get("not_built"):
        return f"not built: {row['not_built']}"
    said = f"crashed: {row['crash']}" if row.get("crash") else ""
    return said or f"not run: {row.get('not_run') or row.get('find_error') or 'no row'}"[:300]


def _compare(types: list[str], processes: int) -> list[dict[str, Any]]:
    comparisons: list[dict[str, Any]] = []
    with Progress() as progress:
        task = progress.add_task("comparing", total=len(types))

        def work(name: str, servers: tuple[Server, ...]) -> None:
            answer = servers[0].ask({"type": name})
            if "crash" in answer:
                answer["skipped"] = f"crashed: {answer.pop('crash')}"
            comparisons.append(scrub(answer))
            progress.update(task, advance=1, description=name)

        deal(types, [("benchmarks.opinions.job:compare_type", MODULES)], work, processes=processes, limits=Limits())
    return sorted(comparisons, key=lambda entry: str(entry["type"]))


def _groups(comparisons: list[dict[str, Any]]) -> dict[Key, list[tuple[str, dict[str, Any]]]]:
    """Disagreements by class and opinion: (type, the disagreement)."""
    groups: dict[Key, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for comparison in comparisons:
        for one in comparison.get("disagreements", []):
            groups[one["block_class"], one["opinion"]].append((comparison["type"], one))
    return groups


def _totals(comparisons: list[dict[str, Any]], groups: dict[Key, list[tuple[str, dict[str, Any]]]]) -> list[str]:
    seen = [entry for entry in comparisons if not entry["skipped"]]
    agreed = {name for entry in seen for name in entry["classes"]}
    unseen = {name for entry in seen for name in entry["unreached_classes"]} - agreed - {key[0] for key in groups}
    return [
        f"{len(seen)} of {len(comparisons)} model types have a second opinion",
        f"{sum(entry['agreed'] for entry in seen)} blocks of {len(agreed)} classes: both agree",
        f"{sum(map(len, groups.values()))} blocks of {len({key[0] for key in groups})} classes: they differ",
        f"{sum(entry['unreached'] for entry in seen)} blocks lie where a forward on text or one picture does not go;"
        f" {len(unseen)} of their classes are seen in no other model either",
    ]


def render(comparisons: list[dict[str, Any]], resolutions: dict[Key, Resolution]) -> str:
    """docs/crosscheck.md."""
    groups = _groups(comparisons)
    lines = [
        "# A second opinion on the finder",
        "",
        "Generated by `make crosscheck`; the decisions are in `benchmarks/crosscheck_resolutions.yaml`. The finder runs"
        " single blocks on made-up inputs. The second opinion runs the whole model and reads the autograd graph"
        " backwards: which product with a weight gets its input, through a nonlinearity, from which other products."
        " They share no code.",
        "",
        *(f"- {line}" for line in _totals(comparisons, groups)),
        "",
        "| class | who sees a block | types | who is right | why |",
        "|---|---|---|---|---|",
    ]
    for key, members in sorted(groups.items()):
        decision = resolutions.get(key)
        types = list(dict.fromkeys(name for name, _ in members))
        listed = ", ".join(types[:4]) + (f" and {len(types) - 4} more" if len(types) > 4 else "")
        right, why = (decision.right, decision.why) if decision else ("?", "not resolved")
        lines.append(f"| {key[0]} | {key[1]} | {listed} | {right} | {' '.join(why.split())} |")
    skipped = [(entry["type"], entry["skipped"]) for entry in comparisons if entry["skipped"]]
    lines += ["", "## Without a second opinion", "", *(f"- {name}: {reason}" for name, reason in skipped), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
