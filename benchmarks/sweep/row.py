"""What is recorded of one model type. JSON types only, so that a row is a line of a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Row:
    """One model type. Filled from the top down; where a stage fails, what follows stays as it is here."""

    type: str
    model_class: str = ""
    not_built: str = ""
    """Why there is no model, or no model with weights."""
    shrinking: str = ""
    device: str = ""
    parameters: int = 0

    sites: list[dict[str, Any]] = field(default_factory=list)
    """up, block_class, kind, layout, activation, swappable (an attribute holds the activation)."""
    rejected: list[list[str]] = field(default_factory=list)
    """[path, class, reason]"""
    with_inputs: bool = False
    """Whether that is what was found with the inputs of the whole model, since without them a place was undecided."""
    find_error: str = ""
    second_opinion: bool = False
    """Whether the whole model ran, so that its autograd graph says where the blocks are (see `benchmarks.opinions`)."""
    looked_into: list[str] = field(default_factory=list)
    """Classes whose projections it has all seen at work."""
    comparison: dict[str, Any] = field(default_factory=dict)
    """The second opinion in full, for `benchmarks.crosscheck`."""
    disagreements: list[dict[str, str]] = field(default_factory=list)
    """Where it says otherwise: block_class, opinion, down, finder, graph."""

    tier: str = ""
    tier_reason: str = ""
    exact: bool | None = None
    refused: list[list[str]] = field(default_factory=list)
    """[path of a site that is found and cannot be converted, reason]"""
    plan_error: str = ""

    converted: int = 0
    kept: int = 0
    """Sites that were what was asked for already."""
    convert_error: str = ""
    not_run: str = ""
    """Why the whole model was not run."""
    dtype: str = ""
    """What the whole model was compared in: float64, or float32 where it computes in float32 whatever it is told."""
    max_abs: float | None = None
    max_rel: float | None = None
    """Largest difference of any output to the original's, and relative to the largest output."""
    site_error: float | None = None
    """Largest difference of a neuron in float64, over all sites."""
    site_bound: float | None = None
    """What the plan stated for it; 0 for an exact one."""
    values: int = 0
    """Value branches."""
    values_reached: int = 0
    values_alive: int = 0
    """Those that the inputs reach, and those that receive gradient."""
    loss: list[float] = field(default_factory=list)
    """[before, after] one training step."""
    step_error: str = ""
    reverted: bool | None = None
    """Whether revert gave back the same weights and outputs, bit for bit."""

    save_error: str = ""
    reads: list[dict[str, Any]] = field(default_factory=list)
    """One for each way of loading: what (all, first or text), way, class, difference, weights, missing..., or error."""

    seconds: dict[str, float] = field(default_factory=dict)
    crash: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)
