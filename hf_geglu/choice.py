"""What was fitted to a model's activations and chosen for a site, as far as a plan can hold it: no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TABLE = "table"
"""The name of the conversion that needs no data: the row of `conversions.SCALINGS`, the same for every neuron."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRecord:
    """What was chosen for one block on calibration data. The numbers that were fitted travel beside the plan.

    Attributes:
        method: the name of the conversion that was chosen, such as "per neuron".
        error: RMS of the difference of the block's output relative to that of the output, on held-out calibration data.
            No bound over all inputs: what was measured. None before there was anything to measure on.
        alternatives: the same for the conversions that were not chosen, by name.
        reason: why this one, in a sentence.
        width: F after the conversion; None where the block keeps its neurons.
    """

    method: str
    error: float | None = None
    alternatives: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    width: int | None = None

    @property
    def fitted(self) -> bool:
        """Whether there are tensors beside the plan."""
        return self.method != TABLE

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> FitRecord | None:
        """What `dataclasses.asdict` made."""
        return None if data is None else cls(**data)

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.method}: lossy, how much only calibration data can tell"
        return f"{self.method}, measured relative error {self.error:.1e}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """The data that a plan's fits were made on.

    Attributes:
        data: its name, as a reader knows it; None for batches without one.
        fingerprint: SHA-256 of the inputs in order.
        tokens: that the fits saw.
        held_out_tokens: that chose between them.
        seed: of the sampled labels behind the gradients.
        settings: what else the result depends on.
    """

    data: str | None = None
    fingerprint: str
    tokens: int
    held_out_tokens: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> CalibrationRecord | None:
        """What `dataclasses.asdict` made."""
        return None if data is None else cls(**data)

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens of {self.data or 'the data given'} (SHA-256 {self.fingerprint[:12]}...), "
            f"chosen on {self.held_out_tokens:,} others"
        )
