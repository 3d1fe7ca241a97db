"""convert: plan, surgery and verification in one call that either is complete or has not happened."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hf_geglu.calibration import CalibrationData, Measured, Progress, calibrate
from hf_geglu.distance import Comparison, Outputs, cast, comparison, is_causal, outputs_of
from hf_geglu.errors import PlanError
from hf_geglu.fingerprint import fingerprint
from hf_geglu.inputs import Inputs, synthetic_inputs
from hf_geglu.modes import evaluating
from hf_geglu.narrowing import NarrowSettings, Stage, carry_out
from hf_geglu.plan import GeluForm, Plan
from hf_geglu.planning import make_plan
from hf_geglu.provenance import Provenance, base_of, forget, remember, remember_fits
from hf_geglu.selection import Layers
from hf_geglu.sites import GivenSite, find_sites
from hf_geglu.surgery import Fits, apply, revert
from hf_geglu.verify import Report, check_exactness, check_sites, check_values
from hf_geglu.width import Width

Verify = Literal["model", "sites"]

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def convert(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    fits: Fits | None = None,
    calibration: CalibrationData | Iterable[Any] | None = None,
    max_kl: float | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    state: Path | None = None,
    variant: str = "geglu",
    width: Width = "same",
    narrow: NarrowSettings | Stage = "closed",
    layers: Layers = None,
    gelu: GeluForm = "owner",
    sites: Sequence[GivenSite] | None = None,
    inputs: Inputs | None = None,
    verify: Verify = "model",
) -> Report:
    """Turn the FFN blocks of `model` into GeGLU blocks, in place, and prove it.

    Blocks that are already what was asked for are left alone; where all of them are, nothing happens and the report
    says so. The originals stay on the model until `revert` or `forget_original`.

    Args:
        model: a transformers model with its weights, or any module whose FFN blocks `find_sites` sees.
        plan: from `make_plan`; the arguments `variant`, `layers` and `gelu` make one otherwise.
        fits: the tensors that belong to a plan whose sites were fitted.
        calibration: data to fit every block's conversion to: batches, blocks of tokens, texts or a `datasets` corpus,
            see `hf_geglu.calibration.CalibrationData`. A quarter of it is held out and chooses, block by block, between
            the fit and the numbers that need no data; the report says what was chosen and why.
        max_kl: nats a token that the conversion may cost on the held-out quarter; blocks that cost most are left
            unconverted until it is kept, and the report says so.
        tokenizer: for calibration texts.
        progress: called after each calibration batch with (done, of how many).
        state: folder that keeps what a calibration has found, so that one that was killed goes on, see
            `hf_geglu.calibration.calibrate`; not for a width. It can be removed when this returns.
        variant: see `make_plan`.
        width: see `make_plan`; fewer neurons than there are take `calibration`, all of which is used, and are lossy.
        narrow: how far to go then: "closed", the closed form; "local", a fit of every block too; "heal", a training of
            the whole model on its original's outputs too. Or all settings.
        layers: see `make_plan`.
        gelu: see `make_plan`.
        sites: blocks named by hand, see `find_sites`.
        inputs: keyword arguments of one forward, for the verification; synthetic ones otherwise.
        verify: "model" runs the whole model before and after (a model in a 16-bit dtype also in float32, for which a
            copy is made and dropped); "sites" checks every block in float64 only.

    Returns:
        The report of what was measured.

    Raises:
        HfGegluError: any of the tree in `hf_geglu.errors`; the model is then as it was before the call.
    """
    found = None
    if plan is None:
        found = find_sites(model, sites=sites, inputs=inputs)
        plan = make_plan(model, variant, width, layers, gelu=gelu, found=found)
    elif (variant, width, layers, gelu, sites) != ("geglu", "same", None, "owner", None):
        raise PlanError(
            "a plan and its settings were both given; put variant, width, layers, gelu and sites into make_plan"
        )
    if max_kl is not None and calibration is None:
        raise PlanError("max_kl is measured on calibration data; expected calibration=... beside it")
    notes: tuple[str, ...] = ()
    held_out: Measured | None = None
    if calibration is not None:
        if fits is not None or plan.calibration is not None:
            raise PlanError(
                "the plan is calibrated already; hand in its fits=, or calibration= with a plan without any"
            )
        if plan.narrows:
            if state is not None:
                raise PlanError("state= keeps a calibration; what makes blocks narrower keeps none: leave it out")
            if max_kl is not None:
                raise PlanError(
                    "max_kl leaves blocks unconverted, but all of them become narrower or none; leave it out"
                )
            data = CalibrationData.of(calibration, tokenizer=tokenizer, tokens=None)
            settings = narrow if isinstance(narrow, NarrowSettings) else NarrowSettings(stage=narrow)
            plan, fits = carry_out(model, plan, data, settings=settings)
            notes = () if plan.narrowing is None else tuple(plan.narrowing.lines())
        else:
            data = CalibrationData.of(calibration, tokenizer=tokenizer)
            made = calibrate(model, plan, data, found=found, max_kl=max_kl, state=state, progress=progress)
            plan, fits, held_out, notes = made.plan, made.fits, made.held_out, made.notes
        inputs = data.batches[0] if inputs is None else inputs
    note = ""
    before: dict[torch.dtype, Outputs] = {}
    if verify == "model" and plan.converted:
        before, inputs, note = first_run(model, inputs)
    base = base_of(getattr(model, "config", None), fingerprint(model)) if plan.converted else None
    undo = apply(model, plan, fits)
    try:
        checks = check_sites(model, undo)
        comparisons = tuple(
            compare_run(model, dtype, outputs, inputs) for dtype, outputs in before.items() if inputs is not None
        )
        check_exactness(plan, comparisons, noise_of(before))
        values, response = (
            check_values(model, plan, cast(inputs, model)) if inputs is not None and before else ((), None)
        )
    except BaseException:
        revert(model)
        raise
    report = Report(
        model_class=plan.model_class,
        variant=plan.variant,
        tier=plan.tier,
        exact=plan.exact,
        converted=len(plan.converted),
        comparisons=comparisons,
        sites=checks,
        values=values,
        response=response,
        note="; ".join(filter(None, [note, *notes]))
        if plan.converted
        else f"every selected block is {plan.variant} already; nothing was changed",
        held_out=None if held_out is None else str(held_out),
    )
    if base is not None:
        remember(model, Provenance(base=base, plan=plan, report=report.to_dict(), step0=fingerprint(model)))
        if fits:
            remember_fits(model, fits)
        undo.steps.append(lambda: forget(model))
    return report


def first_run(model: nn.Module, inputs: Inputs | None) -> tuple[dict[torch.dtype, Outputs], Inputs | None, str]:
    """Outputs before the conversion, by dtype. Without inputs of the user's, a model that cannot be run on synthetic
    ones is verified site by site, and the note says so."""
    given = inputs is not None
    if inputs is None:
        inputs = synthetic_inputs(model)
    if inputs is None:
        return (
            {},
            None,
            "the whole model was not run: its config does not say what its inputs look like; hand in inputs=",
        )
    own = next(model.parameters()).dtype
    try:
        return {dtype: _run(model, dtype, inputs) for dtype in _dtypes(own)}, inputs, ""
    except Exception as error:  # whatever a model has against made-up inputs; the user's own are his to hear about
        if given:
            raise
        return {}, None, f"the whole model was not run, synthetic inputs failed: {error}; hand in inputs="


def _dtypes(own: torch.dtype) -> tuple[torch.dtype, ...]:
    return (own, torch.float32) if own in _LOW_PRECISION else (own,)


def _run(model: nn.Module, dtype: torch.dtype, inputs: Inputs) -> Outputs:
    if next(model.parameters()).dtype != dtype:
        model = copy.deepcopy(model).to(dtype)
    with evaluating(model), torch.no_grad():
        return outputs_of(model, cast(inputs, model))


def compare_run(model: nn.Module, dtype: torch.dtype, before: Outputs, inputs: Inputs) -> Comparison:
    """Outputs of a converted model in that dtype against those from before."""
    return comparison(
        before,
        _run(model, dtype, inputs),
        dtype=str(dtype).removeprefix("torch."),
        tokens=inputs.get("input_ids"),
        causal=is_causal(model),
    )


def noise_of(before: Mapping[torch.dtype, Outputs]) -> dict[str, float]:
    """How far a 16-bit original is from itself in float32: what an exact conversion may move it by."""
    wide = before.get(torch.float32)
    return {
        str(dtype).removeprefix("torch."): comparison(wide, outputs, dtype="").max_rel
        for dtype, outputs in before.items()
        if wide is not None and dtype in _LOW_PRECISION
    }
