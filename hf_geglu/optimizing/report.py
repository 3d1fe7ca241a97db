"""What `hf_geglu.optimize` says it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from hf_geglu.ops import Mode

Runs: TypeAlias = Literal["block", "unit", "module"]
"""block: the whole block is one function. unit: ``activation(gate) * value`` is. module: everything is as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteOps:
    """One site and what runs there from now on."""

    path: str
    """Of its block."""
    runs: Runs
    reason: str
    """Why not more; empty where the whole block is one function."""
    packed_bytes: int = 0
    """What a second copy of the block's weights takes from the second call of few tokens on; 0 where none is made."""
    unpacked: str = ""
    """Why none is made, where `decode` was asked for and the whole block is one function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationReport:
    """One entry for every site that was found. Frozen; prints itself."""

    model_class: str
    ops: Mode
    sites: tuple[SiteOps, ...]
    norms: int = 0
    """RMS norms that keep their input alone for the backward."""
    attentions: int = 0
    """Attention modules whose causal calls in bfloat16, on a CPU, go by large products."""
    decode: bool = False
    """Whether packed weights were asked for."""

    @property
    def packed_bytes(self) -> int:
        """What the packed weights of all blocks take, beside the weights themselves."""
        return sum(site.packed_bytes for site in self.sites)

    def count(self, runs: Runs) -> int:
        """How many sites run so."""
        return sum(site.runs == runs for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model_class}, ops={self.ops!r}: {self.count('block')} blocks and {self.count('unit')} units by "
            f"kernels, {self.count('module')} as they were"
        ]
        if self.norms or self.attentions:
            lines.append(f"  {self.norms} norms and {self.attentions} attention modules besides")
        reasons = Counter((site.runs, site.reason) for site in self.sites if site.reason)
        lines += [f"  {count} x {runs}: {reason}" for (runs, reason), count in reasons.items()]
        if self.decode:
            packed = sum(site.packed_bytes > 0 for site in self.sites)
            lines.append(
                f"  decoding: {packed} blocks will keep a packed second copy of their weights, "
                f"{self.packed_bytes / 1e6:,.1f} MB"
            )
            unpacked = Counter(site.unpacked for site in self.sites if site.unpacked)
            lines += [f"  {count} x not packed: {reason}" for reason, count in unpacked.items()]
        return "\n".join(lines)
