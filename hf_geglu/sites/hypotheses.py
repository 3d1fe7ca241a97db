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


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    branches: Branches
    name: str
    activation: Elementwise
    offset: float
    limit: float | None

    def predict(self, gate: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
        activated = self.activation(gate)
        return activated if value is None else activated * (value + self.offset)

    def fit(self, error: float) -> Fit:
        one = self.branches
        return Fit(one.layout, self.name, one.gate_half, one.gate_source, self.offset, error, self.limit)


class Hypotheses:
    """Everything that a block with these projections might compute: predicted once, held against any tensor."""

    def __init__(self, sources_NK: list[torch.Tensor], width: int, limits: Collection[float] = ()) -> None:
        """For a block of `width` neurons; gated ones are also tried with their branches clamped at each of the
        `limits`, where nothing else holds."""
        self._plain = list(_hypotheses(sources_NK, width, None))
        gated = bool(self._plain) and self._plain[0].branches.layout != "dense"
        self._clamped = [one for limit in limits if gated for one in _hypotheses(sources_NK, width, limit)]
        self._sampled: list[torch.Tensor] = []

    def fit(self, z_NF: torch.Tensor) -> list[Fit]:
        """Every formula with its error, the best first; empty where the shapes allow none."""
        if not self._plain or self._plain[0].branches.gate.shape != z_NF.shape:
            return []
        fits: list[Fit] = []
        for stage, hypotheses in enumerate((self._plain, self._clamped)):
            if hypotheses and not any(fit.holds for fit in fits):
                if stage == len(self._sampled):
                    self._sampled.append(_predicted(hypotheses, z_NF.numel()))
                fits += _measured(hypotheses, self._sampled[stage], z_NF)
        return sorted(fits, key=lambda one: one.error)


def _hypotheses(sources_NK: list[torch.Tensor], width: int, limit: float | None) -> Iterator[_Hypothesis]:
    for branches in readings(sources_NK, width):
        for name, activation in candidates():
            for offset in (0.0,) if branches.value is None else (0.0, 1.0):
                # bilinear: either branch may be called the gate
                again = name == "linear" and not offset and (branches.gate_source == 1 or branches.gate_half == "last")
                if not again:
                    yield _Hypothesis(branches.clamped(limit), name, activation, offset, limit)


def _step(numel: int) -> int:
    return max(1, numel // SAMPLE)


def _predicted(hypotheses: list[_Hypothesis], numel: int) -> torch.Tensor:
    """(H, S): every hypothesis at every S-th place."""
    step = _step(numel)
    sampled = (
        one.predict(*(None if t is None else t.reshape(-1)[::step] for t in (one.branches.gate, one.branches.value)))  # type: ignore[arg-type]
        for one in hypotheses
    )
    return torch.stack(list(sampled))


def _measured(hypotheses: list[_Hypothesis], sampled_HS: torch.Tensor, z_NF: torch.Tensor) -> list[Fit]:
    step = _step(z_NF.numel())
    errors = _errors(sampled_HS, z_NF.reshape(-1)[::step]).tolist()
    fits = []
    for one, error in zip(hypotheses, errors, strict=True):
        if error < TOLERANCE and step > 1:  # the winner is held against everything
            error = float(_errors(one.predict(one.branches.gate, one.branches.value).reshape(1, -1), z_NF.reshape(-1)))
        fits.append(one.fit(error))
    return fits


def _errors(predicted_HS: torch.Tensor, z_S: torch.Tensor) -> torch.Tensor:
    return ((predicted_HS - z_S).abs() / (1 + z_S.abs())).amax(dim=1)
