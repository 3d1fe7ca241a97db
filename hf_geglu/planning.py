"""Deciding a plan: which sites become the variant, by which conversion, at which width, and how the result is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from hf_geglu.choice import FitRecord
from hf_geglu.conversions import Scaling, find_scaling, scale_at_run_time
from hf_geglu.cost import cost, cost_after, cost_at_width
from hf_geglu.errors import ConversionError, NoSitesError, PlanError
from hf_geglu.native import native_config_change
from hf_geglu.plan import GeluForm, Plan, SitePlan, Tier, Untouched
from hf_geglu.selection import Layers, select
from hf_geglu.sites import FoundSites, Site, find_sites
from hf_geglu.sites.weights import is_stack, parameters_of, weight_name
from hf_geglu.sizing import narrow_widths, width_changes
from hf_geglu.variants import VARIANTS, get_variant
from hf_geglu.width import Width

_GELU_FORMS = {"gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}


def make_plan(
    model: nn.Module,
    variant: str = "geglu",
    width: Width = "same",
    layers: Layers = None,
    *,
    gelu: GeluForm = "owner",
    found: FoundSites | None = None,
) -> Plan:
    """Decide what converting `model` to `variant` means. Changes nothing; works on the meta device too.

    Args:
        model: a transformers model, or any module whose FFN blocks `find_sites` sees.
        variant: a name of `hf_geglu.VARIANTS`.
        width: "same" keeps every block's intermediate size, the only width at which pretrained weights carry over
            whole. "matched" keeps the parameters (two thirds of a dense block's neurons); a share below 1 or a number
            of neurons is taken as it is said. Such a plan is lossy, and needs calibration data to be carried out.
        layers: which sites, see `hf_geglu.selection.select`; None for all.
        gelu: for the GELU variants, "owner" lets a block that computes the other form of GELU (erf or tanh) keep it, so
            that its conversion is exact; "named" gives every block exactly the form that `variant` names.
        found: the result of `find_sites`, where it is at hand or was made by hand.

    Raises:
        VariantError: unknown variant.
        NoSitesError: the model has no FFN block.
        SelectionError: `layers` matches nothing.
        ConversionError: none of the selected sites can become the variant.
        PlanError: a width that the model's config cannot say, or that some of its blocks cannot have.
    """
    get_variant(variant)
    if gelu not in ("owner", "named"):
        raise PlanError(f"gelu={gelu!r}; expected 'owner' (keep the block's own form) or 'named' (the variant's form)")
    found = find_sites(model) if found is None else found
    if not found.sites:
        seen = "; ".join(f"{entry.path or type(model).__name__}: {entry.reason}" for entry in found.rejected[:5])
        raise NoSitesError(
            f"{type(model).__name__} has no FFN block to convert"
            + (f"; looked at and not taken: {seen}" if seen else "")
            + ". If it has one, name its projections: convert(model, sites=[{'up': 'layers.*.w1', 'down': "
            "'layers.*.w2'}]), or --sites FILE on the command line"
        )
    selected = select(found.sites, layers)
    widths = narrow_widths(found.sites, selected, width)
    plans: list[SitePlan] = []
    refused: list[Untouched] = []
    shared = _shared_parameters(model)
    for site in selected:
        try:
            plans.append(_plan_site(model, site, variant, gelu, shared, widths[site.up]))
        except ConversionError as error:
            refused.append(Untouched(path=site.up, activation_path=site.activation_path, reason=str(error)))
    if not plans:
        raise ConversionError(f"no selected FFN block can become {variant}: {refused[0].path}: {refused[0].reason}")
    tier, reason, changes = _tier(model, found, plans)
    config = getattr(model, "config", None)
    return Plan(
        model_class=type(model).__name__,
        model_type=getattr(config, "model_type", None),
        variant=variant,
        gelu=gelu,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        tier=tier,
        tier_reason=reason,
        config_changes=changes,
        sites=tuple(plans),
        refused=tuple(refused),
        unselected=tuple(
            Untouched(path=site.up, activation_path=site.activation_path, reason="not selected by layers=")
            for site in found.sites
            if site not in selected
        ),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def without(model: nn.Module, plan: Plan, found: FoundSites, reasons: Mapping[str, str]) -> Plan:
    """The same plan with some of its sites left as they are.

    Args:
        model: that the plan was made for.
        plan: what was to be done.
        found: the sites of the model.
        reasons: why, by the `up` of each site that is left.

    Raises:
        ConversionError: none would be converted.
    """
    left = tuple(entry for entry in plan.sites if entry.site.up in reasons)
    kept = [entry for entry in plan.sites if entry.site.up not in reasons]
    if not any(entry.conversion != "keep" for entry in kept):
        raise ConversionError(f"no block would be converted: {next(iter(reasons.values()), 'none is left')}")
    tier, reason, changes = _tier(model, found, kept)
    return replace(
        plan,
        tier=tier,
        tier_reason=reason,
        config_changes=changes,
        sites=tuple(kept),
        unselected=(
            *plan.unselected,
            *(
                Untouched(path=each.site.up, activation_path=each.site.activation_path, reason=reasons[each.site.up])
                for each in left
            ),
        ),
    )


def _plan_site(
    model: nn.Module, site: Site, variant: str, gelu: GeluForm, shared: dict[str, list[str]], width: int
) -> SitePlan:
    resolved = variant
    if gelu == "owner" and variant in _GELU_FORMS.values():
        resolved = _GELU_FORMS.get(site.activation, variant)
    gate = VARIANTS[resolved].gate
    scaling = find_scaling(site.activation, gate, gated=site.gated)
    narrow = width != site.width
    keep = site.gated and site.activation == gate and not narrow
    if not keep:
        _refuse_if_unfit(model, site, shared, scaling)
    before = cost(model, site)
    after = before if site.gated else cost_after(model, site, scaling)
    return SitePlan(
        site=site,
        conversion="keep" if keep else "retarget" if site.gated else "expand",
        variant=resolved,
        scaling=scaling,
        before=before,
        after=cost_at_width(model, site, scaling, width) if narrow else after,
        fit=FitRecord(method="narrow", width=width) if narrow else None,
    )


def _refuse_if_unfit(model: nn.Module, site: Site, shared: dict[str, list[str]], scaling: Scaling) -> None:
    """What conversions cannot do; each reason with the way out."""
    if site.activation_path is None:
        raise ConversionError(
            f"{type(model.get_submodule(site.block)).__name__} computes its activation inside `forward` in a way that "
            "can be exchanged neither as an attribute nor as a call; give the class an attribute for it, or leave the "
            "layer out with `layers=`"
        )
    if site.value_offset and scaling.beta != 1.0 and not scale_at_run_time(site, scaling):
        raise ConversionError(
            f"the block multiplies by value + {site.value_offset}, so its value branch cannot be scaled; use a variant "
            "with the block's own gate, or leave the layer out with `layers=`"
        )
    parameters = parameters_of(model, site)
    for path in (site.gate, site.up):
        name = weight_name(path, site.projection)
        weight = parameters.get(name)
        if is_stack(site.projection) and weight is not None and weight.ndim == 2 and site.layout != "separate":
            raise ConversionError(
                f"the experts lie one after the other in {path}, whose rows cannot be told apart; leave it out with "
                "`layers=`"
            )
        if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
            raise ConversionError(
                f"{path} is quantised; convert the model in bfloat16 or float32 and quantise the variant"
            )
        others = [other for other in shared.get(name, []) if other != name]
        if others:
            raise ConversionError(
                f"{name} is tied to {', '.join(others)}; untie it first, or leave the layer out with `layers=`"
            )


def _shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """For every parameter that is reachable from two different modules: all of its names."""
    owners: dict[int, dict[int, str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), {})[id(module)] = f"{module_name}.{name}"
    groups = [list(names.values()) for names in owners.values() if len(names) > 1]
    return {name: group for group in groups for name in group}


def _tier(model: nn.Module, found: FoundSites, plans: list[SitePlan]) -> tuple[Tier, str, dict[str, Any]]:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return "in-memory", f"{type(model).__name__} is not a transformers model, so it has no config to save", {}
    converted = [plan for plan in plans if plan.conversion != "keep"]
    if not converted:
        return "native", "every selected block is what was asked for already", {}
    changes: dict[str, Any] = {}
    try:
        widths = width_changes(model.config, model, {plan.site.width: plan.width for plan in plans}, type(model))
    except PlanError as error:
        return "in-memory", str(error), {}
    dense = [plan.site.up for plan in converted if plan.conversion == "expand"]
    scaled = [plan.site.up for plan in converted if scale_at_run_time(plan.site, plan.scaling)]
    if dense:
        reason = f"{type(model).__name__} has no gated block of its own at {dense[0]}"
    elif scaled:
        reason = f"{scaled[0]} clamps its branches, so that the scaling stays outside the weights"
    else:
        wanted = {plan.site.up: plan.scaling.gate for plan in plans}
        changes, reason = native_config_change(model, found, wanted)
        if widths and all(plan.site.activation == plan.scaling.gate for plan in plans):
            return "native", f"{type(model).__name__} takes its width from its config", widths
    if changes:
        return "native", reason, changes | widths
    if not type(model).__module__.startswith("transformers."):
        own = f"{type(model).__name__} is not a class of transformers, so a loader could not build its variant"
        return "in-memory", f"{reason}; {own}", {}
    return "portable", reason, widths
