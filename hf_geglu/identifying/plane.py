"""From a function of two numbers, gate and value, to the formula behind it.

The function is asked at the points of a grid. Where it is affine in one number, that one is the value and the slope is
what the gate does; where in neither, what is left is told apart: a product of two activations, a sum, a function of
the product.

    I, J points of the two axes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from hf_geglu.identifying.curves import Curve, Precision, name_curve
from hf_geglu.identifying.identity import UNLIMITED, Limits

Two = Callable[[Tensor, Tensor], Tensor]
"""Elementwise, from (P,) and (P,) to (P,)."""

A, B = "$a", "$b"
"""The two numbers, in words that others replace by names."""

_AXIS = (-3.25, -2.5, -2.125, -1.75, -1.375, -1.0, -0.75, -0.5, -0.25, -0.125, 0.125, 0.375, 0.5, 0.875, 1.0, 1.25,
         1.5, 2.0, 2.25, 2.75, 3.0)  # fmt: skip
_LARGEST = 2.0**10


@dataclass(frozen=True, slots=True)
class Formula:
    """What two numbers become."""

    said: str
    """With `a` and `b` for them."""
    gate: Literal["a", "b"] = "a"
    curve: Curve | None = None
    """What the gate goes through; None where the unit is not gated."""
    offset: float = 0.0
    limits: Limits = UNLIMITED
    """Of the value."""
    difference: str | None = None
    """What keeps it from being ``act(gate) * value``."""

    predict: Callable[..., Tensor] | None = field(default=None, compare=False)
    """What is predicted for (a, b), or for (a) alone; None where nothing is known well enough."""

    def with_curve(self, curve: Curve) -> Callable[..., Tensor]:
        """What would be predicted for the same unit with another activation."""
        return curve if self.predict is self.curve else _unit(curve, self.gate, self.offset, self.limits)


def _unit(curve: Curve, gate: str, offset: float, limits: Limits) -> Two:
    def predict(a_P: Tensor, b_P: Tensor) -> Tensor:
        gate_P, value_P = (a_P, b_P) if gate == "a" else (b_P, a_P)
        low, high = limits
        if low is not None or high is not None:
            value_P = value_P.clamp(low, high)
        return curve(gate_P) * (value_P + offset)

    return predict


def _gated_formula(said: str, gate: Literal["a", "b"], curve: Curve, offset: float, limits: Limits) -> Formula:
    return Formula(said, gate, curve, offset, limits, predict=_unit(curve, gate, offset, limits))


class _Grid:
    """The values of a function at all pairs of points."""

    def __init__(self, f: Two, precision: Precision) -> None:
        self.axis = torch.tensor(_AXIS, dtype=torch.float64)
        self.a_IJ, self.b_IJ = torch.meshgrid(self.axis, self.axis, indexing="ij")
        self.m_IJ = f(self.a_IJ.reshape(-1), self.b_IJ.reshape(-1)).reshape(self.a_IJ.shape)
        self.tolerance = precision.tolerance

    def same(self, other_IJ: Tensor, *, loosely: float = 1.0) -> bool:
        return bool(((self.m_IJ - other_IJ).abs() / (1 + self.m_IJ.abs())).max() < loosely * self.tolerance)

    def lines(self, dim: int) -> tuple[Tensor, Tensor, bool]:
        """(intercepts, slopes, whether it is affine) along `dim`, from the numbers at 1 and -1."""
        one = int((self.axis == 1.0).nonzero())
        minus = int((self.axis == -1.0).nonzero())
        upper, lower = self.m_IJ.select(dim, one), self.m_IJ.select(dim, minus)
        slope, intercept = (upper - lower) / 2, (upper + lower) / 2
        line = torch.outer(slope, self.axis) if dim == 1 else torch.outer(self.axis, slope)
        line = line + (intercept[:, None] if dim == 1 else intercept[None, :])
        return intercept, slope, self.same(line, loosely=2.0)


def read_plane(f: Two, precision: Precision) -> Formula | None:
    """The formula of an elementwise function of two numbers, both of which count; None where it is none of those that
    have a name."""
    grid = _Grid(f, precision)
    if not bool(grid.m_IJ.isfinite().all()):
        return _nonlinear(f, grid, precision)
    in_a, in_b = grid.lines(0), grid.lines(1)
    if in_a[2] and in_b[2]:
        return _bilinear(grid)
    if in_b[2]:
        return _gated(f, grid, in_b, precision)
    if in_a[2]:
        turned: Two = lambda a, b: f(b, a)  # noqa: E731
        flipped = _gated(turned, _Grid(turned, precision), in_a, precision)
        return None if flipped is None else _renamed(flipped)
    return _nonlinear(f, grid, precision)


def _renamed(flipped: Formula) -> Formula:
    """With the names of the numbers exchanged."""

    def exchanged(said: str) -> str:
        return said.replace(A, "\0").replace(B, A).replace("\0", B)

    difference = None if flipped.difference is None else exchanged(flipped.difference)
    if flipped.curve is not None and difference is None:
        return _gated_formula(exchanged(flipped.said), "b", flipped.curve, flipped.offset, flipped.limits)
    predict = None if flipped.predict is None else (lambda a, b, f=flipped.predict: f(b, a))
    return replace(flipped, said=exchanged(flipped.said), gate="b", difference=difference, predict=predict)


def _bilinear(grid: _Grid) -> Formula:
    """p + q a + r b + s a b."""
    corners = torch.stack([torch.ones(4), torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])]).double()
    corners = torch.cat([corners, (corners[1] * corners[2])[None]])
    one, minus = int((grid.axis == 1.0).nonzero()), int((grid.axis == -1.0).nonzero())
    seen = torch.stack([grid.m_IJ[i, j] for i, j in ((one, one), (one, minus), (minus, one), (minus, minus))])
    p, q, r, s = (corners @ seen / 4).tolist()
    slack = grid.tolerance * (1 + abs(p) + abs(q) + abs(r))
    if abs(s) < slack:
        return Formula(
            _terms((p, ""), (q, A), (r, B)),
            difference="a sum of both branches, with no product and no gate",
            predict=lambda a, b: p + q * a + r * b,
        )
    if abs(p * s - q * r) > 4 * slack:
        return Formula(
            _terms((p, ""), (q, A), (r, B), (s, f"{A} {B}")),
            difference="a product of both branches with one of them added: no product of two linear branches",
            predict=lambda a, b: p + q * a + r * b + s * a * b,
        )
    offset, shift = _neat(q / s), _neat(r / s)
    if shift and not offset:  # the branch with the constant is the value
        curve = Curve("linear", factor=_neat(s), error=0.0)
        return _gated_formula(_product(B, A, shift, _neat(s)), "b", curve, shift, UNLIMITED)
    curve = Curve("linear", factor=_neat(s), shift=shift, error=0.0)
    return _gated_formula(_product(curve.spelled(A), B, offset, 1.0), "a", curve, offset, UNLIMITED)


def _gated(f: Two, grid: _Grid, lines: tuple[Tensor, Tensor, bool], precision: Precision) -> Formula | None:
    """Affine in b: alpha(a) + beta(a) b."""
    alpha_I, beta_I, _ = lines
    size = float(beta_I.abs().max())
    slack = 4 * grid.tolerance * (1 + size)
    if float(beta_I.max() - beta_I.min()) < slack:
        curve = name_curve(lambda z: f(z, torch.zeros_like(z)), precision)
        weight = _neat(float(beta_I.mean()))
        said = f"{_spelled(curve, A)} + {_times(weight, B)}"
        predict = _if_named(lambda a, b: curve(a) + weight * b, curve)
        return Formula(said, difference="the branches are added, not multiplied: nothing is gated", predict=predict)
    offset = float((alpha_I * beta_I).sum() / beta_I.square().sum())
    offset = _neat(round(offset, 2) if precision.coarse else offset)
    left_I = alpha_I - offset * beta_I
    if float(left_I.abs().max()) > slack:
        gate = name_curve(lambda z: f(z, torch.ones_like(z)) - f(z, torch.zeros_like(z)), precision)
        added = name_curve(lambda z: f(z, torch.zeros_like(z)), precision)
        said = f"{_spelled(gate, A)} * {B} + {_spelled(added, A)}"
        return Formula(
            said,
            difference=f"{_spelled(added, A)} is added to the product: a residual inside the unit",
            predict=_if_named(lambda a, b: gate(a) * b + added(a), gate, added),
        )
    curve = name_curve(lambda z: f(z, torch.full_like(z, 1.0 - offset)), precision)
    if curve.name is None:
        closest = f" (the closest, {curve.runner_up}, is {curve.error:.1e} away)" if curve.runner_up else ""
        return Formula(f"g({A}) * {B}", difference=f"the gate goes through a function without a name{closest}")
    if curve.constant and curve.name != "linear":
        return Formula(
            _product(f"({curve.spelled(A)})", B, offset, 1.0),
            difference=f"{curve.constant:.6g} is added to the activated gate: part of the value passes ungated",
            predict=lambda a, b: curve(a) * (b + offset),
        )
    limits = _value_limits(f, grid, curve, offset)
    value = B if limits == UNLIMITED else f"clamp({B}, {_or_dash(limits[0])}, {_or_dash(limits[1])})"
    return _gated_formula(_product(curve.spelled(A), value, offset, 1.0), "a", curve, offset, limits)


def _value_limits(f: Two, grid: _Grid, curve: Curve, offset: float) -> Limits:
    """Where the value stops counting, found where the gate is open."""
    at = grid.axis[int(curve(grid.axis).abs().argmax())]
    height = float(curve(at))

    def departs(value: float) -> bool:
        b = torch.tensor([value], dtype=torch.float64)
        y = float(f(at.reshape(1), b)) / height
        return abs(y - (value + offset)) > 4 * grid.tolerance * (1 + abs(value + offset))

    found: list[float | None] = []
    for sign in (-1.0, 1.0):
        if not departs(sign * _LARGEST):
            found.append(None)
            continue
        inside, outside = float(grid.axis.abs().max()), _LARGEST
        for _ in range(52):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if departs(sign * middle) else (middle, outside)
        found.append(_neat(sign * round(inside, 2)))
    return found[0], found[1]


def _nonlinear(f: Two, grid: _Grid, precision: Precision) -> Formula | None:
    """Affine in neither number."""
    m_IJ, a_IJ, b_IJ = grid.m_IJ, grid.a_IJ, grid.b_IJ

    def asked(a: Tensor, b: Tensor) -> Tensor:
        return f(a.reshape(-1), b.reshape(-1)).reshape(a.shape)

    if bool(m_IJ.isfinite().all()):
        sizes = torch.linalg.svdvals(m_IJ)
        if float(sizes[1]) < 10 * grid.tolerance * float(sizes[0]):
            i, j = divmod(int(m_IJ.abs().argmax()), len(grid.axis))
            peak = float(m_IJ[i, j])
            of_a = name_curve(lambda z: f(z, torch.full_like(z, float(grid.axis[j]))), precision, free=True)
            of_b = name_curve(lambda z: f(torch.full_like(z, float(grid.axis[i])), z) / peak, precision, free=True)
            said = f"{_unscaled(of_a, A)} * {_unscaled(of_b, B)}"
            return Formula(
                said,
                difference=f"both branches are activated ({said}): the value is not linear",
                predict=_if_named(lambda a, b: of_a(a) * of_b(b), of_a, of_b),
            )
        sums = m_IJ - m_IJ.mean(0, keepdim=True) - m_IJ.mean(1, keepdim=True) + m_IJ.mean()
        if float(sums.abs().max()) < 10 * grid.tolerance * (1 + float(m_IJ.abs().max())):
            zero = torch.zeros_like
            of_a = name_curve(lambda z: f(z, zero(z)) - f(zero(z), zero(z)), precision)
            of_b = name_curve(lambda z: f(zero(z), z), precision)
            said = f"{_spelled(of_a, A)} + {_spelled(of_b, B)}"
            return Formula(
                said,
                difference="the branches are added, not multiplied: nothing is gated",
                predict=_if_named(lambda a, b: of_a(a) + of_b(b), of_a, of_b),
            )
    for said, join, at_one, words in _JOINED:
        second = torch.ones_like(a_IJ) if at_one else torch.zeros_like(a_IJ)
        if grid.same(asked(join(a_IJ, b_IJ), second), loosely=2.0):
            curve = name_curve(_at(f, float(at_one)), precision)
            return Formula(_spelled(curve, said), difference=words, predict=_if_named(_after(curve, join), curve))
    for said, join in ((f"max({A}, {B})", torch.maximum), (f"min({A}, {B})", torch.minimum)):
        if grid.same(join(a_IJ, b_IJ)):
            words = "one branch or the other, whichever is larger or smaller: no product"
            return Formula(said, difference=words, predict=join)
    return None


_JOINED: tuple[tuple[str, Two, bool, str], ...] = (
    (f"{A} {B}", torch.mul, True, "the activation is on the product, after the gate has met the value"),
    (f"{A} + {B}", torch.add, False, "the activation is on the sum of both branches: one dense branch, and no gate"),
    (f"{A} - {B}", torch.sub, False, "the activation is on the difference of both branches: no gate"),
)


def _at(f: Two, second: float) -> Callable[[Tensor], Tensor]:
    return lambda z: f(z, torch.full_like(z, second))


def _after(curve: Curve, join: Two) -> Two:
    return lambda a, b: curve(join(a, b))


def _if_named(predict: Two, *curves: Curve) -> Two | None:
    return None if any(curve.name is None for curve in curves) else predict


def _spelled(curve: Curve, variable: str) -> str:
    return f"?({variable})" if curve.name is None else curve.spelled(variable)


def _unscaled(curve: Curve, variable: str) -> str:
    """Without the factor, which cannot be told from that of the other branch."""
    if curve.name is None:
        return f"?({variable})"
    return Curve(curve.name, curve.scale, 1.0, curve.shift, 0.0, curve.low, curve.high).spelled(variable)


def _product(gate: str, value: str, offset: float, factor: float) -> str:
    value = f"({value} + {offset:.6g})" if offset else value
    return f"{_times(factor, gate)} * {value}"


def _times(factor: float, said: str) -> str:
    return said if factor == 1 else f"{factor:.6g} {said}"


def _terms(*terms: tuple[float, str]) -> str:
    return " + ".join(_times(_neat(c), name) if name else f"{_neat(c):.6g}" for c, name in terms if abs(c) > 1e-9)


def _neat(value: float) -> float:
    return 0.0 if abs(value) < 1e-7 else float(f"{value:.6g}")


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
