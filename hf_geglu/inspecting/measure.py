"""What is kept of one block while text goes through: twice, since shares of variance need the means first.

Legend of suffixes: N tokens of a call, F neurons, O outputs, P pairs.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from hf_geglu.inspecting.listen import Heard
from hf_geglu.inspecting.place import Place
from hf_geglu.inspecting.sketch import Correlations, Histogram, Moments

CLOSED = 2.0**-8
"""A gate is closed where ``|f(z)| < 2^-8`` (times the unit of z, where a conversion scaled it). That is the rounding
step of bfloat16 below 1: what such a gate lets through is lost in the rounding of one that is open by 1. For GELU it is
z < -3.0 (and ``|z| < 0.008``), for SiLU z < -7.6, for ReLU every z < 0.004."""

DUPLICATE = 0.95
"""Two neurons whose outputs correlate by so much (in size) are duplicates: one predicts 90 % of the other's
variance."""

_CANDIDATE = 0.9
"""What the sketch lets pass to be measured; five of its standard errors below `DUPLICATE`."""
_MOST_PAIRS = 4096

_AGREES = 0.02
"""How far f(z) v may be from what reaches the down projection, relative to its size, in any dtype. More means that
something stands between them."""


class FirstPass:
    """Distributions and means."""

    def __init__(self, place: Place) -> None:
        self.place = place
        width = place.site.width
        self.gate, self.open, self.value, self.hidden = Moments(), Moments(), Moments(), Moments()
        self.histogram = Histogram(width, place.unit)
        self.correlations = Correlations(width, seed=zlib.crc32(place.site.up.encode()) % 10_000)
        self.closed_F = torch.zeros(width, dtype=torch.long)
        self.between = False
        """Whether something stands between the unit and the down projection."""

    @property
    def tokens(self) -> int:
        """That went through."""
        return self.gate.count

    def add(self, heard: Heard) -> None:
        """One call."""
        if not len(heard.gate_NF):
            return
        self.gate.add(heard.gate_NF)
        self.open.add(heard.open_NF)
        self.hidden.add(heard.hidden_NF)
        self.histogram.add(heard.gate_NF)
        self.closed_F += (heard.open_NF.abs() < CLOSED * self.place.unit).sum(0).cpu()
        self.correlations.add(heard.hidden_NF)
        unit_NF = heard.open_NF
        if heard.value_NF is not None:
            self.value.add(heard.value_NF)
            unit_NF = unit_NF * heard.value_NF.float()
        away = (unit_NF - heard.hidden_NF.float()).norm()
        self.between = self.between or bool(away > _AGREES * heard.hidden_NF.float().norm())


@dataclass(slots=True, eq=False)
class SecondPass:
    """What is lost with a constant value or a constant gate, and the true correlations of the pairs that look equal."""

    first: FirstPass
    pairs_P2: torch.Tensor
    product_P: torch.Tensor
    output: Moments
    without_value: Moments
    without_gate: Moments

    @classmethod
    def after(cls, first: FirstPass) -> SecondPass:
        """Ready for the same tokens again."""
        pairs = first.correlations.candidates(first.hidden.mean_F, _CANDIDATE, _MOST_PAIRS)
        return cls(first, pairs, torch.zeros(len(pairs), dtype=torch.float64), Moments(), Moments(), Moments())

    def add(self, heard: Heard) -> None:
        """One call."""
        if not len(heard.gate_NF):
            return
        if len(self.pairs_P2):
            away_NF = (heard.hidden_NF.double() - self.first.hidden.mean_F).cpu()
            self.product_P += (away_NF[:, self.pairs_P2[:, 0]] * away_NF[:, self.pairs_P2[:, 1]]).sum(0)
        if heard.value_NF is None or self.first.between:
            return
        output_NO = heard.output_NO.double()
        self.output.add(output_NO)
        value_F, open_F = self.first.value.mean_F, self.first.open.mean_F
        self.without_value.add(output_NO - heard.down((heard.open_NF * value_F).float()).double())
        self.without_gate.add(output_NO - heard.down((heard.value_NF * open_F).float()).double())

    def shares(self) -> tuple[float, float] | None:
        """(of the values, of the gates); None for a dense block, or where something stands between."""
        if not self.output.count:
            return None
        total = self.output.variance_F.sum().clamp_min(1e-300)
        return tuple(  # type: ignore[return-value]
            (part.variance_F.sum() / total).item() for part in (self.without_value, self.without_gate)
        )

    def duplicates(self) -> tuple[int, tuple[tuple[int, int, float], ...]]:
        """(number of neurons that have one, the closest pairs)."""
        if not len(self.pairs_P2):
            return 0, ()
        std_F = self.first.hidden.variance_F.sqrt().cpu()
        size_P = std_F[self.pairs_P2].prod(1) * self.first.tokens
        correlation_P = self.product_P / size_P.clamp_min(1e-300)
        found = (correlation_P.abs() >= DUPLICATE).nonzero().flatten()
        order = found[correlation_P[found].abs().argsort(descending=True, stable=True)]
        closest = tuple(
            (int(self.pairs_P2[at, 0]), int(self.pairs_P2[at, 1]), float(correlation_P[at])) for at in order[:16]
        )
        return len(set(self.pairs_P2[found].flatten().tolist())), closest
