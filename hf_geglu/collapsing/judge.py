"""Which value branches are constant? Read off the weights; where a tolerance is allowed, off the inputs too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_geglu.collapsing.evidence import Spread, spreads
from hf_geglu.collapsing.origin import Origin
from hf_geglu.collapsing.plan import Kept, SiteCollapse
from hf_geglu.conversions import at_start, packed_halves, rewrites, value_offset
from hf_geglu.conversions.precision import rounded
from hf_geglu.inputs import Inputs
from hf_geglu.sites import Site
from hf_geglu.sites.projections import Port, read_port
from hf_geglu.sites.weights import bias_name, is_stack, output_dim, parameters_of, weight_name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict:
    """What is to become of one block."""

    origin: Origin
    decision: SiteCollapse | Kept
    factors: torch.Tensor | None = None
    """(F,) or (E, F), float64: by what each neuron goes into the down projection, relative to the conversion's
    constant. None where all are 1."""


@dataclass(slots=True, eq=False)
class _Open:
    """A block whose value branch has moved, but may be near enough to a constant."""

    origin: Origin
    weight_FD: torch.Tensor
    constants_F: torch.Tensor
    """What its bias says, before the mean of ``Wv x`` is added."""
    start: float
    """The constant of the conversion."""


def judge(
    model: nn.Module,
    origins: Sequence[Origin],
    *,
    others: Sequence[Origin] = (),
    tolerance: float,
    batches: Sequence[Inputs],
) -> tuple[tuple[Verdict, ...], int]:
    """A verdict for each block, and the largest number of inputs that any was measured on.

    Args:
        model: a variant.
        origins: the blocks in question.
        others: converted blocks that stay in any case.
        tolerance: largest relative deviation of a neuron's value from a constant.
        batches: keyword arguments of a forward each, for a tolerance above 0.
    """
    verdicts: dict[str, Verdict] = {}
    undecided: dict[str, _Open] = {}
    for origin in origins:
        found = _from_weights(model, origin, tolerance)
        if isinstance(found, _Open):
            undecided[origin.site.up] = found
        else:
            verdicts[origin.site.up] = found
    tokens = 0
    if undecided:
        seen = spreads(model, {path: (each.origin.site, each.weight_FD) for path, each in undecided.items()}, batches)
        tokens = max((spread.tokens for spread in seen.values()), default=0)
        for path, each in undecided.items():
            verdicts[path] = _from_inputs(model, each, seen.get(path), tolerance)
    left = [_stays(origin, "not selected by layers=") for origin in others]
    return _together([*(verdicts[origin.site.up] for origin in origins), *left]), tokens


def _from_weights(model: nn.Module, origin: Origin, tolerance: float) -> Verdict | _Open:
    site, scaling = origin.site, origin.scaling
    parameters = parameters_of(model, site)
    weight_at, bias_at = weight_name(site.up, site.projection), bias_name(site.up, site.projection)
    weight, bias = parameters.get(weight_at), parameters.get(bias_at)
    dim = output_dim(site.projection)
    if origin.fit is not None:
        if _is_original(parameters_of(model, site, down=True), origin):
            return _collapses(model, origin)
        return _stays(origin, "its conversion was fitted to activations, and it was trained since")
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        return _stays(origin, "it carries an adapter or is quantised; merge it, or load it in bfloat16 or float32")
    if is_stack(site.projection) and weight.ndim != 3:
        return _stays(origin, "its experts lie one after the other in two dimensions")
    if weight.shape[dim] != 2 * site.width:
        return _stays(
            origin,
            f"it was {site.width} neurons wide and its packed projection now has {weight.shape[dim]} outputs, which no "
            "dense block of its class takes",
        )
    if bias is not None and not origin.biased:
        gate_bias, _ = packed_halves(bias.detach(), dim=bias.dim() - 1, groups=site.groups)
        if gate_bias.any():
            return _stays(origin, "the bias of its gate was trained, and the dense block has none")
    constant = scaling.beta - value_offset(site, scaling)
    weight_ok = at_start(weight.detach(), scaling, dim=dim, groups=site.groups)
    bias_ok = bias is None or at_start(
        bias.detach(), scaling, constant=constant, dim=bias.dim() - 1, groups=site.groups
    )
    if weight_ok and bias_ok:
        return _collapses(model, origin)
    if not scaling.fits_gated:
        return _stays(
            origin, f"{site.activation} needs its value branch as the conversion made it, and that was trained since"
        )
    offset = value_offset(site, scaling)
    start = scaling.beta if offset else float(rounded(torch.tensor(scaling.beta), weight.dtype))
    constants = torch.full((site.width,), offset, dtype=torch.float64, device=weight.device)
    if bias is not None:
        constants = constants + packed_halves(bias.detach(), dim=bias.dim() - 1, groups=site.groups)[1].double()
    if weight_ok:
        return _constant(model, origin, constants / start)
    gate, value = packed_halves(weight.detach(), dim=dim, groups=site.groups)
    if tolerance == 0.0 or is_stack(site.projection):
        ratio = (value.double().norm() / gate.double().norm().clamp_min(1e-300)).item()
        learned = f"its value branch has learned: |Wv| / |Wg| = {ratio:.3g}"
        return _stays(origin, learned if not tolerance else f"{learned}, and experts collapse exactly or not at all")
    if site.groups > 1:
        return _stays(origin, "its value branch has learned, and grouped projections collapse exactly or not at all")
    rows_FD = (value.T if site.projection == "conv1d" else value.flatten(1)).double()
    return _Open(origin, rows_FD, constants, start)


def _from_inputs(model: nn.Module, each: _Open, spread: Spread | None, tolerance: float) -> Verdict:
    origin = each.origin
    if spread is None:
        return _stays(origin, "its value branch has learned, and no input reached it")
    constants_F = each.constants_F + each.weight_FD @ spread.mean_D
    size_F = constants_F.abs().clamp_min(1e-300)
    bound = (each.weight_FD.norm(dim=1) * spread.radius / size_F).max().item()
    measured = (spread.deviation_F / size_F).max().item()
    if bound > tolerance:
        return _stays(
            origin,
            f"its value branch moves by up to {bound:.3g} of a constant (measured {measured:.3g}), more than the "
            f"tolerance {tolerance:g}",
        )
    return _constant(model, origin, constants_F / each.start, bound=bound, measured=measured)


def _constant(
    model: nn.Module, origin: Origin, factors: torch.Tensor, *, bound: float = 0.0, measured: float = 0.0
) -> Verdict:
    """Every neuron has its constant; those that are not the conversion's must find room in the down projection."""
    if torch.equal(factors, torch.ones_like(factors)):
        return _collapses(model, origin, bound=bound, measured=measured)
    reason = why_not_foldable(model, origin.site)
    if reason:
        return _stays(origin, f"its value branch is constant, but not the conversion's constant, and {reason}")
    return _collapses(model, origin, factors=factors, bound=bound, measured=measured)


def why_not_foldable(model: nn.Module, site: Site) -> str:
    """Why no constant can go into the down projection; empty where it can."""
    name = weight_name(site.down, site.projection)
    owner, _, attribute = name.rpartition(".")
    weight = model.get_submodule(owner)._parameters.get(attribute)
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        return f"{site.down} carries an adapter or is quantised"
    if is_stack(site.projection):
        return "" if weight.ndim == 3 else f"{site.down} holds its experts one after the other"
    port = down_port(model, site)
    if port is None or port.form not in ("linear", "conv1d", "pointwise") or port.d_in != site.width:
        return f"{site.down} does not read one neuron a column"
    holders = {id(module) for module in model.modules() if any(p is weight for p in module._parameters.values())}
    return "" if len(holders) == 1 else f"{name} is tied to another weight"


def down_port(model: nn.Module, site: Site) -> Port | None:
    """Form and widths of a site's down projection, None for a stack of experts."""
    return None if is_stack(site.projection) else read_port(model.get_submodule(site.down))


def _collapses(
    model: nn.Module,
    origin: Origin,
    *,
    factors: torch.Tensor | None = None,
    bound: float = 0.0,
    measured: float = 0.0,
) -> Verdict:
    site = origin.site
    parameters = parameters_of(model, site)
    kept = sum(
        parameter.numel() // 2
        for name, parameter in parameters.items()
        if name == weight_name(site.up, site.projection) or origin.biased
    )
    if origin.fit is not None:  # it may have another width
        parameters = parameters_of(model, site, down=True)
        old = [each for name, each in origin.parameters.items() if name in parameters]
        same = [each for name, each in parameters.items() if name not in origin.parameters]
        kept = sum(each.numel() for each in (*old, *same) if each is not None)
    decision = SiteCollapse(
        site=site,
        scaling=origin.scaling,
        folded=0 if factors is None else int((factors != 1.0).sum()),
        bound=bound,
        measured=measured,
        original=factors is None and bound == 0.0 and _is_original(parameters_of(model, site, down=True), origin),
        removed=sum(parameter.numel() for parameter in parameters.values()) - kept,
        fitted=origin.fit is not None,
    )
    return Verdict(origin=origin, decision=decision, factors=factors)


def _is_original(parameters: dict[str, nn.Parameter], origin: Origin) -> bool:
    """Whether the packed parameters are what the conversion makes of the originals, bit for bit."""
    weight = weight_name(origin.site.up, origin.site.projection)
    old = origin.parameters.get(weight)
    if old is None:
        return False
    shapes = {name: tuple(each.shape) for name, each in origin.parameters.items() if each is not None}
    for change in rewrites(origin.site, origin.fit or origin.scaling, shapes):
        given = origin.parameters.get(change.name)
        now = parameters.get(change.name)
        made = change.function(old.new_zeros(change.old_shape) if given is None else given.detach())
        if now is None or now.dtype != made.dtype or now.device != made.device or not torch.equal(now, made):
            return False
    return True


def _stays(origin: Origin, reason: str) -> Verdict:
    return Verdict(origin=origin, decision=Kept(path=origin.site.up, reason=reason))


def _together(verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """Blocks that go through one activation attribute collapse together or not at all."""
    staying = {verdict.origin.site.activation_path for verdict in verdicts if isinstance(verdict.decision, Kept)}
    return tuple(
        _stays(verdict.origin, "another block goes through the same activation and cannot collapse")
        if isinstance(verdict.decision, SiteCollapse) and verdict.origin.site.activation_path in staying
        else verdict
        for verdict in verdicts
    )
