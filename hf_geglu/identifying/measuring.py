"""One unit, asked until its formula is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_geglu.identifying.curves import Curve, Precision, known, name_curve
from hf_geglu.identifying.identity import Identity, Unknown
from hf_geglu.identifying.layouts import layout_of
from hf_geglu.identifying.mixing import first_mixer
from hf_geglu.identifying.plane import A, B, Formula, Two, read_plane
from hf_geglu.identifying.replay import ANSWER, INPUT, Askable, Key
from hf_geglu.identifying.telling import Seen, as_identity, mixer_named, source_name
from hf_geglu.identifying.wiring import NotWiredError, Questions, Wiring, draw, feeding, wire

_CHECKED = 4000
"""Random points at which a formula is held against the unit."""


def measure(unit: Askable, module: nn.Module | None = None) -> Identity | Unknown:
    """What a unit computes. `module` is what it was made of, for the names of what mixes and for biases."""
    values = draw(unit, 3)
    try:
        fed = feeding(unit, values)
    except NotWiredError as error:
        return Unknown(str(error))
    answers: list[Identity | Unknown] = []
    for target in _targets(fed):
        answers.append(_measured(unit, module, values, target, fed[target]))
    understood = [one for one in answers if isinstance(one, Identity)]
    acting = [one for one in understood if one.activation not in (None, "linear") or one.gated]
    if len(acting) > 1:
        chain = ", then ".join(one.formula for one in acting)
        return replace(
            acting[0], family="other", formula=chain, difference="a chain of more than two projections", activation=None
        )
    for chosen in (acting, [one for one in understood if one.family != "dense"], understood, answers):
        if chosen:
            return chosen[0]
    return Unknown("none of its projections was called, and its answer depends on nothing")


def _targets(fed: dict[Key, tuple[Key, ...]]) -> list[Key]:
    """Where units may end: first what projections read of other projections, then the answer."""
    calls = [key for key, sources in fed.items() if key != ANSWER and any(one != INPUT for one in sources)]
    if calls:
        return calls
    return [ANSWER] if fed.get(ANSWER) else []


def _measured(
    unit: Askable, module: nn.Module | None, values: dict[Key, Tensor], target: Key, sources: tuple[Key, ...]
) -> Identity | Unknown:
    try:
        return as_identity(unit, module, _see(unit, values, target, sources))
    except NotWiredError as error:
        if "neurons are mixed" not in str(error):
            return Unknown(_where(target, str(error)))
    return _past_mixing(unit, module, values, target, sources)


def _past_mixing(
    unit: Askable, module: nn.Module | None, values: dict[Key, Tensor], target: Key, sources: tuple[Key, ...]
) -> Identity | Unknown:
    """Neurons are mixed somewhere: after the unit, which is then looked at before that, or on one of its branches."""
    mixers = {source: first_mixer(unit, values, source) for source in sources}
    places = [mixer.at for mixer in mixers.values() if mixer is not None]
    if not places:
        return Unknown(_where(target, "neurons are mixed, where no operation shows it"))
    if len(set(places)) == 1 and len(places) == len(sources):
        mixer = next(one for one in mixers.values() if one is not None)
        for step in range(mixer.at - 1, max(-1, mixer.at - 12), -1):
            try:
                seen = _see(unit, values, target, sources, step)
            except (NotWiredError, AssertionError):
                continue
            if seen.formula.curve is None or not seen.formula.curve.name or seen.formula.curve.name == "linear":
                continue
            note = f"followed by {mixer_named(mixer, module)}, which mixes neurons"
            return as_identity(unit, module, replace(seen, notes=(*seen.notes, note)))
    where = "; ".join(
        f"{source_name(source)} goes through {mixer_named(mixer, module)} before it meets the other branch"
        if len(sources) > 1
        else f"{source_name(source)} goes through {mixer_named(mixer, module)}"
        for source, mixer in mixers.items()
        if mixer is not None
    )
    return Identity(
        family="other",
        formula="no function of single neurons",
        difference=f"neurons are mixed: {where}",
        class_name=type(module).__name__ if module is not None else "",
    )


def _see(
    unit: Askable, values: dict[Key, Tensor], target: Key, sources: tuple[Key, ...], step: int | None = None
) -> Seen:
    """Raises NotWiredError where outputs are no functions of a few numbers each."""
    wiring = wire(unit, values, target, sources, step)
    questions = Questions(unit, wiring)
    precision = _precision(unit, wiring, questions)
    notes: list[str] = []
    uneven = questions.uneven(*(0.75, 1.25, 0.625)[: wiring.branches]) if wiring.branches <= 3 else None
    if uneven:
        raise NotWiredError(uneven)
    if questions.weighed:
        notes.append("each neuron is multiplied by a number of its own")
    formula = _formula(questions, wiring, precision)
    if questions.weighed and formula.curve is not None and formula.curve.factor != 1:
        questions.divide(formula.curve.factor)  # learned, too
        formula = _formula(questions, wiring, precision)
    error, rival, rival_error = _held_against(questions, formula, wiring.branches, precision)
    return Seen(formula, wiring, layout_of(wiring, values), precision, error, rival, rival_error, tuple(notes))


def _precision(unit: Askable, wiring: Wiring, questions: Questions) -> Precision:
    """That of the answer, or a lower one where all its numbers are such as that has."""
    generator = torch.Generator().manual_seed(5)
    asked = [torch.randn(64, generator=generator).bfloat16().double() for _ in range(wiring.branches)]
    seen = questions(*asked)
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(seen.to(dtype).double(), seen) and torch.unique(seen).numel() > 8 and not _whole(seen, asked):
            return Precision(dtype)
    return Precision()


def _whole(seen: Tensor, asked: list[Tensor]) -> bool:
    """Whether the answers are numbers of the question, which say nothing about rounding."""
    known_numbers = torch.cat([torch.zeros(1, dtype=torch.float64), *asked])
    return bool(torch.isin(seen.abs(), known_numbers.abs()).all())


def _formula(questions: Questions, wiring: Wiring, precision: Precision) -> Formula:
    if wiring.branches == 1:
        curve = name_curve(questions, precision)
        said = curve.spelled(A) if curve.name else f"?({A}), closest to {curve.runner_up} ({curve.error:.1e} away)"
        if curve.name is None:
            return Formula(said, difference=_nameless(said))
        return Formula(said, curve=curve, predict=curve)
    if wiring.branches == 2:
        formula = read_plane(questions, precision)
        return formula or Formula(
            f"?({A}, {B})", difference="two branches meet in a function that is no product of one of them activated"
        )
    if wiring.branches == 3:
        return _three(questions, wiring, precision)
    raise NotWiredError(f"{wiring.branches} numbers meet in each neuron")


def _nameless(said: str) -> str:
    return f"one branch goes through a function without a name: {said}"


def _three(questions: Questions, wiring: Wiring, precision: Precision) -> Formula:
    """Three numbers: two branches, and a third one added or multiplied."""
    generator = torch.Generator().manual_seed(19)
    a, b = torch.randn(2, 40, generator=generator).bfloat16().double()
    ones = torch.ones_like(a)
    names = [source_name(key) for key in wiring.sources]
    # the input is the likeliest third one
    order = sorted(range(3), key=lambda at: wiring.sources[at] != INPUT)
    for third in order:

        def asked(one: Tensor, other: Tensor, extra: Tensor, third: int = third) -> Tensor:
            wires = [one, other]
            wires.insert(third, extra)
            return questions(*wires)

        zero, at_one, at_two = (asked(a, b, ones * extra) for extra in (0.0, 1.0, 2.0))
        slope = at_one - zero
        linear = _near(at_two - zero, 2 * slope, precision)
        added = linear and _near(slope, slope[:1].expand_as(slope), precision)
        factor = linear and _near(zero, torch.zeros_like(zero), precision)
        if not (added or factor):
            continue
        extra = 0.0 if added else 1.0
        inner = read_plane(_with_third(asked, extra), precision)
        if inner is not None and added:
            return Formula(f"{inner.said} + {names[third]}", difference=f"{names[third]} is added inside the unit")
        if inner is not None and inner.curve is not None:
            return Formula(
                f"({inner.said}) * {names[third]}", difference=f"a third branch, {names[third]}, multiplies the unit"
            )
    return Formula(f"?({', '.join(names)})", difference=f"three branches meet: {', '.join(names)}")


def _with_third(asked: Callable[[Tensor, Tensor, Tensor], Tensor], extra: float) -> Two:
    return lambda one, other: asked(one, other, torch.full_like(one, extra))


def _near(a: Tensor, b: Tensor, precision: Precision) -> bool:
    return bool(((a - b).abs() / (1 + b.abs())).max() < 4 * precision.tolerance)


def _held_against(
    questions: Questions, formula: Formula, branches: int, precision: Precision
) -> tuple[float | None, str | None, float | None]:
    """Errors of the formula and of its runner-up on random numbers; a formula that does not hold raises."""
    if formula.predict is None:
        return None, None, None
    curve = formula.curve
    generator = torch.Generator().manual_seed(23)
    asked = torch.randn(branches, _CHECKED, generator=generator) * 3
    asked[:, ::2] *= 2
    asked = asked.bfloat16().double()
    seen = questions(*asked)
    error = float(_errors(formula.predict(*asked), seen).max())
    if error > precision.tolerance:
        said = formula.said.replace(A, "gate").replace(B, "value")
        raise NotWiredError(f"{said} holds on a grid, but is {error:.1e} away elsewhere")
    if precision.coarse and curve is not None:  # rounding of the product hides what tells the activations apart
        return curve.error, curve.runner_up, curve.runner_up_error
    rivals: list[tuple[float, Curve]] = []
    for name in known():
        if curve is not None and formula.difference is None and name != curve.name:
            rival = replace(curve, name=name)
            predicted = formula.with_curve(rival)(*asked)
            predicted = torch.nan_to_num(predicted, posinf=1e30, neginf=-1e30)
            rivals.append((float(_errors(predicted, seen).max()), rival))
    best = min((one for one in rivals if one[0] > precision.tolerance), key=lambda one: one[0], default=None)
    if best is None:
        return error, None, None
    return error, best[1].spelled("gate" if branches == 2 else "z"), best[0]


def _errors(predicted: Tensor, seen: Tensor) -> Tensor:
    return (predicted - seen).abs() / (1 + seen.abs())


def _where(target: Key, reason: str) -> str:
    return f"what enters {target[1]}: {reason}" if target[0] == "call" else reason
