"""Calibrate: fit every site's conversion to data, and choose the best of each by its error on a part held out.

The model is not changed. What comes out is a plan that says what was chosen and why, and the fits that belong to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_geglu.calibration.budget import Measured, measure, within_budget
from hf_geglu.calibration.choosing import CORRECTED, PER_NEURON, Chosen, Outcome, choose
from hf_geglu.calibration.correction import Correction, Metric, groups
from hf_geglu.calibration.data import CalibrationData
from hf_geglu.calibration.gather import Progress, Statistic, Together, gather
from hf_geglu.calibration.histogram import WeightedHistogram
from hf_geglu.calibration.lines import down_matrix, fit_site, fitted_sites
from hf_geglu.calibration.shelf import Shelf
from hf_geglu.calibration.trial import Trial
from hf_geglu.choice import TABLE
from hf_geglu.conversions import Coefficients
from hf_geglu.fingerprint import fingerprint
from hf_geglu.plan import Plan, SitePlan
from hf_geglu.sites import FoundSites, find_sites
from hf_geglu.sites.weights import is_stack
from hf_geglu.surgery import Fits


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
        state: folder that keeps what the passes have found, so that a calibration that was killed goes on and ends with
            the same bits; it can be removed when this returns.
        progress: called after each batch of all passes with (done, of how many).

    Raises:
        DataError: too little data, or a state of another calibration.
        PlanError: `max_kl` for a model without logits, or one that no conversion keeps.
    """
    used, held = data.split()
    entries, reasons = fitted_sites(model, plan.converted)
    shelf = None if state is None else Shelf(state, _key(model, plan, data, seed))
    trials = _trials(model, used, held, entries, seed=seed, shelf=shelf, progress=progress) if entries else {}
    outcomes = {path: Outcome.of(trial) for path, trial in trials.items()}
    chosen = choose(plan, outcomes, reasons, data, seed=seed)
    return concluded(
        model, chosen, measure=lambda plan, fits: measure(model, plan, fits, held), max_kl=max_kl, found=found
    )


def concluded(
    model: nn.Module,
    chosen: Chosen,
    *,
    measure: Callable[[Plan, Fits], Measured],
    max_kl: float | None,
    found: FoundSites | None,
) -> Calibrated:
    """What was chosen, measured as a whole and kept within the budget, if there is one.

    Args:
        model: calibrated for.
        chosen: for each of its sites.
        measure: what a conversion costs on the part that was held out.
        max_kl: see `calibrate`.
        found: the sites of the model; None looks for them where they are needed.

    Raises:
        PlanError: see `calibrate`.
    """
    measured = measure(chosen.plan, chosen.fits) if chosen.plan.converted else None
    if max_kl is None:
        return Calibrated(plan=chosen.plan, fits=chosen.fits, held_out=measured, notes=(chosen.note,))
    made, fits, measured, note = within_budget(
        model,
        chosen.plan,
        chosen.fits,
        measure=measure,
        max_kl=max_kl,
        measured=measured,
        costs=chosen.costs,
        found=find_sites(model) if found is None else found,
    )
    return Calibrated(plan=made, fits=fits, held_out=measured, notes=tuple(filter(None, [chosen.note, note])))


def _key(model: nn.Module, plan: Plan, data: CalibrationData, seed: int) -> dict[str, Any]:
    """What the fits depend on."""
    return {
        "model": fingerprint(model).to_dict(),
        "plan": plan.to_dict(),
        "data": data.fingerprint,
        "seed": seed,
        "torch": torch.__version__,
    }


def _trials(
    model: nn.Module,
    used: CalibrationData,
    held: CalibrationData,
    entries: Sequence[SitePlan],
    *,
    seed: int,
    shelf: Shelf | None,
    progress: Progress | None,
) -> dict[str, Trial]:
    """All candidates of every site, fitted to `used` and measured on `held`."""
    sites = [entry.site for entry in entries]
    downs = {entry.site.up: down_matrix(model, entry.site) for entry in entries}
    passes = sum(1 for _ in groups([entry for entry in entries if not is_stack(entry.site.projection)]))
    total = len(used.batches) * (1 + passes) + len(held.batches)
    done = 0

    def run(name: str, data: CalibrationData, statistics: Mapping[str, Statistic], **settings: Any) -> None:
        nonlocal done
        before = done
        gather(
            model,
            data,
            statistics,
            sites=[site for site in sites if site.up in statistics],
            state=None if shelf is None else shelf.path(name),
            progress=None if progress is None else lambda now, _: progress(before + now, total),
            **settings,
        )
        done += len(data.batches)

    histograms = {site.up: WeightedHistogram(site, downs[site.up]) for site in sites}
    metrics = {site.up: Metric(site.d_out) for site in sites}
    seen = {up: Together(histogram=histograms[up], metric=metrics[up]) for up in histograms}
    run("seen", used, seen, gradients=True, seed=seed)
    candidates: dict[str, dict[str, Coefficients]] = {
        entry.site.up: {
            TABLE: Coefficients.of(entry.scaling),
            PER_NEURON: fit_site(model, entry, histograms[entry.site.up]),
        }
        for entry in entries
    }
    corrected = [e for e in entries if not is_stack(e.site.projection) and histograms[e.site.up].direct]
    for number, group in enumerate(groups(corrected)):
        name = f"corrected-{number}"
        kept = None if shelf is None else shelf.read_lines(name)
        if kept is not None:
            for up, lines in kept[0].items():
                candidates[up] |= lines
            done += len(used.batches)
            continue
        sums = {e.site.up: Correction(e, candidates[e.site.up][PER_NEURON], downs[e.site.up]) for e in group}
        run(f"sums-{number}", used, sums)
        solved = {up: found.solved(metrics[up].sum_DD) for up, found in sums.items()}
        for up, line in solved.items():
            if line is not None:
                candidates[up][CORRECTED] = line
        if shelf is not None:  # the sums are large, what they give is not
            found = {up: {CORRECTED: line} for up, line in solved.items() if line is not None}
            shelf.write_lines(name, found)
            shelf.drop(f"sums-{number}")
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
    run("trial", held, trials, gradients=True, seed=seed + 1)
    return trials
