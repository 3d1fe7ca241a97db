"""What a whole conversion costs on held-out data, and which sites to leave out where that is more than it may."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_geglu.calibration.data import CalibrationData
from hf_geglu.distance import Outputs, cast, comparison, is_causal, outputs_of, squares
from hf_geglu.errors import ConversionError, PlanError
from hf_geglu.modes import evaluating
from hf_geglu.plan import Plan
from hf_geglu.planning import without
from hf_geglu.sites import FoundSites
from hf_geglu.surgery import Fits, apply, revert


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The converted model against the original on the same batches.

    Attributes:
        kl: KL(original || converted) in nats a token; None for a model without logits over tokens.
        delta_nll: mean negative log-likelihood, converted minus original, in nats a token.
        kl_interval: half the width of a 95 % interval of `kl` over batches; None for a single batch.
        relative: root of the mean squared difference of the outputs relative to that of the outputs.
        tokens: predicted tokens behind `kl`; 0 without.
    """

    kl: float | None
    delta_nll: float | None
    kl_interval: float | None
    relative: float
    tokens: int

    def __str__(self) -> str:
        if self.kl is None:
            return f"outputs differ by {self.relative:.1e} of their size"
        interval = "" if self.kl_interval is None else f" +- {self.kl_interval:.1g}"
        return f"KL {self.kl:.3g}{interval}, nll {self.delta_nll:+.4f} nats a token ({self.tokens:,} tokens)"


class Meter:
    """Adds up what batches show.

    Args:
        causal: whether logits at t predict token t + 1.
    """

    def __init__(self, *, causal: bool) -> None:
        self._causal = causal
        self._kls: list[tuple[float, float, int]] = []
        self._square = self._size = 0.0

    def add(self, before: Outputs, after: Outputs, batch: Mapping[str, Any]) -> None:
        """Take in one batch: the outputs of the original and of the converted model."""
        for name, tensor in before.items():
            square, size = squares(tensor, after[name])
            self._square += square
            self._size += size
        found = comparison(before, after, dtype="", tokens=_labels(batch), causal=self._causal)
        if found.kl is not None and found.delta_nll is not None:
            self._kls.append((found.kl, found.delta_nll, found.tokens))

    @property
    def measured(self) -> Measured:
        """Over all batches."""
        kls = self._kls
        relative = math.sqrt(self._square / max(self._size, 1e-300))
        tokens = sum(count for _, _, count in kls)
        if not tokens:
            return Measured(kl=None, delta_nll=None, kl_interval=None, relative=relative, tokens=0)
        kl = sum(value * count for value, _, count in kls) / tokens
        delta = sum(value * count for _, value, count in kls) / tokens
        interval = None
        if len(kls) > 1:
            variance = sum((value - kl) ** 2 for value, _, _ in kls) / (len(kls) - 1)
            interval = 1.96 * math.sqrt(variance / len(kls))
        return Measured(kl=kl, delta_nll=delta, kl_interval=interval, relative=relative, tokens=tokens)


def measure(model: nn.Module, plan: Plan, fits: Fits, data: CalibrationData) -> Measured:
    """Convert, compare and put back, batch by batch: one model in memory, and the outputs of one batch."""
    meter = Meter(causal=is_causal(model))
    for batch in data.batches:
        with evaluating(model), torch.no_grad():
            inputs = cast(batch, model)
            before = outputs_of(model, inputs)
            apply(model, plan, fits)
            try:
                after = outputs_of(model, inputs)
            finally:
                revert(model)
        meter.add(before, after, batch)
    return meter.measured


def _labels(batch: Mapping[str, Any]) -> torch.Tensor | None:
    ids = batch.get("input_ids")
    return ids if isinstance(ids, torch.Tensor) else None


def within_budget(
    model: nn.Module,
    plan: Plan,
    fits: Fits,
    *,
    measure: Callable[[Plan, Fits], Measured],
    max_kl: float,
    measured: Measured | None,
    costs: Mapping[str, float],
    found: FoundSites,
) -> tuple[Plan, Fits, Measured | None, str]:
    """Leave out as few sites as the budget asks for, those first that are estimated to cost most.

    How many is found by bisection; each count is measured on the whole model.

    Args:
        model: that the plan was made for; its weights are not looked at.
        plan: with the choice for every site.
        fits: that belong to it.
        measure: what a plan with its fits costs.
        max_kl: nats a token.
        measured: what the whole plan costs.
        costs: estimated, of each site.
        found: the sites of the model.

    Raises:
        PlanError: no logits to measure KL on, or not even one site fits the budget.
    """
    if measured is None:
        return plan, fits, measured, ""
    if measured.kl is None:
        raise PlanError(
            "max_kl is a bound in nats a token, and this model gives no logits over tokens; leave it out, or convert "
            "the model with its language-modelling head"
        )
    if measured.kl <= max_kl:
        return plan, fits, measured, f"within max_kl={max_kl:g}: every block is converted"
    order = sorted(costs, key=lambda path: costs[path], reverse=True)
    low, high = 0, len(order)  # leaving out `low` is too few, `high` is enough or all there is
    best: tuple[Plan, Fits, Measured] | None = None
    while high - low > 1 or best is None:
        count = max(1, (low + high) // 2) if high - low > 1 else high
        trial = _without(model, plan, fits, measure, order[:count], costs, found, max_kl)
        if trial is not None and trial[2].kl is not None and trial[2].kl <= max_kl:
            best, high = trial, count
        elif count == high:
            break
        else:
            low = count
    if best is None:
        raise PlanError(
            f"max_kl={max_kl:g} is kept by no conversion of this model: all blocks cost {measured.kl:.3g} nats a "
            "token. Allow more, or calibrate on more data"
        )
    note = f"{high} of {len(plan.converted)} blocks left unconverted, those that cost most, to keep max_kl={max_kl:g}"
    return (*best, note)


def _without(
    model: nn.Module,
    plan: Plan,
    fits: Fits,
    measure: Callable[[Plan, Fits], Measured],
    left: list[str],
    costs: Mapping[str, float],
    found: FoundSites,
    max_kl: float,
) -> tuple[Plan, Fits, Measured] | None:
    reasons = {
        path: f"converted it would cost about {costs[path]:.2g} nats a token, and max_kl={max_kl:g} was exceeded"
        for path in left
    }
    try:
        smaller = without(model, plan, found, reasons)
    except ConversionError:
        return None
    kept = {path: fit for path, fit in fits.items() if path not in reasons}
    return smaller, kept, measure(smaller, kept)
