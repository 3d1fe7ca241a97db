"""collapse: decide, make dense, verify, in one call that either is complete or has not happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_geglu.collapsing.check import check_outputs, check_sites
from hf_geglu.collapsing.judge import Verdict, judge
from hf_geglu.collapsing.origin import Origin, Stuck, origins
from hf_geglu.collapsing.plan import CollapsePlan, Kept, SiteCollapse
from hf_geglu.collapsing.report import CollapseReport
from hf_geglu.collapsing.surgery import apply, refuse_unready
from hf_geglu.converting import Verify, compare_run, first_run, noise_of
from hf_geglu.distance import Comparison, Outputs
from hf_geglu.errors import PlanError
from hf_geglu.fingerprint import fingerprint
from hf_geglu.inputs import Inputs
from hf_geglu.modeling_geglu import get_attribute
from hf_geglu.provenance import Reversal, reversal, set_reversal
from hf_geglu.selection import Layers, select
from hf_geglu.sites.weights import parameters_of
from hf_geglu.surgery import revert


def collapse(
    model: nn.Module,
    *,
    tolerance: float = 0.0,
    layers: Layers = None,
    inputs: Inputs | Sequence[Inputs] | None = None,
    verify: Verify = "model",
) -> CollapseReport:
    """Make the blocks of a variant dense again whose value branch is constant, in place, and prove it.

    A value branch that never left its start (``Wv = 0``, ``bv`` as converted) gives the block back as it was, bit for
    bit where the conversion scaled by powers of two or not at all (GELU, ReLU, ReLU²). Other constants go into the down
    projection: exact in exact arithmetic, one rounding in the model's dtype. With a tolerance, so does a value branch
    that moves: neuron n's value is replaced by its mean, if no input within the radius of those seen moves it by more
    than `tolerance` times that mean (``|Wv_n| max |x - mean|``, an upper bound by Cauchy-Schwarz, in float64).

    Blocks whose value branch has learned stay gated, each with the reason. Where none stays, class and config are the
    base's again, and `save_pretrained` writes an ordinary checkpoint; else the variant lists fewer blocks. Where
    nothing can collapse, nothing happens and the report says why. `hf_geglu.revert` gives the variant back.

    Args:
        model: converted in this process, or a portable variant that was loaded.
        tolerance: largest relative deviation of a neuron's value; 0 for constant ones only.
        layers: which blocks, as in `make_plan`; None for all.
        inputs: keyword arguments of a forward, or several of them: what a tolerance is measured on, and the first for
            the verification. Synthetic ones otherwise, which say little about real text.
        verify: "model" runs the whole model before and after; "sites" checks every block in float64 only.

    Returns:
        The report of what was decided and measured.

    Raises:
        SurgeryError: the model is no variant with expanded blocks, or has no weights at hand.
        SelectionError: `layers` matches nothing.
        PlanError: a tolerance below 0 or not below 1.
        HfGegluError: any other; the model is then as it was before the call.
    """
    if not 0.0 <= tolerance < 1.0:
        raise PlanError(f"tolerance={tolerance}; expected 0 (exact) up to less than 1, a share of each neuron's value")
    found, stuck = origins(model)
    batches = [] if inputs is None else [inputs] if isinstance(inputs, Mapping) else list(inputs)
    refuse_unready(model, [origin.site.up for origin in found])
    before: dict[torch.dtype, Outputs] = {}
    shown: Inputs | None = batches[0] if batches else None
    note = ""
    if verify == "model" or tolerance:
        before, shown, note = first_run(model, shown)
    chosen = {site.up for site in select([origin.site for origin in found], layers)} if found else set()
    verdicts, tokens = judge(
        model,
        [origin for origin in found if origin.site.up in chosen],
        others=[origin for origin in found if origin.site.up not in chosen],
        tolerance=tolerance,
        batches=batches or ([] if shown is None else [shown]),
    )
    if not before:
        verdicts = tuple(_without_folding(verdict) for verdict in verdicts)
    plan = _plan(model, verdicts, stuck, tolerance=tolerance, tokens=tokens)
    if not plan.sites:
        return CollapseReport(plan=plan, sites=(), comparisons=(), note="no block can collapse; nothing was changed")
    return _carry_out(model, plan, verdicts, before if verify == "model" else {}, shown, note)


def _carry_out(
    model: nn.Module,
    plan: CollapsePlan,
    verdicts: Sequence[Verdict],
    before: Mapping[torch.dtype, Outputs],
    inputs: Inputs | None,
    note: str,
) -> CollapseReport:
    going = tuple(verdict for verdict in verdicts if isinstance(verdict.decision, SiteCollapse))
    packed = {verdict.origin.site.up: dict(parameters_of(model, verdict.origin.site)) for verdict in going}
    gates = {verdict.origin.site.up: _gate_of(model, verdict.origin) for verdict in going}
    earlier, weights = reversal(model), fingerprint(model)
    paths = [_path_in_plan(model, verdict.origin) for verdict in going]
    steps = apply(model, going, whole=plan.whole)
    try:
        checks = check_sites(model, going, packed, gates)
        comparisons: tuple[Comparison, ...] = ()
        if inputs is not None:
            comparisons = tuple(compare_run(model, dtype, outputs, inputs) for dtype, outputs in before.items())
        check_outputs(plan, comparisons, noise_of(before))
    except BaseException:
        revert(model)
        raise
    report = CollapseReport(plan=plan, sites=checks, comparisons=comparisons, note=note)
    continued = earlier is not None and not earlier.after.difference(weights, bitwise=True)
    made = Reversal(
        paths=(*(earlier.paths if earlier else ()), *paths),
        whole=plan.whole,
        tolerance=max(plan.tolerance, earlier.tolerance if earlier else 0.0),
        before=earlier.before if earlier and continued else weights,
        after=fingerprint(model),
        report=report.to_dict(),
    )
    set_reversal(model, made)
    steps.steps.append(lambda: set_reversal(model, earlier))
    return report


def _path_in_plan(model: nn.Module, origin: Origin) -> str:
    """Of the up projection in the class that was converted, which may have been another head."""
    geglu = getattr(getattr(model, "config", None), "geglu", None)
    return origin.site.up if geglu is None or origin.index is None else str(geglu["sites"][origin.index]["up"])


def _gate_of(model: nn.Module, origin: Origin) -> Any:
    assert origin.site.activation_path is not None
    return get_attribute(model, origin.site.activation_path).activation


def _without_folding(verdict: Verdict) -> Verdict:
    decision = verdict.decision
    if isinstance(decision, Kept) or not decision.folded:
        return verdict
    reason = (
        "its value branch is constant, but not the conversion's constant, and the model was not run, so that nothing "
        "would show whether its down projection takes it; hand in inputs="
    )
    return replace(verdict, decision=Kept(path=decision.site.up, reason=reason))


def _plan(
    model: nn.Module, verdicts: Sequence[Verdict], stuck: Sequence[Stuck], *, tolerance: float, tokens: int
) -> CollapsePlan:
    decisions = [verdict.decision for verdict in verdicts]
    return CollapsePlan(
        model_class=type(model).__name__,
        tolerance=tolerance,
        sites=tuple(decision for decision in decisions if isinstance(decision, SiteCollapse)),
        kept=(
            *(decision for decision in decisions if isinstance(decision, Kept)),
            *(Kept(path=each.path, reason=each.reason) for each in stuck),
        ),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=tokens,
    )
