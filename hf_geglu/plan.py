"""The plan: what a conversion will do to a model, decided before anything is touched.

A plan holds no tensors. It is frozen, prints itself, and goes to JSON and back without loss; `surgery.apply` carries it
out, a saved variant records it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from hf_geglu.choice import CalibrationRecord, FitRecord
from hf_geglu.conversions import Scaling, find_scaling, scale_at_run_time
from hf_geglu.cost import Cost, cost, cost_after, cost_at_width
from hf_geglu.errors import ConversionError, NoSitesError, PlanError
from hf_geglu.narrow_record import NarrowRecord
from hf_geglu.native import native_config_change
from hf_geglu.selection import Layers, select
from hf_geglu.sites import FoundSites, Site, find_sites
from hf_geglu.sites.weights import is_stack, parameters_of, weight_name
from hf_geglu.sizing import narrow_widths, width_changes
from hf_geglu.variants import VARIANTS, get_variant
from hf_geglu.width import Width

SCHEMA = 1

Conversion = Literal["expand", "retarget", "keep"]
Tier = Literal["native", "portable", "in-memory"]
GeluForm = Literal["owner", "named"]

_GELU_FORMS = {"gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """What happens at one site."""

    site: Site
    conversion: Conversion
    """expand: dense -> gated. retarget: gated -> another gate. keep: it is what was asked for already."""
    variant: str
    scaling: Scaling
    before: Cost
    after: Cost
    fit: FitRecord | None = None
    """What calibration data chose. Where that is a fit rather than the row of the table, `scaling` says from which
    activation to which gate only."""

    @property
    def fitted(self) -> bool:
        """Whether the numbers are of each neuron, or the weights new: tensors that belong to this plan."""
        return self.fit is not None and self.fit.fitted

    @property
    def exact(self) -> bool:
        """Whether the difference is rounding."""
        return not self.fitted and self.scaling.exact

    @property
    def width(self) -> int:
        """F after the conversion."""
        return self.site.width if self.fit is None or self.fit.width is None else self.fit.width

    @property
    def error(self) -> str:
        """How far the converted block is from the original, in words: a bound, or what was measured."""
        if self.fit is not None and self.fit.fitted:
            return str(self.fit)
        if self.scaling.exact:
            return "exact"
        return f"|error| <= {self.scaling.max_error:.1e}, rms {self.scaling.rms_error:.1e}"

    @property
    def keeps_activation(self) -> bool:
        """The block's own activation object goes on serving as the gate's, so not even its rounding changes."""
        return self.scaling.source == self.scaling.gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Untouched:
    """A site that stays as it is, and why: not selected, or no conversion leads from it to the variant."""

    path: str
    activation_path: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The decision for a whole model."""

    model_class: str
    model_type: str | None
    variant: str
    gelu: GeluForm
    dtype: str
    tier: Tier
    """native: a plain config loads it. portable: it carries its own modelling file. in-memory: no transformers model,
    so nothing knows how to save it."""
    tier_reason: str
    config_changes: Mapping[str, Any]
    """The config entries that change, with their new values: of the native tier the activation, of any the width."""
    sites: tuple[SitePlan, ...]
    refused: tuple[Untouched, ...] = ()
    """Selected sites that no conversion fits. `convert` stops here; leave them out with `layers=`."""
    unselected: tuple[Untouched, ...] = ()
    total_parameters: int
    """Of the whole model before the conversion."""
    calibration: CalibrationRecord | None = None
    """The data behind the fits of its sites."""
    narrowing: NarrowRecord | None = None
    """What becoming narrower cost, where it was done."""
    schema: int = field(default=SCHEMA)

    @property
    def exact(self) -> bool:
        """Whether every conversion is exact: the difference is rounding."""
        return all(site.exact for site in self.sites)

    @property
    def converted(self) -> tuple[SitePlan, ...]:
        """The sites that change."""
        return tuple(site for site in self.sites if site.conversion != "keep")

    @property
    def narrows(self) -> bool:
        """Whether blocks get fewer neurons, which takes calibration data and is never exact."""
        return any(site.width != site.site.width for site in self.sites)

    @property
    def before(self) -> Cost:
        """Cost of the FFN blocks now."""
        return sum((site.before for site in self.sites), Cost(parameters=0, flops_per_token=0, bytes=0))

    @property
    def after(self) -> Cost:
        """Cost of the FFN blocks afterwards."""
        return sum((site.after for site in self.sites), Cost(parameters=0, flops_per_token=0, bytes=0))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "config_changes": dict(self.config_changes)}

    def to_json(self) -> str:
        """As JSON text; `from_json` gives an equal plan back."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote. Raises PlanError where it cannot be."""
        try:
            data = json.loads(text)
            schema = data["schema"]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise PlanError(
                f"this is no plan ({error!r}); expected the JSON that `hf-geglu plan --json` writes"
            ) from error
        if schema > SCHEMA:
            raise PlanError(f"this plan has schema {schema}, this version reads up to {SCHEMA}; upgrade hf_geglu")
        try:
            return cls(
                **{
                    **data,
                    "sites": tuple(_site_plan(site) for site in data["sites"]),
                    "refused": tuple(Untouched(**entry) for entry in data["refused"]),
                    "unselected": tuple(Untouched(**entry) for entry in data["unselected"]),
                    "calibration": CalibrationRecord.from_dict(data.get("calibration")),
                    "narrowing": NarrowRecord.from_dict(data.get("narrowing")),
                }
            )
        except (TypeError, KeyError) as error:
            raise PlanError(f"this plan cannot be read: {error}; make it again with `hf-geglu plan --json`") from error

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _site_plan(data: dict[str, Any]) -> SitePlan:
    return SitePlan(
        **{
            **data,
            "site": Site(**data["site"]),
            "scaling": Scaling(**data["scaling"]),
            "before": Cost(**data["before"]),
            "after": Cost(**data["after"]),
            "fit": FitRecord.from_dict(data.get("fit")),
        }
    )


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


def _lines(plan: Plan) -> list[str]:
    before, after = plan.before, plan.after
    growth = after.parameters - before.parameters
    lines = [
        f"{plan.model_class} -> {plan.variant}: {len(plan.converted)} FFN blocks to convert in {plan.dtype}, "
        + ("exactly" if plan.exact else "approximately"),
        f"  saves as    {plan.tier} ({plan.tier_reason})",
        f"  parameters  {plan.total_parameters:,} -> {plan.total_parameters + growth:,}"
        f"  (FFN {before.parameters:,} -> {after.parameters:,})",
        f"  FFN FLOPs   {before.flops_per_token:,} -> {after.flops_per_token:,} per token",
        f"  FFN memory  {before.bytes / 2**20:,.1f} -> {after.bytes / 2**20:,.1f} MiB of weights",
    ]
    narrow = next((entry for entry in plan.sites if entry.width != entry.site.width), None)
    if narrow is not None:
        old = narrow.site.width
        lines.append(
            f"  width       {old} -> {narrow.width} neurons ({narrow.width / old:.0%}): LOSSY; only {old} keeps what "
            "was learned"
        )
        lines += [f"    {line}" for line in ([] if plan.narrowing is None else plan.narrowing.lines())]
    if plan.calibration is not None:
        lines.append(f"  calibrated  {plan.calibration}")
    lines += [f"  config      {key} = {value!r}" for key, value in plan.config_changes.items()]
    for entry in plan.sites:
        site = entry.site
        lines.append(
            f"  {site.up}: {entry.conversion}, {site.layout} {site.activation} -> {entry.variant}, "
            f"{site.d_in} x {entry.width} x {site.d_out}, {entry.error}"
        )
    lines += [f"  {entry.path}: refused, {entry.reason}" for entry in plan.refused]
    lines += [f"  {entry.path}: left as it is, {entry.reason}" for entry in plan.unselected]
    return lines
