"""Does each dense block compute what the gated one did? In float64, on random neurons and inputs.

Legend of suffixes: N neurons, D inputs of a block, B random inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hf_geglu.collapsing.judge import Verdict
from hf_geglu.collapsing.plan import CollapsePlan, SiteCollapse
from hf_geglu.conversions import branch_outputs, value_offset
from hf_geglu.distance import Comparison
from hf_geglu.errors import VerificationError
from hf_geglu.functional import activation
from hf_geglu.modeling_geglu import get_attribute
from hf_geglu.sites import Site
from hf_geglu.sites.weights import bias_name, entries, experts_in, parameters_of, rows, weight_name
from hf_geglu.verify import EXACT_NOISE, NEURONS, VECTORS, SiteCheck

Parameters = Mapping[str, torch.Tensor]
Branch = tuple[torch.Tensor, torch.Tensor | None]


def check_sites(
    model: nn.Module, verdicts: tuple[Verdict, ...], packed: Mapping[str, Parameters], gates: Mapping[str, nn.Module]
) -> tuple[SiteCheck, ...]:
    """Compare every block that collapsed with what it was.

    Args:
        model: after the surgery.
        verdicts: of those blocks.
        packed: their parameters before, by the path of the up projection.
        gates: what their gates went through, by the same.

    Raises:
        VerificationError: a neuron differs by more than the conversion's own bound and rounding explain.
    """
    generator = torch.Generator().manual_seed(0)
    checks = []
    for verdict in verdicts:
        site = verdict.origin.site
        if verdict.origin.fit is not None:
            continue  # the originals were put back, whose bits were compared
        check, within = _check(model, verdict, packed[site.up], gates[site.up], generator)
        if not within:
            raise VerificationError(
                f"{site.up} was to be dense again, but a neuron differs by {check.max_abs:.3g} where "
                f"{check.allowed:.3g} is allowed; the model was put back. Please report this with the model's name"
            )
        checks.append(check)
    return tuple(checks)


def _check(
    model: nn.Module, verdict: Verdict, packed: Parameters, gate_activation: nn.Module, generator: torch.Generator
) -> tuple[SiteCheck, bool]:
    site, scaling = verdict.origin.site, verdict.origin.scaling
    decision = verdict.decision
    assert isinstance(decision, SiteCollapse)
    now = parameters_of(model, site)
    weight = now[weight_name(site.up, site.projection)]
    picked = torch.randperm(site.width, generator=generator)[:NEURONS]
    experts = torch.randint(experts_in(weight.shape, site), picked.shape, generator=generator)
    gate_at, value_at = (outputs[picked] for outputs in branch_outputs(site))
    gate, value = (_rows(packed, site, outputs, experts) for outputs in (gate_at, value_at))
    dense = _rows(now, site, picked, experts)
    x_BD = torch.randn((VECTORS, dense[0].shape[-1]), generator=generator, dtype=torch.float64)
    x_BD = x_BD * (2.0 / _linear(x_BD, dense).std().clamp_min(1e-30))

    factors_N = torch.ones(len(picked), dtype=torch.float64)
    if verdict.factors is not None:
        factors = verdict.factors.cpu()
        factors_N = factors[experts, picked] if factors.dim() == 2 else factors[picked]
    value_BN = _linear(x_BD, value) + value_offset(site, scaling)
    if not decision.exact:  # what it was replaced by; how far that is from the value on real inputs is in the plan
        value_BN = (scaling.beta * factors_N).expand_as(value_BN)
    before = gate_activation(_linear(x_BD, gate)) * value_BN
    after = _dense_activation(model, site)(_linear(x_BD, dense)) * factors_N
    difference = (after - before).abs()
    # as in hf_geglu.verify: eps/2 of the sum of magnitudes for each rounding, slopes up to 1.13 and 2|z|
    magnitude = x_BD.abs() @ dense[0].abs().T + (0.0 if dense[1] is None else dense[1].abs())
    rounding = magnitude * factors_N.abs() * (1.0 + (scaling.alpha != 0.0) * magnitude)
    allowed = scaling.max_error * factors_N.abs() + 2 * torch.finfo(weight.dtype).eps * rounding + 1e-12 * before.abs()
    worst = int((difference - allowed).argmax())
    check = SiteCheck(
        path=site.up,
        max_abs=difference.max().item(),
        allowed=allowed.flatten()[worst].item(),
        rms=(difference.square().mean() / before.square().mean().clamp_min(1e-300)).sqrt().item(),
    )
    return check, bool((difference <= allowed).all())


def _dense_activation(model: nn.Module, site: Site) -> nn.Module:
    if site.activation_call is not None:  # concealed again in the block's `forward`
        return activation(site.activation)  # type: ignore[return-value]
    assert site.activation_path is not None
    found: nn.Module = get_attribute(model, site.activation_path)
    return found


def _rows(parameters: Parameters, site: Site, outputs: torch.Tensor, experts: torch.Tensor) -> Branch:
    weight = parameters[weight_name(site.up, site.projection)].detach()
    bias = parameters.get(bias_name(site.up, site.projection))
    where = outputs.to(weight.device), experts.to(weight.device)
    wide = rows(weight, site.projection, *where).to("cpu", torch.float64)
    return wide, None if bias is None else entries(bias.detach(), *where).to("cpu", torch.float64)


def _linear(x_BD: torch.Tensor, branch: Branch) -> torch.Tensor:
    return nn.functional.linear(x_BD, *branch)


def check_outputs(plan: CollapsePlan, comparisons: tuple[Comparison, ...], noise: Mapping[str, float]) -> None:
    """Raise where an exact collapse moved the whole model by more than rounding does.

    Args:
        plan: what was promised.
        comparisons: what was measured.
        noise: for a dtype below float32, how far the variant itself is from its own float32 outputs.

    Raises:
        VerificationError: it did.
    """
    if not plan.exact or any(entry.fitted or not entry.scaling.exact for entry in plan.sites):
        return
    folded = any(entry.folded for entry in plan.sites)
    own = comparisons[0].dtype if comparisons else ""
    for entry in comparisons:
        eps = torch.finfo(getattr(torch, entry.dtype)).eps
        allowed = 2 * noise[entry.dtype] + 1e-6 if entry.dtype in noise else EXACT_NOISE * eps
        if folded:  # the down projection was rounded to the model's own dtype
            allowed += 2 * max(noise.values(), default=0.0) + 4 * torch.finfo(getattr(torch, own)).eps
        if not entry.max_rel <= allowed:
            hint = ". Is there a norm between the unit and its down projection?" if folded else ""
            raise VerificationError(
                f"the collapse is exact, but in {entry.dtype} the {entry.output} moved by {entry.max_rel:.3g} of their "
                f"largest value, where {allowed:.3g} is rounding; the model was put back{hint}"
            )
