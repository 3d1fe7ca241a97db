"""From what the finder saw to identities."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hf_geglu.identifying.curves import Curve
from hf_geglu.identifying.identity import UNLIMITED, Identity, family_of
from hf_geglu.modeling_geglu import get_attribute
from hf_geglu.sites import FoundSites, Site
from hf_geglu.sites.find import Evidence
from hf_geglu.sites.weights import bias_name


def identities_of_sites(model: nn.Module, found: FoundSites, evidence: Mapping[str, Evidence]) -> tuple[Identity, ...]:
    """One for each site, in the same order."""
    return tuple(_identity(model, site, evidence[site.up]) for site in found.sites)


def _identity(model: nn.Module, site: Site, evidence: Evidence) -> Identity:
    block = model.get_submodule(site.block) if site.block else model
    high = site.limit
    curve = Curve(site.activation, high=high)
    return Identity(
        family=family_of(site.activation) if site.gated else "dense",
        formula=_formula(site, curve),
        activation=site.activation,
        scale=1.0,
        gate=site.gate,
        value=site.up if site.gated else None,
        down=site.down,
        layout=site.layout,
        gate_half=site.gate_half,
        value_offset=site.value_offset,
        gate_limits=(None, high),
        value_limits=UNLIMITED if high is None else (-high, high),
        gate_bias=_has_bias(model, site.gate, site),
        value_bias=_has_bias(model, site.up, site) if site.gated else None,
        down_bias=_has_bias(model, site.down, site),
        notes=() if evidence.direct else ("something follows between the unit and the down projection",),
        path=site.block,
        class_name=type(block).__name__,
        error=evidence.fit.error,
        runner_up=None if evidence.runner_up is None else evidence.runner_up.activation,
        runner_up_error=None if evidence.runner_up is None else evidence.runner_up.error,
    )


def _formula(site: Site, curve: Curve) -> str:
    if not site.gated:
        return curve.spelled("z")
    value = "value" if site.limit is None else f"clamp(value, {-site.limit:g}, {site.limit:g})"
    return f"{curve.spelled('gate')} * {f'({value} + {site.value_offset:g})' if site.value_offset else value}"


def _has_bias(model: nn.Module, path: str, site: Site) -> bool:
    name = bias_name(path, site.projection)
    try:
        return get_attribute(model, name) is not None
    except AttributeError:
        return False
