"""What is known of a narrow model, as far as a plan can hold it: how far it is from its original, and from which widths
on.

A narrow model is never its original. So the record always says beside its own figures what other widths give, and what
the same treatment gives without a value branch: what training repaired must not be credited to the gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How near the outputs of two models are.

    Attributes:
        cosine: mean cosine of the sentence embeddings.
        neighbours: mean share of each sentence's ten nearest ones that are among its ten nearest in the original.
        kl: KL(original || model), nats a token, where the model has logits.
        delta_nll: mean negative log-likelihood, model minus original, nats a token, where it predicts the next one.
        samples: sentences behind the first two, tokens behind the others.
    """

    cosine: float | None = None
    neighbours: float | None = None
    kl: float | None = None
    delta_nll: float | None = None
    samples: int = 0

    def __str__(self) -> str:
        named = (
            ("cosine", self.cosine, ".4f"),
            ("10-neighbour agreement", self.neighbours, ".3f"),
            ("KL", self.kl, ".4f"),
            ("delta nll", self.delta_nll, "+.4f"),
        )
        return ", ".join(f"{name} {value:{form}}" for name, value, form in named if value is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowPoint:
    """One narrow model.

    Attributes:
        width: neurons of a block.
        stage: how far it was taken: "closed", "local" or "heal"; "exact" at the full width.
        value_branch: whether that learned. False: a dense block of that width, under the same treatment.
        fidelity: on held-out calibration data.
    """

    width: int
    stage: str
    value_branch: bool
    fidelity: Fidelity


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowRecord:
    """A narrowing.

    Attributes:
        old_width: neurons before.
        result: what was made.
        control: the dense block of the same width; None for a model that was gated before, or where it was left out.
        curve: other widths, closed form only, widest last.
        settings: what the result depends on besides the data.
    """

    old_width: int
    result: NarrowPoint
    control: NarrowPoint | None = None
    curve: tuple[NarrowPoint, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> NarrowRecord | None:
        """What `dataclasses.asdict` made."""
        if data is None:
            return None
        return cls(
            **{
                **data,
                "result": _point(data["result"]),
                "control": None if data["control"] is None else _point(data["control"]),
                "curve": tuple(_point(each) for each in data["curve"]),
            }
        )

    def lines(self) -> list[str]:
        """For people."""
        rows = [(f"{self.result.width} neurons, {self.result.stage}", self.result)]
        if self.control is not None:
            rows.append((f"{self.control.width} neurons, {self.control.stage}, dense control", self.control))
        rows += [(f"{each.width} neurons, {each.stage}", each) for each in self.curve]
        return [f"{name}: {each.fidelity}" for name, each in rows]


def _point(data: Mapping[str, Any]) -> NarrowPoint:
    return NarrowPoint(**{**data, "fidelity": Fidelity(**data["fidelity"])})
