"""Which parameters of a block a conversion changes, and how: one pure function a parameter.

The same list serves a model in memory and a checkpoint that is converted tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from hf_geglu.conversions.coefficients import Coefficients
from hf_geglu.conversions.expand import expand
from hf_geglu.conversions.precision import Factor, rounded, scaled
from hf_geglu.conversions.replacement import NewWeights
from hf_geglu.conversions.retarget import retarget, retarget_packed
from hf_geglu.conversions.scaling import Scaling
from hf_geglu.errors import ConversionError
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
    """The one dimension that `function` mixes or lengthens; along the others it may be applied slice by slice, unless
    there is `rows`. None: elementwise."""
    rows: Callable[[int, int], Callable[[torch.Tensor], torch.Tensor]] | None = None
    """Where every row of the first dimension has numbers of its own: the function of rows `start` to `stop` by
    themselves."""
    even: bool = True
    """Whether outputs are treated alike, as far as `function` scales them."""


Rows = Callable[[int, int], Callable[[torch.Tensor], torch.Tensor]]

Line = Scaling | Coefficients | NewWeights
"""What a conversion folds into a block: the same numbers for every neuron, numbers of each its own, or new weights."""


def rewrites(site: Site, line: Line, shapes: Mapping[str, Shape]) -> tuple[Rewrite, ...]:
    """The parameters that converting a block changes; those it leaves as they are have no entry.

    Args:
        site: the block.
        line: the row of `scaling.SCALINGS` to fold in, or what was fitted.
        shapes: of the model's parameters before the conversion, by name; those of the down projection are asked for
            only where it changes.

    Raises:
        ConversionError: the block is gated and the line needs its value branch, or the block has no place for what was
            fitted.
    """
    if isinstance(line, NewWeights):
        return tuple(_replaced(site, line, shapes))
    coefficients = Coefficients.of(line)
    changed = _retargeted(site, line, shapes) if site.gated else _expanded(site, line, shapes)
    return (*changed, *_down(site, coefficients, shapes))


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


def _expanded(site: Site, line: Scaling | Coefficients, shapes: Mapping[str, Shape]) -> Iterator[Rewrite]:
    weight, bias = weight_name(site.up, site.projection), bias_name(site.up, site.projection)
    fit = Coefficients.of(line)
    stacked = is_stack(site.projection)
    if stacked and isinstance(fit.beta, torch.Tensor):
        raise ConversionError(
            f"{site.up} is a stack of experts, which keeps the constant of its value branch as one number; expected "
            "the same beta for all neurons"
        )
    dim = output_dim(site.projection)
    function = partial(expand, dim=dim, groups=site.groups)
    yield _wider(weight, shapes[weight], dim, partial(function, line=line), rows=_by_rows(function, fit, site, dim))
    if bias in shapes or not stacked:
        old = shapes.get(bias, (site.width,))
        constant = 0.0 if stacked else fit.beta
        function = partial(expand, constant=constant, dim=len(old) - 1, groups=site.groups)
        yield _wider(
            bias,
            old,
            len(old) - 1,
            partial(function, line=line, shift=fit.b),
            present=bias in shapes,
            rows=_by_rows(function, fit, site, 1, shifted=True) if stacked else None,
        )


def _wider(
    name: str,
    old: Shape,
    dim: int,
    function: Callable[[torch.Tensor], torch.Tensor],
    *,
    present: bool = True,
    rows: Rows | None = None,
) -> Rewrite:
    new = (*old[:dim], 2 * old[dim], *old[dim + 1 :])
    return Rewrite(name=name, old_shape=old, new_shape=new, present=present, function=function, dim=dim, rows=rows)


def _by_rows(
    function: Callable[..., torch.Tensor], fit: Coefficients, site: Site, dim: int, *, shifted: bool = False
) -> Rows | None:
    """`function` of some rows of a parameter, where rows are neurons or experts with lines of their own."""
    if fit.even or not (dim == 0 or is_stack(site.projection)):
        return None

    def rows(start: int, stop: int) -> Callable[[torch.Tensor], torch.Tensor]:
        part = fit.part(start, stop)
        return partial(function, line=part, shift=part.b if shifted else 0.0)

    return rows


def _retargeted(site: Site, line: Scaling | Coefficients, shapes: Mapping[str, Shape]) -> Iterator[Rewrite]:
    if isinstance(line, Scaling) and scale_at_run_time(site, line):
        return
    fit = Coefficients.of(line)
    if fit.idle:
        return
    if not _is(fit.b, 0.0) and bias_name(site.gate, site.projection) not in shapes:
        raise ConversionError(f"the fit of {site.gate} shifts its bias, which it does not have; fit it without")
    if site.layout == "separate":
        branches: tuple[tuple[str, Literal["gate", "value"], Factor], ...] = (
            (site.gate, "gate", fit.a),
            (site.up, "value", fit.beta),
        )
        for path, branch, factor in branches:
            for name, old, dim in _present(path, site, shapes):
                shift = fit.b if branch == "gate" and name == bias_name(path, site.projection) else 0.0
                if _is(factor, 1.0) and _is(shift, 0.0):
                    continue
                function = partial(retarget, branch=branch, dim=dim)
                # a number serves any slice; a number a neuron must meet its neuron
                mixed = dim if isinstance(factor, torch.Tensor) or isinstance(shift, torch.Tensor) else None
                yield Rewrite(
                    name=name,
                    old_shape=old,
                    new_shape=old,
                    present=True,
                    function=partial(function, line=line, shift=shift),
                    dim=mixed,
                    rows=_by_rows(function, fit, site, dim, shifted=not _is(shift, 0.0)) if len(old) > 1 else None,
                    even=fit.even,
                )
    else:
        assert site.layout != "dense"
        assert site.gate_half is not None
        for name, old, dim in _present(site.up, site, shapes):
            packed = partial(retarget_packed, layout=site.layout, gate_half=site.gate_half, dim=dim)
            shifted = name == bias_name(site.up, site.projection)
            stacked = is_stack(site.projection) and len(old) > 1
            yield Rewrite(
                name=name,
                old_shape=old,
                new_shape=old,
                present=True,
                function=partial(packed, line=line, shift=fit.b if shifted else 0.0),
                dim=dim,
                rows=_by_rows(packed, fit, site, dim, shifted=shifted) if stacked else None,
                even=fit.even,
            )


def _is(factor: Factor, number: float) -> bool:
    return not isinstance(factor, torch.Tensor) and factor == number


def _replaced(site: Site, new: NewWeights, shapes: Mapping[str, Shape]) -> Iterator[Rewrite]:
    for name, tensor in new.parameters(site).items():
        if name not in shapes and not (site.layout == "dense" and name == bias_name(site.up, site.projection)):
            raise ConversionError(f"{name} was given, which the block does not have; leave that bias out")
        old = shapes.get(name, (site.width,))
        kept = tensor.reshape(*tensor.shape, *old[2:]) if len(old) > 2 else tensor  # convolutions of kernel 1
        function = partial(_instead, new=kept)
        new_shape = tuple(kept.shape)
        yield Rewrite(name=name, old_shape=old, new_shape=new_shape, present=name in shapes, function=function, dim=0)


def _instead(parameter: torch.Tensor, *, new: torch.Tensor) -> torch.Tensor:
    return rounded(new.to(parameter.device), parameter.dtype)


def _down(site: Site, fit: Coefficients, shapes: Mapping[str, Shape]) -> Iterator[Rewrite]:
    """What a fit adds to the down projection."""
    weight, bias = weight_name(site.down, site.projection), bias_name(site.down, site.projection)
    for name, given in ((weight, fit.left), (bias, fit.output)):
        if given is None:
            continue
        if name not in shapes or is_stack(site.projection):
            raise ConversionError(
                f"the fit of {site.up} changes {name}, which the block does not have as one tensor; fit it without"
            )
        rows = partial(_corrected, fit=fit, transposed=site.projection == "conv1d")
        shape = shapes[name]
        yield Rewrite(
            name=name,
            old_shape=shape,
            new_shape=shape,
            present=True,
            function=partial(_plus, added=given) if name == bias else rows(0, shape[0]),
            dim=0,
            rows=None if name == bias else rows,
        )


def _corrected(start: int, stop: int, *, fit: Coefficients, transposed: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Adds the correction to rows of the down projection's weight."""

    def corrected(parameter: torch.Tensor) -> torch.Tensor:
        added = fit.down_columns(start, stop).T if transposed else fit.down_rows(start, stop)
        return _plus(parameter, added=added.reshape(parameter.shape))

    return corrected


def _plus(parameter: torch.Tensor, *, added: torch.Tensor) -> torch.Tensor:
    wide = scaled(parameter, 1.0)
    return rounded(wide + added.to(wide), parameter.dtype)


def _present(path: str, site: Site, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape, int]]:
    """Name, shape and dimension of outputs of a projection's weight, and of its bias where it has one."""
    weight, bias = weight_name(path, site.projection), bias_name(path, site.projection)
    flat = is_stack(site.projection) and len(shapes[weight]) == 2  # the experts' rows lie one after the other
    yield weight, shapes[weight], 0 if flat else output_dim(site.projection)
    if bias in shapes:
        yield bias, shapes[bias], len(shapes[bias]) - 1
