"""The control of the demo: what people do today, and what it costs."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.activations import ACT2FN

from hf_geglu.modeling_geglu import PackedGLU, get_attribute, set_attribute, widen
from hf_geglu.plan import Plan


def naive_swap(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` with GeGLU blocks put in by hand, as in most notebooks.

    A gated block gets GELU in place of its activation, weights untouched. A dense block keeps its weights for the gate
    and gets a value branch with the default initialisation of ``nn.Linear``.
    """
    swapped = copy.deepcopy(model)
    for entry in plan.converted:
        site = entry.site
        assert site.activation_path is not None
        if site.gated:
            set_attribute(swapped, site.activation_path, ACT2FN[entry.scaling.gate])
            continue
        up = swapped.get_submodule(site.up)
        packed = widen(up, site.width)
        assert isinstance(up.weight, torch.Tensor)
        fresh = nn.Linear(site.d_in, site.width).to(up.weight)
        value = fresh.weight if site.projection == "linear" else fresh.weight.T
        bias = up.bias if isinstance(up.bias, torch.Tensor) else torch.zeros_like(fresh.bias)
        packed.weight = nn.Parameter(torch.cat([up.weight, value], dim=0 if site.projection == "linear" else 1))
        packed.bias = nn.Parameter(torch.cat([bias, fresh.bias]))
        gate = get_attribute(swapped, site.activation_path)
        set_attribute(swapped, site.up, packed)
        set_attribute(swapped, site.activation_path, PackedGLU(gate if entry.keeps_activation else entry.scaling.gate))
    return swapped
