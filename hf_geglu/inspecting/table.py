"""The report for the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from hf_geglu.inspecting.report import GateReport, SiteGates

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("|Wv|/|Wg|", "value_over_gate", ".3f"),
    ("Wv learned", "learned", ".3f"),
    ("bv off start", "constant", ".3f"),
    ("Wg moved", "moved_gate", ".3f"),
    ("Wv moved", "moved_value", ".3f"),
    ("closed", "closed", ".1%"),
    ("dead", "dead", "d"),
    ("duplicates", "duplicates", "d"),
    ("lost, constant value", "value_share", ".1%"),
    ("lost, constant gate", "gate_share", ".1%"),
)
"""Title, field of `SiteGates`, format. A column that no block has is left out."""

_LEGEND = {
    "learned": "Wv learned: |Wv - start| / |Wg|, the start being where the conversion put it",
    "constant": "bv off start: root mean square of bv / start - 1",
    "moved_gate": "moved: |W - before| / |before|",
    "closed": "closed: share of gates with |f(z)| < 1/256; dead: closed at every token",
    "duplicates": "duplicates: neurons whose output correlates by 0.95 or more (in size) with another one's",
    "value_share": "lost, constant value (gate): variance of what the block's output loses when every value (gate) is "
    "replaced by its mean, over the variance of the output",
}


def tables(report: GateReport) -> Iterator[Any]:
    """What `console.print` takes: a table of blocks, its legend, and what was not measured."""
    pairs = _pairs(report)
    columns = [entry for entry in _COLUMNS if any(_has(each, entry[1]) for pair in pairs for each in pair if each)]
    beside = ", before -> now" if report.before is not None else ""
    text = f"{report.tokens:,} tokens" if report.tokens else "weights alone"
    # what all blocks have in common is said once, above
    facts: dict[str, Callable[[SiteGates], str]] = {"block": _pattern, "gate": _gate, "neurons": _neurons}
    shared = {name: {fact(site) for site in report.sites} for name, fact in facts.items()}
    common = [f"{name} {next(iter(found))}" for name, found in shared.items() if len(found) == 1]
    own = {name: fact for name, fact in facts.items() if len(shared[name]) > 1}
    title = f"{report.model_class}, {len(report.sites)} FFN blocks, {text}{beside}"
    table = Table(title="\n".join([title, *common]), title_justify="left")
    table.add_column("layer", justify="right")
    for name in own:
        table.add_column(name, overflow="fold")
    for column, _, _ in columns:
        table.add_column(column, justify="right")
    for old, site in pairs:
        cells = [_beside(old, site, name, form) for _, name, form in columns]
        told = [fact(site) for fact in own.values()]
        table.add_row("" if site.layer is None else str(site.layer), *told, *cells)
    yield table
    for name, line in _LEGEND.items():
        if any(entry[1] == name for entry in columns):
            yield Text(line, style="dim")
    for reason, paths in _reasons(report).items():
        yield Text(f"not measured at {len(paths)} blocks ({paths[0]}...): {reason}", style="yellow")
    if report.note:
        yield Text(report.note, style="yellow")


def _pattern(site: SiteGates) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", site.path)


def _neurons(site: SiteGates) -> str:
    return f"{site.width:,}"


def _gate(site: SiteGates) -> str:
    return f"{site.activation}, dense" if site.layout == "dense" else site.activation


def _pairs(report: GateReport) -> list[tuple[SiteGates | None, SiteGates]]:
    if report.before is None:
        return [(None, site) for site in report.sites]
    return list(zip(report.before.sites, report.sites, strict=True))


def _has(site: SiteGates, name: str) -> bool:
    return getattr(site, name) is not None


def _beside(old: SiteGates | None, site: SiteGates, name: str, form: str) -> str:
    now = _shown(getattr(site, name), form)
    if old is None or name.startswith("moved"):
        return now
    then = _shown(getattr(old, name), form)
    return f"{then} -> {now}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _reasons(report: GateReport) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site in report.sites:
        for reason in site.reasons:
            found.setdefault(reason, []).append(site.path)
    return found
