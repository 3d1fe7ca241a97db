"""Was the conversion what its plan promised? Measured, on the same inputs before and after.

Three levels, each catching what the others cannot:

* every site in float64 on random neurons: tells rounding (1e-16) from a wrong formula, however deep the model;
* the whole model, in the dtype that will be saved and in float32: what a user will see;
* the value branch: it receives gradient, and moving it moves the output, so the conversion was not a no-op.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_geglu.conversions import Coefficients, NewWeights, Scaling, branch_outputs, value_offset
from hf_geglu.distance import Comparison, Outputs, comparison, outputs_of
from hf_geglu.errors import VerificationError
from hf_geglu.inputs import Inputs
from hf_geglu.modes import evaluating
from hf_geglu.plan import Plan, SitePlan
from hf_geglu.sites import Site
from hf_geglu.sites.weights import bias_name, entries, experts_in, output_dim, parameters_of, rows, weight_name
from hf_geglu.surgery import Undo

NEURONS, VECTORS = 512, 64
"""How many neurons of a site, and how many input vectors for each, the float64 check takes."""

EXACT_NOISE = 1000
"""An exact conversion may move a model's outputs by this many rounding steps of float32 or float64, relative to the
largest output. Deep models amplify a rounding by 10 to 100; the nearest wrong formula (tanh for erf) starts at 4000
float32 steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCheck:
    """One converted block in float64, before its down projection."""

    path: str
    max_abs: float
    """Largest difference of a neuron's output."""
    allowed: float
    """What scaling and rounding of the weights allow where that difference was largest in proportion."""
    rms: float
    """Root mean square of the difference relative to that of the outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueBranch:
    """Proof that a site's new branch is alive."""

    path: str
    gradient: float | None
    """Norm of the gradient of its weights; None where these inputs do not reach the site."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was measured. Frozen; prints itself."""

    model_class: str
    variant: str
    tier: str
    exact: bool
    """What the plan promised: exact, or approximate within the bounds of its sites."""
    converted: int
    comparisons: tuple[Comparison, ...]
    """Whole model, own dtype first. Empty where it was not run, see `note`."""
    sites: tuple[SiteCheck, ...]
    values: tuple[ValueBranch, ...]
    response: float | None
    """How far the output moved, relative to its size, when the value branches were moved by 10 %."""
    note: str = ""
    held_out: str | None = None
    """What the whole model was measured to lose on calibration data that no fit was made on."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        worst = max((check.max_abs for check in self.sites), default=0.0)
        lines = [
            f"{self.model_class}: {self.converted} FFN blocks are {self.variant} now, "
            f"{'exact' if self.exact else 'approximate'}, saves as {self.tier}",
            f"  blocks in float64: largest difference {worst:.3g}",
        ]
        lines += [f"  {entry}" for entry in self.comparisons]
        if self.held_out is not None:
            lines.append(f"  on held-out calibration data: {self.held_out}")
        reached = [entry.gradient for entry in self.values if entry.gradient is not None]
        if reached:
            lines.append(f"  value branches with gradient: {sum(g > 0 for g in reached)} of {len(self.values)}")
        if self.response is not None:
            lines.append(f"  moving the value branches by 10 % moves the output by {self.response:.2%}")
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join(lines)


def check_sites(model: nn.Module, undo: Undo) -> tuple[SiteCheck, ...]:
    """Compare every converted site with what it was, in float64 on random neurons and inputs.

    A site that was fitted has no bound over all inputs: its neurons are compared with the fitted line, up to rounding,
    and how far that is from the original the plan says, as it was measured on the calibration's held-out part.

    Raises:
        VerificationError: a neuron differs by more than its scaling's bound and the rounding of the weights explain.
    """
    generator = torch.Generator().manual_seed(0)
    checks = []
    for entry in undo.plan.converted:
        line = undo.line(entry)
        if isinstance(line, NewWeights):
            checks.append(_check_replaced(model, entry.site, line))
            continue
        if isinstance(line, Coefficients):
            _check_down(model, entry.site, undo, line)
        check, within = _check_site(model, entry, undo, generator)
        if not within:
            promised = "exact" if entry.exact else f"within {entry.scaling.max_error:.2g}"
            if entry.fitted:
                promised = "what was fitted"
            raise VerificationError(
                f"{check.path} was planned to be {promised}, but a neuron differs by {check.max_abs:.3g} where "
                f"{check.allowed:.3g} is allowed; the model was put back. Please report this with the model's name"
            )
        checks.append(check)
    return tuple(checks)


def _check_replaced(model: nn.Module, site: Site, new: NewWeights) -> SiteCheck:
    """New weights are compared number by number: they are what they were found to be, up to the dtype's rounding."""
    for name, tensor in new.parameters(site).items():
        held = model.get_parameter(name)
        difference = (held.detach() - tensor.reshape(held.shape).to(held)).abs().max().item()
        if difference != 0.0:
            raise VerificationError(
                f"{name} differs by {difference:.3g} from what was fitted; the model was put back. Please report this "
                "with the model's name"
            )
    return SiteCheck(path=site.up, max_abs=0.0, allowed=0.0, rms=0.0)


def _check_down(model: nn.Module, site: Site, undo: Undo, line: Coefficients) -> None:
    """A corrected down projection is what it was and the product of the two factors, up to rounding."""
    if line.left is None or line.right is None:
        return
    name = weight_name(site.down, site.projection)
    old, new = undo.parameters[name], model.get_parameter(name).detach()
    assert old is not None
    added = (line.left.double() @ line.right.double()).to(new.device)
    added = (added.T if site.projection == "conv1d" else added).reshape(new.shape)
    difference = (new.double() - old.detach().double() - added).abs()
    allowed = torch.finfo(new.dtype).eps * (old.detach().double().abs() + added.abs())
    if not bool((difference <= allowed + 1e-12 * added.abs().max()).all()):
        raise VerificationError(
            f"{name} differs by {difference.max():.3g} from what was fitted; the model was put back. Please report "
            "this with the model's name"
        )


def _check_site(model: nn.Module, entry: SitePlan, undo: Undo, generator: torch.Generator) -> tuple[SiteCheck, bool]:
    site, scaling = entry.site, entry.scaling
    neurons = torch.randperm(site.width, generator=generator)[:NEURONS]
    now: Parameters = dict(parameters_of(model, site))
    held = experts_in(model.get_parameter(weight_name(site.up, site.projection)).shape, site)
    experts = torch.randint(held, neurons.shape, generator=generator)
    old_gate, old_value = _branches({**now, **undo.parameters}, site, neurons, experts, dense=not site.gated)
    new_gate, new_value = _branches(now, site, neurons, experts, dense=False)
    assert new_value is not None
    x_D = torch.randn((VECTORS, old_gate[0].shape[-1]), generator=generator, dtype=torch.float64)
    # pre-activations of a few units, where the activations differ from their asymptotes
    x_D = x_D * (2.0 / _apply(x_D, old_gate).std().clamp_min(1e-30))

    high = math.inf if site.limit is None else site.limit
    act_before, act_after = undo.activations[site.up], _installed_gate(model, entry)
    z = _apply(x_D, old_gate).clamp(max=high)
    value = 1.0 if old_value is None else _apply(x_D, old_value).clamp(-high, high) + site.value_offset
    fit = undo.line(entry)
    if isinstance(fit, Coefficients):
        of = fit.of_neurons(neurons, experts)
        scaled_value = value * of.beta if site.gated else of.alpha * z + of.beta
        before = act_after(of.a * z + of.b) * scaled_value
        slope = torch.as_tensor(of.a).abs() * torch.as_tensor(of.beta).abs() + torch.as_tensor(of.b).abs() + 1.0
        # no error of its own; a value branch that reads the gate's input rounds with it
        rounding = Scaling("linear", "linear", alpha=0.0 if fit.fits_gated else 1.0)
        allowed = _allowed(x_D, old_gate, old_value, before, scaled_value, rounding, _dtype(model, site)) * (1 + slope)
    else:
        before = act_before(z) * value
        allowed = _allowed(x_D, old_gate, old_value, before, value, scaling, _dtype(model, site))
    new_z, new_v = _apply(x_D, new_gate).clamp(max=high), _apply(x_D, new_value).clamp(-high, high)
    after = act_after(new_z) * (new_v + value_offset(site, scaling))

    difference = (after - before).abs()
    worst = int((difference - allowed).argmax())
    check = SiteCheck(
        path=site.up,
        max_abs=difference.max().item(),
        allowed=allowed.flatten()[worst].item(),
        rms=(difference.square().mean() / before.square().mean().clamp_min(1e-300)).sqrt().item(),
    )
    return check, bool((difference <= allowed).all())


Branch = tuple[torch.Tensor, torch.Tensor | None]


def _allowed(
    x_D: torch.Tensor,
    gate: Branch,
    value: Branch | None,
    hidden: torch.Tensor,
    value_out: torch.Tensor | float,
    scaling: Scaling,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Scaling's bound, plus rounding: a weight rounded to `dtype` moves a product by at most eps/2 of the sum of the
    magnitudes |x||W|, and the activations here have slopes up to 1.13 and 2|z| (ReLU^2)."""
    eps = torch.finfo(dtype).eps
    magnitude = x_D.abs() @ gate[0].abs().T + (0.0 if gate[1] is None else gate[1].abs())
    size = torch.as_tensor(value_out, dtype=torch.float64).abs()
    rounding = magnitude * (size + (scaling.alpha != 0.0) * magnitude)
    if value is not None:
        value_magnitude = x_D.abs() @ value[0].abs().T + (0.0 if value[1] is None else value[1].abs())
        rounding = rounding + magnitude * value_magnitude
    return scaling.max_error * size + 2 * eps * rounding + 1e-12 * hidden.abs()


Parameters = Mapping[str, nn.Parameter | None]


def _branches(
    parameters: Parameters,
    site: Site,
    neurons: torch.Tensor,
    experts: torch.Tensor,
    *,
    dense: bool,
) -> tuple[Branch, Branch | None]:
    """(gate, value) as float64 (weight (n, D), bias (n,)) for those neurons; no value for a dense block."""
    if dense or site.layout == "separate":
        gate = _rows(parameters, site.gate, site, neurons, experts)
        return gate, None if dense else _rows(parameters, site.up, site, neurons, experts)
    gate, value = (_rows(parameters, site.up, site, outputs[neurons], experts) for outputs in branch_outputs(site))
    return gate, value


def _rows(parameters: Parameters, path: str, site: Site, outputs: torch.Tensor, experts: torch.Tensor) -> Branch:
    weight = parameters[weight_name(path, site.projection)]
    bias = parameters.get(bias_name(path, site.projection))
    assert weight is not None
    where = outputs.to(weight.device), experts.to(weight.device)
    wide = rows(weight.detach(), site.projection, *where).to("cpu", torch.float64)
    return wide, None if bias is None else entries(bias.detach(), *where).to("cpu", torch.float64)


def _apply(x_D: torch.Tensor, branch: Branch) -> torch.Tensor:
    return nn.functional.linear(x_D, *branch)


def _installed_gate(model: nn.Module, entry: SitePlan) -> Any:
    from hf_geglu.modeling_geglu import PackedGLU, get_attribute

    assert entry.site.activation_path is not None
    installed = get_attribute(model, entry.site.activation_path)
    return installed.activation if isinstance(installed, PackedGLU) else installed


def _dtype(model: nn.Module, site: Site) -> torch.dtype:
    return model.get_parameter(weight_name(site.up, site.projection)).dtype


def check_exactness(plan: Plan, comparisons: tuple[Comparison, ...], noise: dict[str, float]) -> None:
    """Raise where an exact plan moved the whole model by more than rounding does.

    Args:
        plan: what was promised.
        comparisons: what was measured.
        noise: for a dtype below float32, how far the original itself is from its own float32 outputs.
    """
    for entry in comparisons if plan.exact else ():
        eps = torch.finfo(getattr(torch, entry.dtype)).eps
        allowed = 2 * noise[entry.dtype] + 1e-6 if entry.dtype in noise else EXACT_NOISE * eps
        if not entry.max_rel <= allowed:
            raise VerificationError(
                f"the plan is exact, but in {entry.dtype} the {entry.output} moved by {entry.max_rel:.3g} of their "
                "largest "
                f"value, where {allowed:.3g} is rounding; the model was put back. If the model is not deterministic "
                "in eval "
                "mode, say verify='sites'"
            )


def check_values(model: nn.Module, plan: Plan, inputs: Inputs) -> tuple[tuple[ValueBranch, ...], float]:
    """Gradient of every value branch, and how far the output moves when all of them move by 10 %.

    Raises:
        VerificationError: no value branch that these inputs reach has any gradient.
    """
    branches = {entry.site.up: _value_parameter(model, entry) for entry in plan.converted}
    parameters = [parameter for parameter, _ in branches.values()]
    required = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            outputs = outputs_of(model, inputs)
            loss = sum((_projected(tensor) for tensor in outputs.values()), torch.zeros(()))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for parameter, flag in zip(parameters, required, strict=True):
            parameter.requires_grad_(flag)
    values = tuple(
        ValueBranch(path=path, gradient=None if gradient is None else _norm(gradient, mask))
        for (path, (_, mask)), gradient in zip(branches.items(), gradients, strict=True)
    )
    reached = [value for value in values if value.gradient is not None]
    if reached and not any(value.gradient for value in reached):
        raise VerificationError(
            "no value branch receives any gradient, so this variant would never learn to be one; the model was put "
            "back. "
            "Does its output depend on its FFN blocks at all (zero-initialised down projections)?"
        )
    before = {name: tensor.detach() for name, tensor in outputs.items()}
    return values, _response(model, plan, list(branches.values()), before, inputs)


def _projected(output: torch.Tensor) -> torch.Tensor:
    """A number that moves when an output moves: its product with fixed noise. (Its mean square would not do: what a
    LayerNorm gives has mean square 1 whatever it is given.)"""
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.device)
    finite = output.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # masked logits
    return (finite * noise).mean().cpu()


def _value_parameter(model: nn.Module, entry: SitePlan) -> tuple[nn.Parameter, torch.Tensor | None]:
    """The weight that holds the value branch, and a mask over it of which of its outputs that is (None: all)."""
    site = replace(entry.site, width=entry.width)
    weight = model.get_parameter(weight_name(site.up, site.projection))
    if site.layout == "separate":
        return weight, None
    _, outputs = branch_outputs(site)
    dim = output_dim(site.projection)
    mask_O = torch.zeros(2 * site.width, dtype=torch.bool, device=weight.device)
    mask_O[outputs.to(weight.device)] = True
    return weight, mask_O.view([-1 if each == dim else 1 for each in range(weight.dim())])


def _norm(gradient: torch.Tensor, mask: torch.Tensor | None) -> float:
    return float((gradient if mask is None else gradient * mask).float().norm())


def _response(
    model: nn.Module,
    plan: Plan,
    branches: list[tuple[nn.Parameter, torch.Tensor | None]],
    before: Outputs,
    inputs: Inputs,
) -> float:
    """Relative change of the outputs when every value branch is moved by 10 % of the size of its weights.

    A dense block's value weights were zero; there the scale is that of the block's original weights, times the constant
    that the value branch stands at.
    """
    saved = [parameter.detach().clone() for parameter, _ in branches]
    generator = torch.Generator().manual_seed(1)
    try:
        with torch.no_grad():
            for entry, (parameter, mask) in zip(plan.converted, branches, strict=True):
                wide, scaling = parameter.detach().float(), entry.scaling
                scale = 1.0 if entry.site.gated else (scaling.beta or scaling.alpha) / scaling.a
                step = torch.randn(wide.shape, generator=generator).to(wide.device) * wide.std() * 0.1 * scale
                parameter.copy_(wide + (step if mask is None else step * mask))
        with evaluating(model), torch.no_grad():
            after = outputs_of(model, inputs)
    finally:
        with torch.no_grad():
            for (parameter, _), original in zip(branches, saved, strict=True):
                parameter.copy_(original)
    return comparison(before, after, dtype="float32").max_rel
