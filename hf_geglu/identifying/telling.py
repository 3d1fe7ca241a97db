"""From the formula of one target to an identity in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_geglu.identifying.curves import Precision
from hf_geglu.identifying.identity import Identity, family_of
from hf_geglu.identifying.layouts import Layout
from hf_geglu.identifying.mixing import Mixer
from hf_geglu.identifying.plane import A, B, Formula
from hf_geglu.identifying.replay import INPUT, Askable, Key, ModuleReplay
from hf_geglu.identifying.wiring import Wiring


@dataclass(frozen=True, slots=True)
class Seen:
    """The formula of one target, with what it was asked through."""

    formula: Formula
    wiring: Wiring
    layout: Layout
    precision: Precision
    error: float | None
    runner_up: str | None
    runner_up_error: float | None
    notes: tuple[str, ...] = ()


def as_identity(unit: Askable, module: nn.Module | None, seen: Seen) -> Identity:
    """What was seen, in words; `module` is what the unit was made of."""
    formula, wiring = seen.formula, seen.wiring
    names = _roles(wiring, formula)
    difference = formula.difference
    told: dict[str, Any] = {"class_name": type(module).__name__ if module is not None else "", "notes": seen.notes}
    told |= {"error": seen.error, "runner_up": seen.runner_up, "runner_up_error": seen.runner_up_error}
    down = wiring.target[1] if wiring.target[0] == "call" else None
    told |= {"gate": names["gate"], "value": names.get("value"), "down": down}
    told["layout"] = seen.layout.name
    if module is not None:
        told["gate_bias"] = _has_bias(module, names["gate"])
        told["value_bias"] = _has_bias(module, names.get("value"))
        told["down_bias"] = _has_bias(module, down)
    if difference is None:
        difference = seen.layout.difference or _inputs_differ(unit, wiring)
    said = _spelled(formula.said, wiring, formula, difference)
    if difference is not None or formula.curve is None:
        difference = difference and _spelled(difference, wiring, formula, difference)
        return Identity(family="other", formula=said, difference=difference, **told)
    curve = formula.curve
    gated = wiring.branches == 2
    told |= {"scale": curve.scale, "factor": curve.factor, "shift": curve.shift, "value_offset": formula.offset}
    told |= {"gate_limits": (curve.low, curve.high), "value_limits": formula.limits}
    if gated:
        told["gate_half"] = _half(seen.layout, formula)
    assert curve.name is not None
    if not gated and curve.constant:
        told["notes"] = (*seen.notes, f"{curve.constant:.6g} is added")
    family = family_of(curve.name) if gated else "dense"
    return Identity(family=family, formula=said, activation=curve.name, **told)


def _spelled(said: str, wiring: Wiring, formula: Formula, difference: str | None) -> str:
    """The formula with words for its variables."""
    if wiring.branches == 1:
        words = {"a": "z"}
    elif difference is None and formula.curve is not None:
        words = {"a": "gate", "b": "value"} if formula.gate == "a" else {"a": "value", "b": "gate"}
    else:
        first, second = wiring.sources[0], wiring.sources[1]
        words = {"a": source_name(first), "b": source_name(second)}
        if words["a"] == words["b"]:
            words = {"a": "first", "b": "second"}
    return said.replace(A, words["a"]).replace(B, words.get("b", ""))


def _roles(wiring: Wiring, formula: Formula) -> dict[str, str]:
    names = [source_name(key) for key in wiring.sources]
    if len(names) != 2:
        return {"gate": names[0]}
    return {"gate": names[0], "value": names[1]} if formula.gate == "a" else {"gate": names[1], "value": names[0]}


def _half(layout: Layout, formula: Formula) -> Any:
    if layout.name not in ("packed", "interleaved"):
        return None
    return "first" if formula.gate == "a" else "last"


def _inputs_differ(unit: Askable, wiring: Wiring) -> str | None:
    """Whether the two projections read different things."""
    calls = [key for key in dict.fromkeys(wiring.sources) if key[0] == "call"]
    if isinstance(unit, ModuleReplay) and wiring.branches == 2:
        if len(calls) == 2:
            one, other = (unit.entered[key] for key in calls)
            if one.shape != other.shape or not torch.equal(one, other):
                return f"gate and value are made of different inputs ({calls[0][1]} and {calls[1][1]})"
            if calls[0][1] == calls[1][1]:
                return f"gate and value are the same numbers: {calls[0][1]} is called twice"
        elif len(calls) == 1 and INPUT in wiring.sources:
            return f"one branch is the input itself, the other {calls[0][1]}: there is one projection for two branches"
    return None


def _has_bias(module: nn.Module, path: str | None) -> bool | None:
    try:
        projection = None if path is None else module.get_submodule(path)
    except AttributeError:
        return None
    return None if projection is None or projection is module else getattr(projection, "bias", None) is not None


def source_name(source: Key) -> str:
    """Path of a projection, or the name of an argument."""
    return source[1]


def mixer_named(mixer: Mixer, module: nn.Module | None) -> str:
    """The class that mixes, or the operation."""
    if mixer.module and module is not None:
        return f"{type(module.get_submodule(mixer.module)).__name__} ({mixer.module})"
    reduced = {"mean", "sum", "norm", "amax", "max", "var", "std", "linalg_norm", "pow", "vector_norm", "logsumexp"}
    return f"{mixer.name} over neurons{' (a norm)' if mixer.name in reduced else ''}"
