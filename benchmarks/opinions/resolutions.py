"""What was decided, in writing, where the two opinions differ: benchmarks/crosscheck_resolutions.yaml.

Each entry is a block class, an opinion (finder only, graph only, other weights), who is right (finder, graph) and why.
Where the graph is right, the block counts as missed (or invented) until the finder agrees. A disagreement without an
entry fails the check; so does an entry that no disagreement needs any more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

PATH = Path(__file__).parents[1] / "crosscheck_resolutions.yaml"
OPINIONS = ("finder only", "graph only", "other weights")
RIGHT = ("finder", "graph")

Key = tuple[str, str]
"""(block class, opinion)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """One decision."""

    block_class: str
    opinion: str
    right: str
    why: str

    @property
    def key(self) -> Key:
        """What it is about."""
        return self.block_class, self.opinion


@functools.cache
def read_resolutions(path: Path = PATH) -> dict[Key, Resolution]:
    """All decisions. Raises ValueError for one that is incomplete, unknown or given twice."""
    resolutions: dict[Key, Resolution] = {}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or []:
        try:
            one = Resolution(
                block_class=entry["class"], opinion=entry["opinion"], right=entry["right"], why=entry["why"].strip()
            )
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path.name}: {entry} needs class, opinion, right and why ({error!r})") from error
        if one.opinion not in OPINIONS or one.right not in RIGHT or not one.why:
            raise ValueError(f"{path.name}: {entry}; expected an opinion of {OPINIONS}, right of {RIGHT}, and a reason")
        if one.key in resolutions:
            raise ValueError(f"{path.name}: {one.key} is there twice")
        resolutions[one.key] = one
    return resolutions


def unresolved(disagreements: Iterable[Key], resolutions: Iterable[Key]) -> tuple[list[Key], list[Key]]:
    """(disagreements without a decision, decisions without a disagreement)."""
    seen, decided = set(disagreements), set(resolutions)
    return sorted(seen - decided), sorted(decided - seen)
