"""The plan: what a conversion will do to a model, decided before anything is touched.

A plan holds no tensors. It is frozen, prints itself, and goes to JSON and back without loss. `planning.make_plan` makes
it, `surgery.apply` carries it out, a saved variant records it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_geglu.choice import CalibrationRecord, FitRecord
from hf_geglu.conversions import Scaling
from hf_geglu.cost import Cost
from hf_geglu.errors import PlanError
from hf_geglu.narrow_record import NarrowRecord
from hf_geglu.sites import Site

SCHEMA = 1

Conversion = Literal["expand", "retarget", "keep"]
Tier = Literal["native", "portable", "in-memory"]
GeluForm = Literal["owner", "named"]


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
