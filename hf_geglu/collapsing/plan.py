"""The plan of a collapse: which blocks become dense again, which stay and why, and what that changes. No tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from hf_geglu.conversions import Scaling
from hf_geglu.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCollapse:
    """A block that becomes dense again."""

    site: Site
    """The block as it was before it was expanded, and as it will be."""
    scaling: Scaling
    """What was folded in then, and is taken out now."""
    folded: int
    """Neurons whose constant value is another than the conversion's: it goes into the down projection."""
    bound: float
    """Largest relative deviation of a neuron's value from its constant, for any input as far from the mean input as
    the farthest one seen: ``max_n |Wv_n| max_x |x - mean| / |v_n|`` (Cauchy-Schwarz). 0 where Wv = 0: then for all
    inputs."""
    measured: float
    """The same deviation on the inputs themselves."""
    original: bool
    """The packed weights are those of the conversion, bit for bit, and this process has what they were made of."""
    removed: int
    """Parameters that go."""
    fitted: bool = False
    """The conversion was fitted to activations: it is undone, whatever it differed from the original by."""

    @property
    def exact(self) -> bool:
        """Whether the dense block computes what was converted: no value branch has moved with the input."""
        return self.bound == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A converted block that stays as it is, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapsePlan:
    """The decision for a whole model."""

    model_class: str
    tolerance: float
    """Largest relative deviation of a neuron's value that was allowed."""
    sites: tuple[SiteCollapse, ...]
    kept: tuple[Kept, ...]
    total_parameters: int
    """Of the whole model before."""
    tokens: int = 0
    """How many inputs of a block the deviations were measured on; 0 where none was needed."""

    @property
    def exact(self) -> bool:
        """Whether every site is: the difference is rounding (and, of an approximate conversion, its own error)."""
        return all(entry.exact for entry in self.sites)

    @property
    def whole(self) -> bool:
        """Whether no converted block is left: class and config are the base's again."""
        return bool(self.sites) and not self.kept

    @property
    def removed(self) -> int:
        """Parameters that go."""
        return sum(entry.removed for entry in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "exact": self.exact, "whole": self.whole}

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        share = f" within {self.tolerance:g} of each neuron's value" if self.tolerance else ""
        how = (", exactly" if self.exact else ", approximately") if self.sites else ""
        lines = [
            f"{self.model_class}: {len(self.sites)} of {len(self.sites) + len(self.kept)} converted blocks become "
            f"dense again{share}{how}",
            f"  parameters  {self.total_parameters:,} -> {self.total_parameters - self.removed:,}",
        ]
        for entry in self.sites:
            lines.append(f"  {entry.site.up}: {_how(entry)}")
        lines += [f"  {entry.path}: stays, {entry.reason}" for entry in self.kept]
        return "\n".join(lines)


def _how(entry: SiteCollapse) -> str:
    parts = [f"dense {entry.site.activation}, {entry.site.d_in} x {entry.site.width} x {entry.site.d_out}"]
    if entry.original:
        parts.append("the original weights")
    elif entry.exact:
        parts.append("value branch constant")
    else:
        parts.append(f"value branch within {entry.bound:.2g} of a constant (measured {entry.measured:.2g})")
    if entry.folded:
        parts.append(f"{entry.folded} constants go into the down projection")
    return ", ".join(parts)
