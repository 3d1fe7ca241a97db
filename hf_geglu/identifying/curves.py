"""Naming a function of one number: which activation, and with which scale, factor, shift and constant.

    y = factor * act(scale * z + shift) + constant

The names are tried as they are first; then scale and factor are fitted, then all four. Of the fits that hold, the
simplest counts.

    P points, S scales
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as fn
from torch import Tensor
from transformers.activations import ACT2FN

from hf_geglu.sites.activations import Elementwise, candidates
from hf_geglu.sites.hypotheses import TOLERANCE

NEAR, FAR = 4.0, 40.0
"""Curves are fitted within +-NEAR and then held against everything up to +-FAR."""

_ALIASES = {
    "gelu": ("gelu_python",),
    "gelu_pytorch_tanh": ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
}
"""Other ways to compute the same function, which round differently in a low precision."""

_HOMOGENEOUS = frozenset({"linear", "relu", "relu2", "leaky_relu", "step", "abs", "cube", "square"})
"""A scale inside these is a factor outside."""

_EVEN = frozenset({"abs", "square", "cos"})

_SCALES = torch.logspace(-1, 1, 61, dtype=torch.float64)
_MARGIN = 1.5
"""In a low precision the runner-up must be so many times further away."""
_REFINED = 8
"""How many starts are worth a descent."""


@dataclass(frozen=True, slots=True)
class Precision:
    """What a unit computes in; `eps` is half the distance between neighbours around 1."""

    dtype: torch.dtype = torch.float64

    @property
    def coarse(self) -> bool:
        """Whether rounding is larger than what tells activations apart in float64."""
        return torch.finfo(self.dtype).eps > 1e-6

    @property
    def tolerance(self) -> float:
        """Of a structure, in units of 1 + |value|."""
        return 6 * float(torch.finfo(self.dtype).eps) if self.coarse else TOLERANCE


@dataclass(frozen=True, slots=True)
class Curve:
    """A function with a name, or without one where nothing fits."""

    name: str | None
    scale: float = 1.0
    factor: float = 1.0
    shift: float = 0.0
    constant: float = 0.0
    low: float | None = None
    """The variable is clamped to [low, high] before anything else."""
    high: float | None = None
    error: float = math.inf
    runner_up: str | None = None
    runner_up_error: float | None = None

    def __call__(self, z_P: Tensor) -> Tensor:
        """The values at these points."""
        assert self.name is not None
        if self.low is not None or self.high is not None:
            z_P = z_P.clamp(self.low, self.high)
        return self.factor * known()[self.name](self.scale * z_P + self.shift) + self.constant

    def spelled(self, variable: str = "z") -> str:
        """As a formula of `variable`."""
        if self.low is not None or self.high is not None:
            variable = f"clamp({variable}, {_number(self.low)}, {_number(self.high)})"
        inner = variable if self.scale == 1 else f"-{variable}" if self.scale == -1 else f"{self.scale:.6g} {variable}"
        inner += f" + {self.shift:.6g}" if self.shift else ""
        said = inner if self.name == "linear" else f"{self.name}({inner})"
        said = said if self.factor == 1 else f"{self.factor:.6g} {said}"
        return said + (f" + {self.constant:.6g}" if self.constant else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


@cache
def known() -> dict[str, Elementwise]:
    """Every function that has a name here: the finder's activations, then some of torch's, then some made of them."""
    plain = dict(candidates())
    more: dict[str, Elementwise] = {
        "softplus": fn.softplus,
        "logsigmoid": fn.logsigmoid,
        "softsign": fn.softsign,
        "elu": fn.elu,
        "selu": fn.selu,
        "hardtanh": fn.hardtanh,
        "hardsigmoid": fn.hardsigmoid,
        "tanhshrink": fn.tanhshrink,
        "step": lambda z: (z > 0).to(z.dtype),
        "abs": torch.abs,
        "cube": lambda z: z**3,
        "square": torch.square,
        "exp": torch.exp,
        "sin": torch.sin,
        "cos": torch.cos,
        "erf": torch.erf,
        "atan": torch.atan,
    }
    made: dict[str, Elementwise] = {}
    for name in ("gelu", "gelu_pytorch_tanh", "silu", "relu", "sigmoid", "tanh"):
        act = plain[name]
        made[f"z * {name}"] = _times(act)
        made[f"z + {name}"] = _plus(act)
        made[f"square of {name}"] = _squared(act)
    del made["z * sigmoid"], made["square of relu"], made["z * relu"]  # silu, relu2
    return {**plain, **more, **made}


def _times(act: Elementwise) -> Elementwise:
    return lambda z: z * act(z)


def _plus(act: Elementwise) -> Elementwise:
    return lambda z: z + act(z)


def _squared(act: Elementwise) -> Elementwise:
    return lambda z: act(z) ** 2


def points(precision: Precision) -> Tensor:
    """Where a curve is looked at: densely where the forms of GELU differ most (4.7e-4 around |z| = 2.2), widely
    elsewhere, and only numbers that bfloat16 has, so that no rounding of an argument counts."""
    near = torch.linspace(-NEAR, NEAR, 257, dtype=torch.float64)
    dense = torch.cat([torch.linspace(-3.8, -0.4, 700, dtype=torch.float64), torch.linspace(0.4, 3.8, 300).double()])
    far = torch.tensor([-FAR, -25.0, -13.0, -9.0, -6.5, 6.5, 9.0, 13.0, 25.0, FAR], dtype=torch.float64)
    parts = (near, dense, far) if precision.coarse else (near, far)
    chosen: Tensor = torch.unique(torch.cat(parts).bfloat16().double())
    return chosen


def name_curve(g: Callable[[Tensor], Tensor], precision: Precision, *, free: bool = False) -> Curve:
    """The function that `g` is, from (P,) to (P,); without a name, and with the best one's error, where none fits.

    Args:
        g: what is observed; elementwise.
        precision: what it computes in.
        free: its values are known up to a factor only.
    """
    z_P = points(precision)
    y_P = g(z_P)
    if not bool(y_P.isfinite().all()):
        z_P, y_P = z_P[z_P.abs() <= NEAR], y_P[z_P.abs() <= NEAR]
    if not free:
        found = _best(_as_they_are(z_P, y_P, precision), precision)
        if found.name is not None:
            return found
    near = z_P.abs() <= NEAR
    best = Curve(None)
    for stage in (_as_they_are, _scaled, _shifted):
        fits = list(stage(z_P[near], y_P[near], precision))
        found = _best(fits, precision)
        if found.name is not None:
            return _limited(found, g, z_P, y_P, precision)
        best = min(best, found, key=lambda one: one.error)
    return best


def _best(fits: Iterable[Curve], precision: Precision) -> Curve:
    """The first that holds, with the best that does not; or the best as a runner-up, without a name."""
    ranked = sorted(fits, key=lambda one: one.error)
    if precision.coarse:
        if not ranked:
            return Curve(None)
        winner, *others = ranked
        others = [one for one in others if one.name != winner.name]
        limit = 1.5 * float(torch.finfo(precision.dtype).eps)
        clear = not others or others[0].error > _MARGIN * winner.error
        rival = others[0] if others else None
        if winner.error < limit and clear:
            return _with_rival(winner, rival)
        return Curve(None, error=winner.error, runner_up=winner.name, runner_up_error=winner.error)
    names = list(known())
    holding = [one for one in ranked if one.error < TOLERANCE]
    rivals = [one for one in ranked if one.error >= TOLERANCE]
    if not holding:
        error = ranked[0].error if ranked else math.inf
        return Curve(None, error=error, runner_up=ranked[0].name if ranked else None, runner_up_error=error)
    # what holds equally well is the same function under another name: silu(z) = 1.702 quick_gelu(z / 1.702)
    winner = min(holding, key=lambda one: names.index(one.name or ""))
    return _with_rival(winner, rivals[0] if rivals else None)


def _with_rival(winner: Curve, rival: Curve | None) -> Curve:
    if rival is None:
        return winner
    return replace(winner, runner_up=rival.spelled(), runner_up_error=rival.error)


def _error(predicted_P: Tensor, y_P: Tensor, precision: Precision) -> float:
    if precision.coarse:
        return float(((predicted_P - y_P).abs() / (y_P.abs() + 1e-3)).mean())
    return float(((predicted_P - y_P).abs() / (1 + y_P.abs())).max())


def _as_they_are(z_P: Tensor, y_P: Tensor, precision: Precision) -> Iterator[Curve]:
    for name, act in known().items():
        if not precision.coarse:
            yield Curve(name, error=_error(act(z_P), y_P, precision))
            continue
        ways = [act, *(ACT2FN[alias].eval().forward for alias in _ALIASES.get(name, ()) if alias in ACT2FN)]
        errors = [_error(way(z_P.to(precision.dtype)).double(), y_P, precision) for way in ways]
        yield Curve(name, error=min(errors))


def _scaled(z_P: Tensor, y_P: Tensor, precision: Precision) -> Iterator[Curve]:
    """Scale and factor."""
    starts: list[tuple[float, str, Tensor]] = []
    for name, act in known().items():
        scales = torch.tensor((1.0,) if name in _EVEN else (1.0, -1.0), dtype=torch.float64)
        if name not in _HOMOGENEOUS:
            scales = torch.cat([_SCALES, -_SCALES])
        predicted_SP = torch.nan_to_num(act(scales[:, None] * z_P), posinf=0.0, neginf=0.0)
        factor_S = predicted_SP @ y_P / predicted_SP.square().sum(-1).clamp_min(1e-300)
        residual_S = (factor_S[:, None] * predicted_SP - y_P).square().sum(-1)
        at = int(residual_S.argmin())
        starts.append((float(residual_S[at]), name, torch.stack([scales[at], factor_S[at]])))
    for _, name, start in sorted(starts, key=lambda one: one[0])[:_REFINED]:
        fitted = start if name in _HOMOGENEOUS else _descend(known()[name], z_P, y_P, start)
        yield _curve(name, z_P, y_P, precision, *fitted.tolist())


def _shifted(z_P: Tensor, y_P: Tensor, precision: Precision) -> Iterator[Curve]:
    """Scale, factor, shift and constant."""
    if precision.coarse:
        return
    ones = torch.ones_like(z_P)
    starts: list[tuple[float, str, Tensor]] = []
    for name, act in known().items():
        for scale in (1.0, -1.0) if name in _HOMOGENEOUS else (0.5, 1.0, 2.0, -1.0):
            for shift in (-2.0, -1.0, 0.0, 1.0, 2.0):
                basis_P2 = torch.stack([act(scale * z_P + shift), ones], dim=-1)
                if not bool(basis_P2.isfinite().all()):
                    continue
                solved = torch.linalg.lstsq(basis_P2, y_P[:, None], driver="gelsd").solution[:, 0]
                residual = float((basis_P2 @ solved - y_P).square().sum())
                fixed = torch.tensor([scale, float(solved[0]), shift, float(solved[1])], dtype=torch.float64)
                starts.append((residual, name, fixed))
    for _, name, start in sorted(starts, key=lambda one: one[0])[: 2 * _REFINED]:
        fitted = _descend(known()[name], z_P, y_P, start, free=name not in _HOMOGENEOUS)
        yield _curve(name, z_P, y_P, precision, *fitted.tolist())


def _descend(act: Elementwise, z_P: Tensor, y_P: Tensor, start: Tensor, *, free: bool = True) -> Tensor:
    """Levenberg-Marquardt on (scale, factor[, shift, constant]); with `free` off the scale stays."""

    def predict(q: Tensor) -> Tensor:
        shift, constant = (q[2], q[3]) if len(q) > 2 else (0.0, 0.0)
        return torch.nan_to_num(q[1] * act(q[0] * z_P + shift) + constant, posinf=0.0, neginf=0.0)

    q, damping = start.clone(), 1e-3
    moving = [index for index in range(len(q)) if free or index]
    loss = float((predict(q) - y_P).square().sum())
    for _ in range(40):
        base = predict(q)
        step = 1e-6
        columns = []
        for index in moving:
            ahead = q.clone()
            ahead[index] += step
            columns.append((predict(ahead) - base) / step)
        jacobian = torch.stack(columns, dim=-1)
        normal = jacobian.T @ jacobian
        scaled = normal + damping * torch.diag(normal.diagonal().clamp_min(1e-12))
        delta = torch.linalg.lstsq(scaled, (jacobian.T @ (y_P - base))[:, None], driver="gelsd").solution[:, 0]
        ahead = q.clone()
        ahead[moving] += delta
        reached = float((predict(ahead) - y_P).square().sum())
        if reached < loss:
            done = loss - reached < 1e-24 + 1e-12 * loss
            q, loss, damping = ahead, reached, damping / 5
            if done:
                break
        else:
            damping *= 8
            if damping > 1e9:
                break
    return q


def _curve(
    name: str,
    z_P: Tensor,
    y_P: Tensor,
    precision: Precision,
    scale: float,
    factor: float,
    shift: float = 0.0,
    constant: float = 0.0,
) -> Curve:
    """With numbers rounded to six digits where that does not hurt."""
    exact = Curve(name, scale, factor, shift, constant)
    round_ones = Curve(name, _rounded(scale), _rounded(factor), _rounded(shift), _rounded(constant))
    errors = [_error(one(z_P), y_P, precision) for one in (round_ones, exact)]
    chosen = round_ones if errors[0] <= max(errors[1] * 1.01, TOLERANCE / 2) else exact
    return replace(chosen, error=_error(chosen(z_P), y_P, precision))


def _rounded(value: float) -> float:
    near = round(value, 6)
    return float(f"{near:.6g}")


def _limited(curve: Curve, g: Callable[[Tensor], Tensor], z_P: Tensor, y_P: Tensor, precision: Precision) -> Curve:
    """A curve that holds near zero, held against the rest: where it departs, the variable may be clamped."""
    low = _limit(curve, g, -1.0, precision)
    high = _limit(curve, g, 1.0, precision)
    clamped = replace(curve, low=low, high=high)
    error = _error(clamped(z_P), y_P, precision)
    if error < (1.5 * float(torch.finfo(precision.dtype).eps) if precision.coarse else TOLERANCE):
        return replace(clamped, error=error)
    return Curve(None, error=error, runner_up=curve.spelled(), runner_up_error=error)


def _limit(curve: Curve, g: Callable[[Tensor], Tensor], sign: float, precision: Precision) -> float | None:
    """How far the curve holds on this side, None where that is everywhere."""

    def departs(at: float) -> bool:
        z = torch.tensor([sign * at], dtype=torch.float64)
        y, predicted = g(z), curve(z)
        return bool(((predicted - y).abs() / (1 + y.abs()) > precision.tolerance).any())

    if not departs(FAR):
        return None
    inside, outside = NEAR, FAR
    for _ in range(48):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if departs(middle) else (middle, outside)
    found = sign * inside
    return float(round(found)) if abs(found - round(found)) < 1e-3 else round(found, 3)
