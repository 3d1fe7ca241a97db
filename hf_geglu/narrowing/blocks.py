"""A site's block as gated weights in ordinary orientation, whatever it is in the model: what narrowing starts from.

With ``act(z) = f(a z) (alpha z + beta)`` the block is worked on as ``phi(z) (v)`` with ``phi(z) = c f(a z)`` and c
folded into the value branch at the end, a into the gate: so the numbers that are trained are of the size they had (a
sharp gate such as relu(z) ~ gelu(128 z)/128 would have weights that no learning rate fits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hf_geglu.conversions import NewWeights, branch_outputs
from hf_geglu.modeling_geglu import activation_named, get_attribute
from hf_geglu.plan import SitePlan
from hf_geglu.sites.site import Projection


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Weights at work, and the activation that goes with them."""

    weights: NewWeights
    activation: Callable[[torch.Tensor], torch.Tensor]
    a: float
    c: float

    def folded(self, weights: NewWeights) -> NewWeights:
        """As the converted block holds them."""
        gate_bias, up_bias = weights.gate_bias, weights.up_bias
        return NewWeights(
            gate=weights.gate * self.a,
            up=weights.up * self.c,
            down=weights.down,
            gate_bias=None if gate_bias is None else gate_bias * self.a,
            up_bias=None if up_bias is None else up_bias * self.c,
            down_bias=weights.down_bias,
        )


def block_of(model: nn.Module, entry: SitePlan) -> Block:
    """The block at a site of the unconverted model, in float32. Not for stacks of experts and convolutions, which a
    plan does not narrow."""
    site, scaling = entry.site, entry.scaling
    down, down_bias = _matrix(model, site.down, site.projection)
    if site.gated:
        c = scaling.beta
        if site.layout == "separate":
            (gate, gate_bias), (up, up_bias) = (_matrix(model, path, site.projection) for path in (site.gate, site.up))
        else:
            both, bias = _matrix(model, site.up, site.projection)
            (gate, gate_bias), (up, up_bias) = (
                (both[rows], None if bias is None else bias[rows]) for rows in branch_outputs(site)
            )
    else:
        gate, bias = _matrix(model, site.up, site.projection)
        gate_bias = gate.new_zeros(len(gate)) if bias is None else bias
        c = scaling.beta or scaling.alpha
        up, up_bias = gate * (scaling.alpha / c), gate_bias * (scaling.alpha / c) + scaling.beta / c
    weights = NewWeights(gate=gate, up=up, down=down, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias)
    gate_function = _gate_function(model, entry)

    def phi(z: torch.Tensor) -> torch.Tensor:
        inner = gate_function(z if scaling.a == 1.0 else z * scaling.a)
        return inner if c == 1.0 else inner * c

    return Block(weights=weights, activation=phi, a=scaling.a, c=c)


def _gate_function(model: nn.Module, entry: SitePlan) -> Callable[[torch.Tensor], torch.Tensor]:
    path = entry.site.activation_path
    if entry.keeps_activation and path is not None and entry.site.activation_call is None:
        held: Callable[[torch.Tensor], torch.Tensor] = get_attribute(model, path)
        return held
    named: Callable[[torch.Tensor], torch.Tensor] = activation_named(entry.scaling.gate)
    return named


def _matrix(model: nn.Module, path: str, projection: Projection) -> tuple[torch.Tensor, torch.Tensor | None]:
    held = dict(model.get_submodule(path).named_parameters(recurse=False))
    weight, bias = held["weight"].detach().float().cpu(), held.get("bias")
    matrix = weight.T if projection == "conv1d" else weight
    return matrix.clone(), None if bias is None else bias.detach().float().cpu().clone()
