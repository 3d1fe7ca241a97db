"""From rows to figures: one entry a class, and where identity and names contradict each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DECISIONS = Path(__file__).parents[1] / "identify_resolutions.yaml"


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each class, formula and layout, with the types that it was seen in. What is known of a class in
    one type replaces what is not in another."""
    found: dict[tuple[str, Any, Any], dict[str, Any]] = {}
    for row in rows:
        for one in row["classes"]:
            key = (one["class"], one.get("formula"), one.get("layout"))
            entry = found.setdefault(key, {**one, "types": []})
            entry["types"].append(row["type"])
            entry["named"] = entry["named"] or one["named"]
    known = {name for (name, *_), one in found.items() if one["known"]}
    kept = [one for one in found.values() if one["known"] or one["class"] not in known]
    for one in kept:
        one.pop("type")
    return sorted(kept, key=lambda one: (one["class"], str(one.get("formula"))))


def explained(one: Mapping[str, Any]) -> bool:
    """Whether there is an answer that rests on what was observed."""
    return bool(one["known"]) or "could not be run" not in one["reason"]


def headline(record: Mapping[str, Any]) -> list[str]:
    """The figures."""
    by_class: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in record["classes"]:
        by_class[one["class"]].append(one)
    named = {name: ones for name, ones in by_class.items() if any(one["named"] for one in ones)}
    blocks = {name: ones for name, ones in by_class.items() if name not in named}
    identified = [name for name, ones in named.items() if any(one["known"] for one in ones)]
    told = [name for name, ones in named.items() if any(map(explained, ones))]
    lies = [one for one in record["findings"] if one["verdict"] in ("ignored", "coerced", "contradicted")]
    return [
        f"{len(named)} classes with the name of a feed-forward block: {len(identified)} identified, "
        f"{len(told) - len(identified)} explained, {len(named) - len(told)} neither "
        f"({100 * len(told) / max(1, len(named)):.1f} % identified or explained)",
        f"{len(blocks)} more classes hold a block split over several modules or among other things: "
        f"{sum(any(one['known'] for one in ones) for ones in blocks.values())} identified",
        f"{len(record['findings'])} config entries name an activation; {len(lies)} entries of "
        f"{len({one['type'] for one in lies})} model types are not followed",
    ]


def contradictions(
    record: Mapping[str, Any], decisions: Mapping[str, Mapping[str, str]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """(contradictions nobody has decided, decisions nobody needs)."""
    differing = [one for one in record["classes"] if differs(one)]
    names = {one["class"] for one in differing}
    return [one for one in differing if one["class"] not in decisions], sorted(set(decisions) - names)


def differs(one: Mapping[str, Any]) -> bool:
    """Whether names and sources speak of an activation, or of a gate, that is not what was observed."""
    if not one["known"] or one["family"] == "other":
        return False
    said = {name for name in one["said"] if not name.startswith("?")}
    wrong_activation = bool(said) and one["activation"] not in said and one["activation"] != "linear"
    gated = one["family"] != "dense"
    return wrong_activation or (bool(said) and one["said_gated"] is True and not gated)


def read_decisions() -> dict[str, dict[str, str]]:
    """Who is right where they differ, by class: `right` (identify or names) and `why`."""
    if not DECISIONS.exists():
        return {}
    return yaml.safe_load(DECISIONS.read_text(encoding="utf-8")) or {}
