"""What a row means: is anything missing, and what exactly?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.opinions.resolutions import read_resolutions
from benchmarks.sweep.pool import is_identical

Row = Mapping[str, Any]

UNDECIDED = ("could not be run alone", "ran, but nothing that one of its projections")
"""How the finder's rejections begin where it says that it does not know. All others say why a place is no FFN block."""


def is_built(row: Row) -> bool:
    """Whether there is a model with weights."""
    return bool(row.get("model_class")) and not row.get("not_built")


def undecided(row: Row) -> list[str]:
    """Places of which the finder says that it does not know, where nobody else does either: no graph, of this model or
    of another one, has seen all projections of such a module at work (see `settle`)."""
    known = {*row.get("looked_into", ()), *row.get("settled", ())}
    return [
        f"{path or 'the model'} ({name}): {reason}"
        for path, name, reason in row.get("rejected", [])
        if reason.startswith(UNDECIDED) and name not in known
    ]


def settle(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows, each with the classes that the graph of some model has looked into without seeing a block that the
    finder had not: a tower that is not run as a part is often run as a model of its own."""
    rows = list(rows)
    looked_into = {name for row in rows for name in row.get("looked_into", ())}
    doubted = {one["block_class"] for row in rows for one in row.get("disagreements", [])}
    settled = looked_into - doubted
    return [
        {
            **{key: value for key, value in row.items() if key not in ("looked_into", "comparison")},
            "settled": sorted(settled & {entry[1] for entry in row.get("rejected", [])}),
        }
        for row in rows
    ]


def missed(row: Row) -> list[str]:
    """Blocks that the second opinion sees and the finder does not, but for those where the finder was found right."""
    return _disagreements(row, "graph only", "other weights")


def invented(row: Row) -> list[str]:
    """Blocks that only the finder sees, but for those where it was found right."""
    return _disagreements(row, "finder only")


def _disagreements(row: Row, *opinions: str) -> list[str]:
    decided = read_resolutions()
    return [
        f"{one['down']} ({one['block_class']}): {one['finder']}"
        for one in row.get("disagreements", [])
        if one["opinion"] in opinions
        and ((key := (one["block_class"], one["opinion"])) not in decided or decided[key].right != "finder")
    ]


def has_blocks(row: Row) -> bool:
    """Whether it has FFN blocks: found, missed, or possible in a place that is not decided."""
    return bool(row.get("sites") or missed(row) or undecided(row))


def is_converted(row: Row) -> bool:
    """Whether something was converted."""
    return bool(row.get("converted"))


def variants(row: Row) -> list[Mapping[str, Any]]:
    """The loads of variants, without those of the original."""
    return [read for read in row.get("reads", []) if read["what"] != "original"]


def reloads(row: Row) -> bool:
    """Whether every way of loading gave back what was saved, bit for bit."""
    return bool(variants(row)) and all(map(is_identical, variants(row)))


def original_fails(row: Row) -> bool:
    """Whether transformers does not give back the unconverted model either."""
    return any(read["what"] == "original" and not is_identical(read) for read in row.get("reads", []))


def problems(row: Row) -> list[str]:
    """Everything that falls short, each in one sentence; empty for a type that is complete.

    That a whole model was not run is one, although its blocks were verified one by one.
    """
    if row.get("not_built"):
        return [f"not built: {row['not_built']}"]
    found = [f"crashed in {_last_stage(row)}: {row['crash']}"] if row.get("crash") else []
    found += [f"finding: {row['find_error']}"] if row.get("find_error") else []
    found += [f"missed: {reason}" for reason in missed(row)]
    found += [f"no block for the second opinion: {reason}" for reason in invented(row)]
    found += [f"undecided: {reason}" for reason in undecided(row)]
    found += [f"refused: {path}: {reason}" for path, reason in row.get("refused", [])]
    for stage in ("plan", "convert", "step", "save"):
        if row.get(f"{stage}_error"):
            found.append(f"{stage}: {row[f'{stage}_error']}")
    if row.get("exact") and row.get("max_rel") and row["max_rel"] > 1e-13:
        found.append(f"planned to be exact, but differs by {row['max_abs']:.2g} in {row['dtype']}")
    if row.get("values_alive", 0) < row.get("values_reached", 0):
        found.append(f"{row['values_reached'] - row['values_alive']} value branches without gradient")
    if row.get("reverted") is False:
        found.append("revert did not give back the original")
    found += [_read_problem(read, row) for read in variants(row) if not is_identical(read)]
    if row.get("not_run") and row.get("sites"):
        found.append(f"the whole model was not run: {row['not_run']}")
    return found


def _last_stage(row: Row) -> str:
    return next((name for name, seconds in row.get("seconds", {}).items() if seconds == -1.0), "an unknown stage")


def _read_problem(read: Mapping[str, Any], row: Row) -> str:
    said = read.get("error") or ", ".join(
        f"{key} {read[key]}"
        for key in ("difference", "weights", "missing", "unexpected", "mismatched")
        if read.get(key)
    )
    blame = " (the original does not survive it either)" if original_fails(row) else ""
    return f"reload ({read['what']}, {read['way']}): {said}{blame}"


def compact(row: Row) -> dict[str, Any]:
    """The row for the record: equal sites counted instead of listed, and of the rejections those without a decision."""
    sites: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for site in row.get("sites", []):
        sites[tuple(sorted((key, value) for key, value in site.items() if key not in ("up", "count")))] += site.get(
            "count", 1
        )
    kept = {entry[1]: entry for entry in reversed(row.get("rejected", [])) if entry[2].startswith(UNDECIDED)}
    return {
        **row,
        "sites": [{**dict(site), "count": count} for site, count in sites.items()],
        "rejected": list(kept.values()),
        "rejections": row.get("rejections", len(row.get("rejected", []))),
    }
