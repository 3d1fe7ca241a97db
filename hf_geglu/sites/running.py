"""One run of a block's twin by a recipe: what is replaced, what it is called with, and how the run ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_geglu.modeling_geglu import expose_activation
from hf_geglu.sites.arguments import Filling, fill
from hf_geglu.sites.overheard import Arguments
from hf_geglu.sites.trace import STUB_FORMS, Rehearsal, Stub, Trace, WidthError
from hf_geglu.sites.twin import Mold


@dataclass(slots=True)
class Recipe:
    """How a block was made to run; `forms` is what each stub has to answer with."""

    stubs: Collection[str]
    shape: tuple[int, ...]
    filling: Filling
    forms: dict[str, int] = field(default_factory=dict)
    replaced: dict[int, torch.Tensor] = field(default_factory=dict)
    """Arguments made anew in the width that the projection wants which they reach (keys and values of another model's
    width), by their places among the floating-point tensors."""
    given: Arguments | None = None
    """What the model itself calls the block with; shape and filling do not count then."""


@dataclass(slots=True)
class Run:
    """One run: its recipe, what it recorded, and how it ended."""

    recipe: Recipe
    trace: Trace
    error: str | None = None
    misfit: WidthError | None = None
    answer: Any = None


def persist(block: nn.Module, mold: Mold, recipe: Recipe) -> Run:
    """Play a recipe until nothing is left to be changed: an argument whose width a projection refuses is made anew in
    that width, and the stub that was called last gives another form each time the run fails right after it."""
    while True:
        run = play(block, mold, recipe)
        if run.error is None:
            return run
        if _refitted(run):
            continue
        stub = run.trace.last_stub
        if stub is None or recipe.forms.get(stub, 0) + 1 >= STUB_FORMS:
            return run
        recipe.forms[stub] = recipe.forms.get(stub, 0) + 1


def _refitted(run: Run) -> bool:
    """Whether the run failed for the width of one argument, beside the hidden state, that has another one now."""
    if run.misfit is None or run.recipe.given is not None or not run.misfit.x.requires_grad:
        return False
    x, inputs = run.misfit.x, run.trace.inputs
    grads = torch.autograd.grad(x.sum(), inputs, allow_unused=True)
    feeding = [index for index, grad in enumerate(grads) if grad is not None]
    if len(feeding) != 1 or feeding[0] == 0 or feeding[0] in run.recipe.replaced:
        return False
    old = inputs[feeding[0]]
    if not old.ndim or old.shape[-1] != x.shape[-1]:
        return False
    run.recipe.replaced[feeding[0]] = run.trace.noise((*old.shape[:-1], run.misfit.wanted))
    return True


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
        run.misfit = error if isinstance(error, WidthError) else None
        run.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return run


def _arguments(twin: nn.Module, recipe: Recipe, trace: Trace) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = recipe.given
    if given is None:
        x = trace.noise(recipe.shape)
        extra = fill(twin, x, recipe.filling)
        given = Arguments((), {}) if extra is None else Arguments((x,), extra)
    return given.fresh(trace.inputs, recipe.replaced)
