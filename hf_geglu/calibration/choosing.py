"""Which of a site's conversions is taken, and what the plan then says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_geglu.calibration.data import CalibrationData
from hf_geglu.calibration.lines import EXACT
from hf_geglu.calibration.trial import Trial, best
from hf_geglu.choice import TABLE, CalibrationRecord, FitRecord
from hf_geglu.conversions import Coefficients
from hf_geglu.plan import Plan
from hf_geglu.surgery import Fits

PER_NEURON, CORRECTED = "per neuron", "per neuron, corrected"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What the trial of a site's candidates found."""

    candidates: Mapping[str, Coefficients]
    errors: Mapping[str, float]
    """See `Trial.errors`."""
    costs: Mapping[str, float]
    """See `Trial.costs`."""
    tokens: int

    @classmethod
    def of(cls, trial: Trial) -> Outcome:
        """Of a trial that has seen all data."""
        return cls(candidates=trial.candidates, errors=trial.errors(), costs=trial.costs(), tokens=int(trial.tokens))

    @property
    def record(self) -> FitRecord:
        """The choice: the fewest nats where the model has logits, else the smallest error of the block's output."""
        by_cost = any(self.costs.values())
        name = best(self.costs if by_cost else self.errors, tuple(self.errors))
        if not self.tokens:
            name, reason = TABLE, "no held-out token came to it"
        elif by_cost:
            compared = ", ".join(f"{each} {cost:.2g}" for each, cost in self.costs.items())
            reason = f"fewest nats a token on held-out data, to second order: {compared}"
        else:
            reason = "smallest error of the block's output on held-out data"
        others = {each: error for each, error in self.errors.items() if each != name}
        return FitRecord(method=name, error=self.errors[name], alternatives=others, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """The choices for all sites."""

    plan: Plan
    fits: Fits
    costs: Mapping[str, float]
    """Nats a token that each site is estimated to cost, by its `up`."""
    note: str
    """What was picked, for how many blocks, and why the others were not asked."""


def choose(
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    reasons: Mapping[str, str],
    data: CalibrationData,
    *,
    seed: int,
) -> Chosen:
    """Take the best of every site.

    Args:
        plan: that was calibrated.
        outcomes: of the fitted sites, by their `up`.
        reasons: why others are not fitted.
        data: all of it.
        seed: of the labels.
    """
    used, held = data.split()
    records = {path: outcome.record for path, outcome in outcomes.items()}
    return Chosen(
        plan=replace(
            plan,
            sites=tuple(replace(entry, fit=records.get(entry.site.up)) for entry in plan.sites),
            calibration=CalibrationRecord(
                data=data.name,
                fingerprint=data.fingerprint,
                tokens=used.tokens,
                held_out_tokens=held.tokens,
                seed=seed,
            ),
        ),
        fits={path: outcomes[path].candidates[record.method] for path, record in records.items() if record.fitted},
        costs={path: outcome.costs.get(records[path].method, 0.0) for path, outcome in outcomes.items()},
        note=_summary(records, {path: reason for path, reason in reasons.items() if reason != EXACT}),
    )


def _summary(chosen: Mapping[str, FitRecord], reasons: Mapping[str, str]) -> str:
    """What was picked, for how many blocks, and why the others were not asked."""
    parts = []
    for method in dict.fromkeys(record.method for record in chosen.values()):
        errors = sorted(record.error or 0.0 for record in chosen.values() if record.method == method)
        parts.append(
            f"{len(errors)} blocks {method} (relative error {errors[len(errors) // 2]:.1e} in the middle, "
            f"{errors[-1]:.1e} at worst)"
        )
    for reason in dict.fromkeys(reasons.values()):
        count = sum(each == reason for each in reasons.values())
        parts.append(f"{count} not fitted: {reason}")
    return "chosen on held-out data: " + "; ".join(parts)
