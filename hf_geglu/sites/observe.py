"""Run a block's twin until it goes through, judge what it did, and rehearse what a conversion would do to it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_geglu.modeling_geglu import activation_calls, expose_activation
from hf_geglu.sites.activations import candidates
from hf_geglu.sites.arguments import Filling, fill, fillings, shapes
from hf_geglu.sites.hypotheses import TOLERANCE
from hf_geglu.sites.isolation import isolated
from hf_geglu.sites.overheard import Arguments
from hf_geglu.sites.projections import Port, leads_on, within
from hf_geglu.sites.trace import STUB_FORMS, Rehearsal, Stub, Trace
from hf_geglu.sites.twin import Mold
from hf_geglu.sites.verdict import (
    Observation,
    Refusal,
    Verdict,
    entering,
    everything_passes,
    gate_of,
    judge,
    stays_in_place,
    value_of,
)

MAX_WIDTHS = 3


@dataclass(frozen=True, slots=True)
class Seen:
    """An observation in words: paths relative to the block, widths, formula, and where the activation lives."""

    observation: Observation
    activation_path: str | None = None
    activation_call: str | None = None
    """Set where the activation is at that path only once this call is exposed."""
    dim: int = -1
    """The dimension of what the activation hears that counts neurons."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of running one block. `error` says why it could not be run to its end, None where it was."""

    seen: tuple[Seen, ...]
    refused: tuple[Refusal, ...]
    error: str | None


@dataclass(slots=True)
class Recipe:
    """How a block was made to run; `forms` is what each stub has to answer with."""

    stubs: Collection[str]
    shape: tuple[int, ...]
    filling: Filling
    forms: dict[str, int] = field(default_factory=dict)
    given: Arguments | None = None
    """What the model itself calls the block with; shape and filling do not count then."""


@dataclass(slots=True)
class Run:
    """One run: its recipe, what it recorded, and how it ended."""

    recipe: Recipe
    trace: Trace
    error: str | None = None
    answer: Any = None


def observe(
    block: nn.Module,
    *,
    stub_sets: Collection[Collection[str]] = ((),),
    mold: Mold | None = None,
    widths: Collection[int] = (),
    by_hand: bool = False,
    given: Arguments | None = None,
    tokens: int | None = None,
) -> Probe:
    """Probe one block by behaviour; its weights are never read and nothing of it changes.

    Args:
        block: The module to be understood; it must run on one hidden state.
        stub_sets: Paths of children to be replaced by noise. Each set is tried until one shows an FFN block.
        mold: Casts the twins; give the one made of the whole model when many of its blocks are probed.
        widths: Of the hidden state; read off the projections where none are given.
        by_hand: Somebody says that there is a block, so its widths need not be those of one.
        given: Arguments to run it with, instead of synthetic ones.
        tokens: A number of tokens to try after the usual ones.
    """
    mold = mold or Mold(block)
    verdict: Verdict | None = None
    furthest: Run | None = None
    with isolated():
        for stubs in stub_sets:
            asked = (
                _recipes(block, stubs, widths, tokens) if given is None else [Recipe(stubs, (), "absent", given=given)]
            )
            for recipe in asked:
                run = _persist(block, mold, recipe)
                if run.error is None and run.trace.calls:
                    shown = judge(run.trace, by_hand=by_hand)
                    if shown.taken:
                        return _probed(block, mold, run, shown)
                    verdict = verdict if verdict and verdict.refused else shown
                    break
                if furthest is None or len(run.trace.calls) > len(furthest.trace.calls):
                    furthest = run
        if verdict is None and furthest is not None:
            shown = judge(furthest.trace, by_hand=by_hand)
            if shown.taken:
                return _probed(block, mold, furthest, shown)
    if verdict is not None:
        return Probe((), verdict.refused, None)
    return Probe((), (), furthest.error if furthest and furthest.error else "none of its projections was called")


def visible(block: nn.Module, stubs: Collection[str]) -> list[tuple[str, Port]]:
    """The projections of a block that are not below a stub."""
    return [
        (path, port)
        for path, _, port in within(block)
        if not any(path == stub or path.startswith(stub + ".") for stub in stubs)
    ]


def _recipes(block: nn.Module, stubs: Collection[str], widths: Collection[int], tokens: int | None) -> list[Recipe]:
    """Every way to run a block, the likeliest first."""
    ports = [port for _, port in visible(block, stubs)]
    if not widths:
        pairs = [(a, b) for a in ports for b in ports if a is not b and leads_on(a, b)]
        pairs.sort(key=lambda pair: pair[0].d_in != pair[1].d_out)
        widths = list(dict.fromkeys(first.d_in for first, _ in pairs))[:MAX_WIDTHS]
    images = any(port.convolves for port in ports)
    return [
        Recipe(stubs, shape, filling)
        for width in widths
        for shape in shapes(width, channels_first=images, tokens=tokens)
        for filling in fillings(block)
    ]


def _persist(block: nn.Module, mold: Mold, recipe: Recipe) -> Run:
    """Play a recipe, giving the stub that was called last another form each time the run fails right after it."""
    while True:
        run = play(block, mold, recipe)
        stub = run.trace.last_stub
        if run.error is None or stub is None or recipe.forms.get(stub, 0) + 1 >= STUB_FORMS:
            return run
        recipe.forms[stub] = recipe.forms.get(stub, 0) + 1


def play(
    block: nn.Module,
    mold: Mold,
    recipe: Recipe,
    rehearsal: Rehearsal | None = None,
    *,
    exposing: tuple[str, str] | None = None,
) -> Run:
    """Run a fresh twin once, with the call of one of its modules exposed if so asked. Whatever it raises is recorded,
    for it is somebody else's code."""
    trace = Trace(forms=recipe.forms, rehearsal=rehearsal)
    run = Run(recipe, trace)
    try:
        stubbed = {id(block.get_submodule(path)): partial(Stub, trace, path) for path in recipe.stubs}
        twin = mold.cast(block, stubbed)
        if exposing is not None:
            expose_activation(twin.get_submodule(exposing[0]), exposing[1])
        trace.attach(twin)
        args, kwargs = _arguments(twin, recipe, trace)
        with trace:
            run.answer = twin(*args, **kwargs)
    except Exception as error:
        run.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return run


def _arguments(twin: nn.Module, recipe: Recipe, trace: Trace) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = recipe.given
    if given is None:
        x = trace.noise(recipe.shape)
        extra = fill(twin, x, recipe.filling)
        given = Arguments((), {}) if extra is None else Arguments((x,), extra)
    return given.fresh(trace.inputs)


def _probed(block: nn.Module, mold: Mold, run: Run, shown: Verdict) -> Probe:
    """What a run showed, with the activations located. What comes between a unit and the down projection is nobody's
    business as long as an exchange of the activation shows that it leaves positions where they are."""
    seen: list[Seen] = []
    refused = list(shown.refused)
    for one in shown.taken:
        located = _with_attribute(block, mold, run, one) or _with_call(block, mold, run, one)
        if located is None and not one.direct:
            reason = f"what enters {one.down.path} is made of {one.fit}, but not position by position"
            refused.append(Refusal(one.projections, reason))
        else:
            seen.append(located or Seen(one))
    return Probe(tuple(seen), tuple(refused), run.error)


def _with_call(block: nn.Module, mold: Mold, run: Run, one: Observation) -> Seen | None:
    """The call of a function that is the activation, proven by exposing it in a twin and then exchanging it."""
    for path, module in block.named_modules():
        if any(path == stub or path.startswith(f"{stub}.") for stub in run.recipe.stubs):
            continue
        for call in activation_calls(type(module)) if type(module).__module__.partition(".")[0] != "torch" else ():
            exposed = play(block, mold, run.recipe, exposing=(path, call))
            if exposed.error == run.error and len(exposed.trace.calls) == len(run.trace.calls):
                seen = _with_attribute(block, mold, exposed, one, exposing=(path, call))
                if seen is not None:
                    return seen
    return None


def _with_attribute(
    block: nn.Module, mold: Mold, run: Run, one: Observation, *, exposing: tuple[str, str] | None = None
) -> Seen | None:
    """The attribute that a conversion can exchange, proven by exchanging it, and the dimension of neurons there.

    An attribute qualifies if each time it was called it heard the gate branch. Then the conversion is rehearsed: it
    answers with fresh noise, and for a dense block the up projection is twice as wide; the noise must reach the down
    projection.
    """
    gates = [call for call in run.trace.calls if call.path == one.gate.path]
    times = len(gates)
    matching: dict[str, int] = {}
    named = dict(candidates())[one.fit.activation]
    for path in dict.fromkeys(heard.path for heard in run.trace.heard):
        heard = [heard for heard in run.trace.heard if heard.path == path]
        if not all(each.x.is_floating_point() and _same(named(each.x), each.y) for each in heard):
            continue
        inputs = [each.x for each in heard]
        for dim in (1, -1):
            heard_NF = [_channels_last(x, dim) for x in inputs]
            if len(inputs) == times and any(_same(x_NF, one.gate_NF) for x_NF in heard_NF):
                matching[path] = dim
            elif len(inputs) == 1 and _same(heard_NF[0], _concatenated([gate_of(call, one) for call in gates])):
                matching[path] = dim  # once for all experts
    for path in sorted(matching, key=lambda path: (_wraps(block, path), path.count("."))):
        rehearsal = Rehearsal(path, one.up.path if one.fit.layout == "dense" else None, matching[path], not one.direct)
        again = play(block, mold, run.recipe, rehearsal, exposing=exposing)
        if again.error == run.error and _reaches(again.trace, one, rehearsal):
            return Seen(one, path, exposing and exposing[1], matching[path])
    return None


def _channels_last(x: torch.Tensor, dim: int) -> torch.Tensor:
    moved = x.movedim(dim, -1) if x.ndim > 2 else x
    return moved.reshape(-1, moved.shape[-1])


def _reaches(trace: Trace, one: Observation, rehearsal: Rehearsal) -> bool:
    """Whether the noise given by the exchanged activation is what reached the down projection, multiplied as before."""
    downs = [call for call in trace.calls if call.path == one.down.path]
    ups = [call for call in trace.calls if call.path == one.up.path]
    if not len(downs) == len(ups) >= len(rehearsal.given) > 0:
        return False
    expected_NF = _concatenated([_channels_last(given, rehearsal.dim) for given in rehearsal.given]).detach()
    if one.fit.layout != "dense":
        values = [value_of(up, down, one.fit) for up, down in zip(ups, downs, strict=True)]
        value_NF = _concatenated(values)
        if value_NF.shape != expected_NF.shape:
            return False
        expected_NF = expected_NF * (value_NF + one.fit.offset)
    if one.direct:
        return _same(_concatenated([entering(down) for down in downs]), expected_NF)
    if one.fit.layout != "dense":
        shown = (_channels_last(result.detach(), dim) for result in trace.results for dim in (-1, 1) if result.ndim > 1)
        return any(_same(result_NF, expected_NF) for result_NF in shown) and stays_in_place(
            rehearsal.given[0], downs[0], rehearsal.dim
        )
    passes = (everything_passes(given, down, [up]) for given, up, down in zip(rehearsal.given, ups, downs, strict=True))
    return all(passes) and stays_in_place(rehearsal.given[0], downs[0], rehearsal.dim)


def _concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    """All tokens in one; nothing where the parts have different widths."""
    return torch.cat(parts) if len({part.shape[-1] for part in parts}) == 1 else torch.empty(0)


def _wraps(block: nn.Module, path: str) -> bool:
    """Containers come last: exchanging one would also remove the dropout behind the activation."""
    holder: object = block
    for name in path.split("."):
        holder = getattr(holder, name, None)
    return isinstance(holder, nn.Sequential)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE)
