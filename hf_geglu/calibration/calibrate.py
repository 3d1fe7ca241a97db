"""Calibrate: fit every site's conversion to data, and choose the best of each by its error on a part held out.

The model is not changed. What comes out is a plan that says what was chosen and why, and the fits that belong to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from hf_geglu.calibration.budget import Measured, measure, within_budget
from hf_geglu.calibration.data import CalibrationData
from hf_geglu.calibration.gather import Progress, gather
from hf_geglu.calibration.histogram import WeightedHistogram
from hf_geglu.calibration.lines import EXACT, down_matrix, fit_site, fitted_sites
from hf_geglu.calibration.trial import Trial, best
from hf_geglu.choice import TABLE, CalibrationRecord, FitRecord
from hf_geglu.conversions import Coefficients
from hf_geglu.plan import Plan
from hf_geglu.sites import FoundSites, find_sites
from hf_geglu.surgery import Fits

PER_NEURON = "per neuron"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibrated:
    """A plan with its fits, and what the whole model was measured to lose.

    Attributes:
        plan: what to do, with the choice for each site.
        fits: the tensors that the plan does not hold.
        held_out: of the whole model on the held-out data; None where its outputs are no logits.
        notes: for the report, a sentence each.
    """

    plan: Plan
    fits: Fits
    held_out: Measured | None
    notes: tuple[str, ...]


def calibrate(
    model: nn.Module,
    plan: Plan,
    data: CalibrationData,
    *,
    found: FoundSites | None = None,
    max_kl: float | None = None,
    seed: int = 0,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Fit and choose.

    Candidates for a site are its row of the table and one line a neuron, fitted with each token weighted by the Fisher
    information of the model's output there. The one that is estimated to cost fewer nats on the held-out data is taken,
    by the smaller error of the block's output where the model has no logits.

    Args:
        model: in the state that the plan was made for.
        plan: from `make_plan`.
        data: every fourth batch is held out.
        found: the sites of the model, where they are at hand.
        max_kl: nats a token that the conversion may cost on the held-out data. The sites that cost most are left
            unconverted until it is kept, and the plan says so.
        seed: of the labels behind the gradients.
        state: file that keeps the statistics under way, so that a killed calibration goes on.
        progress: called after each batch of the two passes with (done, of how many).

    Raises:
        DataError: too little data, or a state of another calibration.
        PlanError: `max_kl` for a model without logits, or one that no conversion keeps.
    """
    used, held = data.split()
    entries, reasons = fitted_sites(model, plan.converted)
    total = len(used.batches) + len(held.batches)
    tell = progress or (lambda done, of: None)
    trials = {}
    lines: dict[str, Coefficients] = {}
    if entries:
        sites = [entry.site for entry in entries]
        seen = {entry.site.up: WeightedHistogram(entry.site, down_matrix(model, entry.site)) for entry in entries}
        gather(
            model,
            used,
            seen,
            sites=sites,
            gradients=True,
            seed=seed,
            state=state,
            progress=lambda done, _: tell(done, total),
        )
        for entry in entries:
            lines[entry.site.up] = fit_site(model, entry, seen[entry.site.up])
            trials[entry.site.up] = Trial(
                entry.site,
                entry.scaling.gate,
                {TABLE: Coefficients.of(entry.scaling), PER_NEURON: lines[entry.site.up]},
                seen[entry.site.up].down if seen[entry.site.up].direct else None,
            )
        gather(
            model,
            held,
            trials,
            sites=sites,
            gradients=True,
            seed=seed + 1,
            progress=lambda done, _: tell(len(used.batches) + done, total),
        )
    chosen = {path: _choose(trial) for path, trial in trials.items()}
    fits: Fits = {path: lines[path] for path, record in chosen.items() if record.fitted}
    record = CalibrationRecord(
        data=data.name,
        fingerprint=data.fingerprint,
        tokens=used.tokens,
        held_out_tokens=held.tokens,
        seed=seed,
    )
    made = replace(
        plan,
        sites=tuple(replace(entry, fit=chosen.get(entry.site.up)) for entry in plan.sites),
        calibration=record,
    )
    notes = [_summary(chosen, {p: r for p, r in reasons.items() if r != EXACT})]
    measured = measure(model, made, fits, held) if plan.converted else None
    if max_kl is not None:
        costs = {path: trial.costs()[chosen[path].method] for path, trial in trials.items()}
        found = find_sites(model) if found is None else found
        made, fits, measured, note = within_budget(
            model, made, fits, held, max_kl=max_kl, measured=measured, costs=costs, found=found
        )
        notes += [note] if note else []
    return Calibrated(plan=made, fits=fits, held_out=measured, notes=tuple(notes))


def _choose(trial: Trial) -> FitRecord:
    errors, costs = trial.errors(), trial.costs()
    by_cost = any(costs.values())
    figures: Mapping[str, float] = costs if by_cost else errors
    name = best(figures, tuple(errors))
    others = {each: errors[each] for each in errors if each != name}
    if not int(trial.tokens):
        name, reason = TABLE, "no held-out token came to it"
    elif by_cost:
        compared = ", ".join(f"{each} {cost:.2g}" for each, cost in costs.items())
        reason = f"fewest nats a token on held-out data, to second order: {compared}"
    else:
        reason = "smallest error of the block's output on held-out data"
    return FitRecord(method=name, error=errors[name], alternatives=others, reason=reason)


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
