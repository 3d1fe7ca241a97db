"""What a collapse did, as measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hf_geglu.collapsing.plan import CollapsePlan
from hf_geglu.distance import Comparison
from hf_geglu.verify import SiteCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapseReport:
    """Frozen; prints itself."""

    plan: CollapsePlan
    """What was decided, with the blocks that stay and why."""
    sites: tuple[SiteCheck, ...]
    """Each block that collapsed, in float64 before and after."""
    comparisons: tuple[Comparison, ...]
    """Whole model, own dtype first. Empty where it was not run, see `note`."""
    note: str = ""

    @property
    def collapsed(self) -> int:
        """How many blocks are dense again."""
        return len(self.plan.sites)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "plan": self.plan.to_dict()}

    def __str__(self) -> str:
        lines = [str(self.plan)]
        if self.sites:
            worst = max(check.max_abs for check in self.sites)
            lines.append(f"  blocks in float64, before and after: largest difference {worst:.3g}")
        lines += [f"  {entry}" for entry in self.comparisons]
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join(lines)
