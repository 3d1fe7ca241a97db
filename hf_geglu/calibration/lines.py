"""From the distribution at a site to the line of each of its neurons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_geglu.calibration.fitting import GATES, Parameter, fit_lines
from hf_geglu.calibration.histogram import WeightedHistogram
from hf_geglu.calibration.seen import why_unseen
from hf_geglu.conversions import Coefficients, Scaling
from hf_geglu.functional import ACTIVATIONS, activation
from hf_geglu.plan import SitePlan
from hf_geglu.sites import Site
from hf_geglu.sites.weights import bias_name, is_stack, parameters_of, weight_name

EXACT = "its conversion is exact"
PRIOR = 0.1
"""Share of the prior in each neuron's distribution, see `WeightedHistogram.points`. On SmolLM2, calibrated on one
domain and measured on another, .1 was best of .02 to 1."""

TOGETHER = 512
"""Neurons that are fitted together: 27 MB of intermediate results."""


def why_not_fitted(model: nn.Module, entry: SitePlan) -> str:
    """Empty where lines can be fitted to a site, else the reason why its table row is all there is."""
    if entry.conversion == "keep":
        return "it is what was asked for already"
    if entry.scaling.exact:
        return EXACT
    if entry.scaling.gate not in GATES or entry.scaling.source not in ACTIVATIONS:
        return f"no line is fitted from {entry.scaling.source!r} to {entry.scaling.gate!r}"
    if entry.site.value_offset:
        return "it multiplies by value + a constant, so that its value branch cannot be scaled"
    return why_unseen(model, entry.site)


def free_parameters(model: nn.Module, site: Site, *, direct: bool) -> tuple[Parameter, ...]:
    """Which numbers of the line a block has a place for.

    A gated block scales gate and value, and shifts the gate where that has a bias. A dense block has a free value
    branch too, and d where the down projection reads the unit as it is and has a bias to keep it in.
    """
    names = parameters_of(model, site, down=True)
    stacked = is_stack(site.projection)
    if site.gated:
        return ("a", "b", "beta") if bias_name(site.gate, site.projection) in names else ("a", "beta")
    if stacked:  # the constant of the value branch is one number for all
        return ("a", "b", "alpha") if bias_name(site.up, site.projection) in names else ("a", "alpha")
    biased = direct and bias_name(site.down, site.projection) in names
    return ("a", "b", "alpha", "beta", "d") if biased else ("a", "b", "alpha", "beta")


def fit_site(model: nn.Module, entry: SitePlan, seen: WeightedHistogram) -> Coefficients:
    """The line of each neuron by weighted least squares, from the row of the table on."""
    site, row = entry.site, entry.scaling
    weights, points = seen.points(PRIOR)
    start = {name: torch.full((len(points),), value, dtype=torch.float64) for name, value in _numbers(row).items()}
    free = free_parameters(model, site, direct=bool(seen.direct))
    parts = [
        fit_lines(
            activation(row.source)(points[some]),
            points[some],
            weights[some],
            row.gate,
            {name: values[some] for name, values in start.items()},
            free,
        )[0]
        for some in (slice(first, first + TOGETHER) for first in range(0, len(points), TOGETHER))
    ]
    line = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    shape = (-1, site.width) if is_stack(site.projection) else (site.width,)

    def shaped(name: Parameter, usual: float) -> float | torch.Tensor:
        return line[name].reshape(shape).float() if name in free else usual

    output = None
    if "d" in free:
        output = (seen.down.double() @ line["d"]).float()
    return Coefficients(
        a=shaped("a", row.a),
        b=shaped("b", 0.0),
        alpha=shaped("alpha", row.alpha),
        beta=shaped("beta", row.beta),
        output=output,
    )


def down_matrix(model: nn.Module, site: Site) -> torch.Tensor:
    """The weight of a site's down projection as (D, F), of stacked experts (E, D, F); on the CPU, in float32."""
    weight = model.get_parameter(weight_name(site.down, site.projection)).detach().to("cpu", torch.float32)
    if site.projection in ("conv1d", "stack_transposed"):
        return weight.transpose(-1, -2)
    return weight.flatten(1) if site.projection == "pointwise" else weight


def fitted_sites(model: nn.Module, entries: Sequence[SitePlan]) -> tuple[tuple[SitePlan, ...], dict[str, str]]:
    """Those that lines can be fitted to, and the reasons of the others by their `up`."""
    reasons = {entry.site.up: why_not_fitted(model, entry) for entry in entries}
    return tuple(entry for entry in entries if not reasons[entry.site.up]), {p: r for p, r in reasons.items() if r}


def _numbers(row: Scaling) -> dict[Parameter, float]:
    return {"a": row.a, "b": 0.0, "alpha": row.alpha, "beta": row.beta, "d": 0.0}
