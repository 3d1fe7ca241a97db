"""Calibrate: fit every site's conversion to data, and choose the best of each by its error on a part held out.

The model is not changed. What comes out is a plan that says what was chosen and why, and the fits that belong to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_geglu.calibration.budget import Measured, measure, within_budget
from hf_geglu.calibration.correction import Correction, Metric, groups
from hf_geglu.calibration.data import CalibrationData
from hf_geglu.calibration.gather import Progress, Statistic, Together, gather
from hf_geglu.calibration.histogram import WeightedHistogram
from hf_geglu.calibration.lines import EXACT, down_matrix, fit_site, fitted_sites
from hf_geglu.calibration.trial import Trial, best
from hf_geglu.choice import TABLE, CalibrationRecord, FitRecord
from hf_geglu.conversions import Coefficients
from hf_geglu.plan import Plan, SitePlan
from hf_geglu.sites import FoundSites, find_sites
from hf_geglu.sites.weights import is_stack
from hf_geglu.surgery import Fits

PER_NEURON, CORRECTED = "per neuron", "per neuron, corrected"


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

    Candidates for a site are its row of the table; one line a neuron, fitted with each token weighted by the Fisher
    information of the model's output there; and those lines with a low-rank correction of the down projection. The one
    that is estimated to cost the fewest nats on the held-out data is taken, by the smallest error of the block's output
    where the model has no logits.

    Args:
        model: in the state that the plan was made for.
        plan: from `make_plan`.
        data: every fourth batch is held out.
        found: the sites of the model, where they are at hand.
        max_kl: nats a token that the conversion may cost on the held-out data. The sites that cost most are left
            unconverted until it is kept, and the plan says so.
        seed: of the labels behind the gradients.
        state: file that keeps the statistics of the first pass, which is most of the work, so that a killed calibration
            goes on.
        progress: called after each batch of all passes with (done, of how many).

    Raises:
        DataError: too little data, or a state of another calibration.
        PlanError: `max_kl` for a model without logits, or one that no conversion keeps.
    """
    used, held = data.split()
    entries, reasons = fitted_sites(model, plan.converted)
    trials = _trials(model, used, held, entries, seed=seed, state=state, progress=progress) if entries else {}
    chosen = {path: _choose(trial) for path, trial in trials.items()}
    fits: Fits = {path: trials[path].candidates[record.method] for path, record in chosen.items() if record.fitted}
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


def _trials(
    model: nn.Module,
    used: CalibrationData,
    held: CalibrationData,
    entries: Sequence[SitePlan],
    *,
    seed: int,
    state: Path | None,
    progress: Progress | None,
) -> dict[str, Trial]:
    """All candidates of every site, fitted to `used` and measured on `held`."""
    sites = [entry.site for entry in entries]
    downs = {entry.site.up: down_matrix(model, entry.site) for entry in entries}
    passes = sum(1 for _ in groups([entry for entry in entries if not is_stack(entry.site.projection)]))
    total = len(used.batches) * (1 + passes) + len(held.batches)
    done = 0

    def run(data: CalibrationData, statistics: Mapping[str, Statistic], **settings: Any) -> None:
        nonlocal done
        before = done
        watched = [site for site in sites if site.up in statistics]
        gather(
            model,
            data,
            statistics,
            sites=watched,
            progress=None if progress is None else lambda now, _: progress(before + now, total),
            **settings,
        )
        done += len(data.batches)

    histograms = {site.up: WeightedHistogram(site, downs[site.up]) for site in sites}
    metrics = {site.up: Metric(site.d_out) for site in sites}
    seen = {up: Together(histogram=histograms[up], metric=metrics[up]) for up in histograms}
    run(used, seen, gradients=True, seed=seed, state=state)
    candidates: dict[str, dict[str, Coefficients]] = {
        entry.site.up: {
            TABLE: Coefficients.of(entry.scaling),
            PER_NEURON: fit_site(model, entry, histograms[entry.site.up]),
        }
        for entry in entries
    }
    corrected = [e for e in entries if not is_stack(e.site.projection) and histograms[e.site.up].direct]
    for group in groups(corrected):
        sums = {e.site.up: Correction(e, candidates[e.site.up][PER_NEURON], downs[e.site.up]) for e in group}
        run(used, sums)
        for up, found in sums.items():
            line = found.solved(metrics[up].sum_DD)
            if line is not None:
                candidates[up][CORRECTED] = line
    done = len(used.batches) * (1 + passes)
    trials = {
        entry.site.up: Trial(
            entry.site,
            entry.scaling.gate,
            candidates[entry.site.up],
            downs[entry.site.up] if histograms[entry.site.up].direct else None,
        )
        for entry in entries
    }
    run(held, trials, gradients=True, seed=seed + 1)
    return trials


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
