"""From a plan for a narrower model and calibration data to the plan that says what it cost, and the weights that go
with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from hf_geglu.calibration import CalibrationData
from hf_geglu.choice import CalibrationRecord
from hf_geglu.distance import cast, outputs_of
from hf_geglu.errors import DataError, PlanError
from hf_geglu.inputs import Inputs
from hf_geglu.modes import evaluating
from hf_geglu.narrow_record import NarrowPoint, NarrowRecord
from hf_geglu.narrowing.fidelity import fidelity
from hf_geglu.narrowing.objective import tokens_of
from hf_geglu.narrowing.pipeline import Fits, Narrower, narrow, study
from hf_geglu.narrowing.settings import NarrowSettings
from hf_geglu.narrowing.statistics import SiteStatistics, weights_of
from hf_geglu.narrowing.sums import hooked
from hf_geglu.plan import Plan
from hf_geglu.surgery import apply
from hf_geglu.width import narrow_width

TOKENS_A_NEURON = 8
"""Fewer equations than that for each unknown of a down projection fit the text and not the model."""


def carry_out(
    model: nn.Module,
    plan: Plan,
    data: CalibrationData,
    *,
    settings: NarrowSettings | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Plan, Fits]:
    """Find the weights of the narrow model that `plan` describes, and measure what it lost. `model` is not changed.

    Args:
        model: that the plan was made for.
        plan: from ``make_plan(model, width=...)``.
        data: every fourth batch is held out, to measure on.
        settings: how far to go.
        progress: takes a line from time to time.

    Returns:
        The plan with `narrowing` and the error of each site, and the weights for ``convert(model, plan, fits=...)``.

    Raises:
        PlanError: the plan narrows nothing.
        DataError: too little data.
        ConversionError: the model cannot be narrowed after all, with the reason.
    """
    settings = settings or NarrowSettings()
    if not plan.narrows:
        raise PlanError("this plan keeps every block's width; expected one of make_plan(model, width='matched')")
    used, held = data.split()
    batches, held_out = used.batches, held.batches
    entry = plan.converted[0]
    old, width = entry.site.width, entry.width
    if used.tokens < TOKENS_A_NEURON * width:
        raise DataError(
            f"{used.tokens:,} tokens to solve for {width} neurons; expected at least {TOKENS_A_NEURON * width:,} "
            "(a quarter of what is given is held out on top), better ten times as many: give more text"
        )
    others = sorted({narrow_width(share, old, gated=False) for share in settings.curve} - {width, old})
    studied = study(model, plan, batches, smallest=min([width, *others]), settings=settings, progress=progress)
    fits, student = narrow(studied, plan, width=width, settings=settings, progress=progress)
    result = _point(model, student, held_out, width, settings.stage)
    errors = site_errors(model, student, studied.statistics, held_out)
    del student
    control = None
    if settings.control and not entry.site.gated:
        _, dense = narrow(studied, plan, width=width, settings=settings, value_branch=False, progress=progress)
        control = replace(_point(model, dense, held_out, width, settings.stage), value_branch=False)
        del dense
    curve = [_closed(studied, plan, each, held_out, settings, progress) for each in others]
    curve.append(_point(model, _at_full_width(model, plan), held_out, old, "full width"))
    record = NarrowRecord(
        old_width=old, result=result, control=control, curve=tuple(curve), settings=settings.to_dict()
    )
    sites = tuple(
        site
        if site.fit is None
        else replace(site, fit=replace(site.fit, error=errors[site.site.up], method=f"narrow, {settings.stage}"))
        for site in plan.sites
    )
    calibration = CalibrationRecord(
        data=data.name,
        fingerprint=data.fingerprint,
        tokens=used.tokens,
        held_out_tokens=held.tokens,
        seed=settings.seed,
    )
    return replace(plan, sites=sites, narrowing=record, calibration=calibration), fits


def at_width(plan: Plan, width: int) -> Plan:
    """The same plan with other numbers of neurons; the full width drops the fits."""
    old, now = plan.converted[0].site.width, plan.converted[0].width
    sites = tuple(
        replace(entry, fit=None if width == old or entry.fit is None else replace(entry.fit, width=width))
        for entry in plan.sites
    )
    changes = {key: width if value == now else value for key, value in plan.config_changes.items()}
    return replace(plan, sites=sites, config_changes=changes)


def _closed(
    studied: Narrower,
    plan: Plan,
    width: int,
    held_out: Sequence[Inputs],
    settings: NarrowSettings,
    progress: Callable[[str], None],
) -> NarrowPoint:
    closed = replace(settings, stage="closed")
    _, student = narrow(studied, at_width(plan, width), width=width, settings=closed, progress=progress)
    return _point(studied.model, student, held_out, width, "closed")


def _at_full_width(model: nn.Module, plan: Plan) -> nn.Module:
    whole = copy.deepcopy(model)
    apply(whole, at_width(plan, plan.converted[0].site.width))
    return whole


def _point(model: nn.Module, student: nn.Module, held_out: Sequence[Inputs], width: int, stage: str) -> NarrowPoint:
    return NarrowPoint(width=width, stage=stage, value_branch=True, fidelity=fidelity(model, student, held_out))


def site_errors(
    model: nn.Module, student: nn.Module, statistics: Mapping[str, SiteStatistics], batches: Sequence[Inputs]
) -> dict[str, float]:
    """Of each site: RMS of what the sum around it is off, relative to its spread over a token's entries."""
    square, count = dict.fromkeys(statistics, 0.0), dict.fromkeys(statistics, 0)
    with evaluating(model), evaluating(student), torch.no_grad():
        for batch in batches:
            here, there = (_sums(each, statistics, batch) for each in (model, student))
            for up in statistics:
                off = (here[up] - there[up]).square().mean(-1) * weights_of(here[up])
                square[up] += float(off.sum())
                count[up] += len(off)
    return {up: float((square[up] / max(count[up], 1)) ** 0.5) for up in statistics}


def _sums(model: nn.Module, statistics: Mapping[str, SiteStatistics], batch: Inputs) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    given = cast(batch, model)

    def taker(up: str) -> Callable[[torch.Tensor], None]:
        return lambda tensor: found.__setitem__(up, tokens_of(tensor, given).float())

    with ExitStack() as stack:
        for up, each in statistics.items():
            stack.enter_context(hooked(model, each.place, taker(up)))
        outputs_of(model, given)
    return found
