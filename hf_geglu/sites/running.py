"""One run of a block's twin by a recipe: what is replaced, what it is called with, and how the run ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from hf_geglu.modeling_geglu import expose_activation
from hf_geglu.sites.arguments import Filling, fill
from hf_geglu.sites.overheard import Arguments
from hf_geglu.sites.trace import STUB_FORMS, Rehearsal, Stub, Trace
from hf_geglu.sites.twin import Mold


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


def persist(block: nn.Module, mold: Mold, recipe: Recipe) -> Run:
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
