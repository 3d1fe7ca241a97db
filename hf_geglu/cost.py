"""What an FFN block costs, before and after a conversion: parameters, FLOPs, bytes. Counted from shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hf_geglu.conversions import Scaling, rewrites
from hf_geglu.sites import Site
from hf_geglu.sites.weights import bias_name, experts_in, is_stack, parameters_of, weight_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the FFN blocks of a plan cost. Multiply and add count as two FLOPs; biases and activations are left out."""

    parameters: int
    flops_per_token: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            parameters=self.parameters + other.parameters,
            flops_per_token=self.flops_per_token + other.flops_per_token,
            bytes=self.bytes + other.bytes,
        )


def cost(model: nn.Module, site: Site) -> Cost:
    """Of a block as it is."""
    return _cost_of(model, site, {name: p.shape for name, p in parameters_of(model, site, down=True).items()})


def cost_after(model: nn.Module, site: Site, scaling: Scaling) -> Cost:
    """Of the same block converted with that scaling."""
    shapes = {name: tuple(p.shape) for name, p in parameters_of(model, site, down=True).items()}
    return _cost_of(model, site, shapes | {each.name: each.new_shape for each in rewrites(site, scaling, shapes)})


def cost_at_width(model: nn.Module, site: Site, scaling: Scaling, width: int) -> Cost:
    """Of the same block converted with that scaling and with that many neurons."""
    shapes = {name: tuple(p.shape) for name, p in parameters_of(model, site, down=True).items()}
    shapes |= {each.name: each.new_shape for each in rewrites(site, scaling, shapes)}
    new = {site.width: width, 2 * site.width: 2 * width}
    outer = bias_name(site.down, site.projection)  # counts outputs of the block, whatever their number
    sizes = {name: shape if name == outer else tuple(new.get(n, n) for n in shape) for name, shape in shapes.items()}
    return _cost_of(model, site, sizes)


def _cost_of(model: nn.Module, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
    """Of weights and biases of these shapes. A token meets those experts only that it is routed to."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    weights = {weight_name(path, site.projection) for path in (site.gate, site.up, site.down)}
    used = sum(size for name, size in sizes.items() if name in weights)
    if is_stack(site.projection):
        used = used // experts_in(shapes[weight_name(site.up, site.projection)], site) * _experts_per_token(model)
    parameter = model.get_parameter(weight_name(site.up, site.projection))
    total = sum(sizes.values())
    return Cost(parameters=total, flops_per_token=2 * used, bytes=total * parameter.element_size())


def _experts_per_token(model: nn.Module) -> int:
    """As the config says, 1 where it does not."""
    config = getattr(model, "config", None)
    nodes = [config, *(vars(config).values() if config is not None else ())]
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k")
    found = (getattr(node, name, None) for name in names for node in nodes)
    return next((value for value in found if isinstance(value, int) and value > 0), 1)
