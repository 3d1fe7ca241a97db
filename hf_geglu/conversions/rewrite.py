"""Which parameters of a block a conversion changes, and how: one pure function a parameter.

The same list serves a model in memory and a checkpoint that is converted tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from hf_geglu.conversions.expand import expand
from hf_geglu.conversions.retarget import retarget, retarget_packed
from hf_geglu.conversions.scaling import Scaling
from hf_geglu.functional import split_packed
from hf_geglu.sites import Site
from hf_geglu.sites.weights import bias_name, is_stack, output_dim, weight_name

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """A parameter that changes; it keeps its name and dtype."""

    name: str
    """As in ``model.named_parameters()``."""
    old_shape: Shape
    new_shape: Shape
    present: bool
    """False for a bias that only the converted block has: `function` then takes zeros of `old_shape`, in the dtype of
    the weight beside it."""
    function: Callable[[torch.Tensor], torch.Tensor]
    """Old values to new ones. Computes in float32 or better and rounds once."""
    dim: int | None
    """The one dimension that `function` mixes or lengthens; along the others it may be applied slice by slice. None:
    elementwise."""


def rewrites(site: Site, scaling: Scaling, shapes: Mapping[str, Shape]) -> tuple[Rewrite, ...]:
    """The parameters that converting a block changes; those it leaves as they are have no entry.

    Args:
        site: the block.
        scaling: the line of `scaling.SCALINGS` to fold in.
        shapes: of the model's parameters before the conversion, by name.

    Raises:
        ConversionError: the block is gated and the scaling needs its value branch.
    """
    if site.gated:
        return tuple(_retargeted(site, scaling, shapes))
    return tuple(_expanded(site, scaling, shapes))


def scale_at_run_time(site: Site, scaling: Scaling) -> tuple[float, float] | None:
    """(a, beta) where the block clamps its branches: folded into the weights, they would change what is clamped."""
    if site.limit is None or scaling.a == scaling.beta == 1.0:
        return None
    return scaling.a, scaling.beta


def value_offset(site: Site, scaling: Scaling) -> float:
    """The constant that the converted block adds to its value branch when it runs.

    Projections that are modules get it as a bias, which trains. Stacks of experts have no module to give a bias to.
    """
    if site.gated:
        return site.value_offset
    return scaling.beta if is_stack(site.projection) else 0.0


def branch_outputs(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """Which outputs of the packed projection are the gate and which the value, each (F,), in the order of neurons.

    Of a gated block as it is; of a dense one as `expand` leaves it. Not for separate projections.
    """
    outputs = torch.arange(2 * site.width)
    if site.layout in ("packed", "interleaved"):
        assert site.gate_half is not None
        return split_packed(outputs, site.layout, site.gate_half)
    gate, value = outputs.view(site.groups, 2, -1).unbind(1)
    return gate.reshape(-1), value.reshape(-1)


def _expanded(site: Site, scaling: Scaling, shapes: Mapping[str, Shape]) -> Iterator[Rewrite]:
    weight, bias = weight_name(site.up, site.projection), bias_name(site.up, site.projection)
    dim = output_dim(site.projection)
    yield _wider(weight, shapes[weight], dim, partial(expand, scaling=scaling, dim=dim, groups=site.groups))
    if bias in shapes or not is_stack(site.projection):
        old = shapes.get(bias, (site.width,))
        constant = scaling.beta - value_offset(site, scaling)
        function = partial(expand, scaling=scaling, constant=constant, dim=len(old) - 1, groups=site.groups)
        yield _wider(bias, old, len(old) - 1, function, present=bias in shapes)


def _wider(
    name: str, old: Shape, dim: int, function: Callable[[torch.Tensor], torch.Tensor], *, present: bool = True
) -> Rewrite:
    new = (*old[:dim], 2 * old[dim], *old[dim + 1 :])
    return Rewrite(name=name, old_shape=old, new_shape=new, present=present, function=function, dim=dim)


def _retargeted(site: Site, scaling: Scaling, shapes: Mapping[str, Shape]) -> Iterator[Rewrite]:
    if (scaling.a == scaling.beta == 1.0 and scaling.fits_gated) or scale_at_run_time(site, scaling):
        return
    if site.layout == "separate":
        branches: tuple[tuple[str, Literal["gate", "value"], float], ...] = (
            (site.gate, "gate", scaling.a),
            (site.up, "value", scaling.beta),
        )
        for path, branch, factor in branches:
            for name, old, _ in _present(path, site, shapes) if factor != 1.0 else ():
                function = partial(retarget, branch=branch, scaling=scaling)
                yield Rewrite(name=name, old_shape=old, new_shape=old, present=True, function=function, dim=None)
    else:
        assert site.layout != "dense"
        assert site.gate_half is not None
        for name, old, dim in _present(site.up, site, shapes):
            packed = partial(retarget_packed, scaling=scaling, layout=site.layout, gate_half=site.gate_half, dim=dim)
            yield Rewrite(name=name, old_shape=old, new_shape=old, present=True, function=packed, dim=dim)


def _present(path: str, site: Site, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape, int]]:
    """Name, shape and dimension of outputs of a projection's weight, and of its bias where it has one."""
    weight, bias = weight_name(path, site.projection), bias_name(path, site.projection)
    yield weight, shapes[weight], output_dim(site.projection)
    if bias in shapes:
        yield bias, shapes[bias], len(shapes[bias]) - 1
