"""Which formula makes what enters the down projection out of what the earlier projections said.

Every combination of layout, gate half, activation and value offset predicts the input of the down projection; the
errors of all of them are compared in float64. Nothing here knows of modules: tensors in, fits out.

    N tokens, F neurons, K how much wider than F a packed projection is (2)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch

from hf_geglu.sites.activations import Elementwise, candidates
from hf_geglu.sites.site import GateHalf, Layout

TOLERANCE = 1e-5
"""Largest error of a fit, in units of 1 + |value|. Float64 leaves 1e-12, an activation cast to float32 inside 1e-6;
erf and tanh GELU are 3e-4 apart on this scale, the truncated constants of BLOOM's GELU 1e-8 from the exact ones."""

SAMPLE = 4096
"""How many values are compared to find the winner; the winner is then held against all of them."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One formula and how far it is from what was observed."""

    layout: Layout
    activation: str
    gate_half: GateHalf | None
    gate_source: int
    """For separate projections: which of the two goes through the activation."""
    offset: float
    error: float
    limit: float | None = None
    """Gate clamped from above at that, value from both sides, before anything else is done to them."""

    @property
    def holds(self) -> bool:
        """Whether the formula is what was computed."""
        return self.error < TOLERANCE

    def __str__(self) -> str:
        half = f", gate {self.gate_half}" if self.gate_half else ""
        offset = f", value + {self.offset:g}" if self.offset else ""
        limit = f", clamped at {self.limit:g}" if self.limit is not None else ""
        return f"{self.layout} {self.activation}{half}{offset}{limit} (error {self.error:.1e})"


@dataclass(frozen=True, slots=True)
class Branches:
    """One way to read gate and value off the answers of the projections; `value` is None for a dense block."""

    layout: Layout
    gate_half: GateHalf | None
    gate_source: int
    gate: torch.Tensor
    value: torch.Tensor | None

    def clamped(self, limit: float | None) -> Branches:
        """The same, as a block that clamps reads them."""
        if limit is None or self.value is None:
            return self
        return replace(self, gate=self.gate.clamp(max=limit), value=self.value.clamp(-limit, limit))


def readings(sources_NK: list[torch.Tensor], width: int) -> Iterator[Branches]:
    """Every way to read a block of `width` neurons off one or two projections."""
    if len(sources_NK) == 2:
        first, second = sources_NK
        if first.shape == second.shape and first.shape[-1] == width:
            yield Branches("separate", None, 0, first, second)
            yield Branches("separate", None, 1, second, first)
    elif sources_NK[0].shape[-1] == width:
        yield Branches("dense", None, 0, sources_NK[0], None)
    elif sources_NK[0].shape[-1] == 2 * width:
        left, right = sources_NK[0][..., :width], sources_NK[0][..., width:]
        yield Branches("packed", "first", 0, left, right)
        yield Branches("packed", "last", 0, right, left)
        even, odd = sources_NK[0][..., 0::2], sources_NK[0][..., 1::2]
        yield Branches("interleaved", "first", 0, even, odd)
        yield Branches("interleaved", "last", 0, odd, even)


def fit(z_NF: torch.Tensor, sources_NK: list[torch.Tensor], limits: Collection[float] = ()) -> list[Fit]:
    """Every formula with its error, the best first; empty where the shapes allow none. Where none holds, gated ones are
    also tried with their branches clamped at each of the `limits`."""
    fits = _fits(z_NF, sources_NK, None)
    for limit in limits if fits and not fits[0].holds and fits[0].layout != "dense" else ():
        fits = sorted(_fits(z_NF, sources_NK, limit) + fits, key=lambda one: one.error)
    return fits


def _fits(z_NF: torch.Tensor, sources_NK: list[torch.Tensor], limit: float | None) -> list[Fit]:
    fits = [
        _measured(branches.clamped(limit), name, activation, offset, z_NF, limit)
        for branches in readings(sources_NK, z_NF.shape[-1])
        if branches.gate.shape == z_NF.shape
        for name, activation in candidates()
        for offset in ((0.0,) if branches.value is None else (0.0, 1.0))
        if not (
            branches.gate_source == 1 and name == "linear" and not offset
        )  # bilinear: either may be called the gate
    ]
    fits = [one for one in fits if not (one.activation == "linear" and one.gate_half == "last" and not one.offset)]
    return sorted(fits, key=lambda one: one.error)


def _measured(
    branches: Branches, name: str, activation: Elementwise, offset: float, z_NF: torch.Tensor, limit: float | None
) -> Fit:
    step = max(1, z_NF.numel() // SAMPLE)
    sampled = [t if t is None else t.reshape(-1)[::step] for t in (branches.gate, branches.value, z_NF)]
    error = _error(activation, sampled[0], sampled[1], offset, sampled[2])
    if error < TOLERANCE and step > 1:
        error = _error(activation, branches.gate, branches.value, offset, z_NF)
    return Fit(branches.layout, name, branches.gate_half, branches.gate_source, offset, error, limit)


def _error(
    activation: Elementwise,
    gate: torch.Tensor | None,
    value: torch.Tensor | None,
    offset: float,
    z: torch.Tensor | None,
) -> float:
    assert gate is not None
    assert z is not None
    predicted = activation(gate)
    if value is not None:
        predicted = predicted * (value + offset)
    return float(((predicted - z).abs() / (1 + z.abs())).max())
