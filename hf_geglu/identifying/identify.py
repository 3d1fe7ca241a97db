"""What the public function does with a model, a module and a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_geglu.errors import IdentifyError
from hf_geglu.identifying.identity import Identity, Unknown
from hf_geglu.identifying.measuring import measure
from hf_geglu.identifying.replay import functions, replays
from hf_geglu.identifying.sited import identities_of_sites
from hf_geglu.sites import FoundSites
from hf_geglu.sites.find import explore
from hf_geglu.sites.isolation import isolated
from hf_geglu.sites.projections import within
from hf_geglu.sites.stacks import stacks_of
from hf_geglu.sites.twin import Mold

Answer = Identity | Unknown

FEW = 4
"""A module of so many projections may be one unit; in a larger one the units are looked for."""


def identify(
    unit: nn.Module | Callable[..., Tensor], *, dtype: torch.dtype | None = None
) -> Identity | Unknown | tuple[Identity | Unknown, ...]:
    """Which unit is this: what goes through which activation, and is multiplied by what?

    By behaviour: the unit runs on made-up numbers, in float64 wherever it can; weights, names and configs are not
    read, and nothing of a module changes. Formulas of the family: Shazeer 2020, arXiv:2002.05202, eq. 5 and 6.

    Args:
        unit: A module (a unit without its down projection, a whole FFN block, a layer), a whole Transformers model, or
            a function of one tensor (packed, like ``torch.nn.functional.glu``, or elementwise) or two (..., F).
        dtype: What a function is called in; float64 where it takes that.

    Returns:
        One answer; a tuple of them, one for each FFN block and in the model's order, for a whole model and for a
        module that holds several blocks.

    Raises:
        IdentifyError: `unit` is neither a module nor a function.
    """
    if isinstance(unit, nn.Module):
        return _of_module(unit)
    if not callable(unit) or isinstance(unit, type):
        raise IdentifyError(
            f"identify was given {type(unit).__name__} {unit!r}; it takes a module, a model or a function of tensors"
            + (". Give an instance of the class" if isinstance(unit, type) else "")
        )
    return _of_function(unit, dtype)


def _of_function(function: Callable[..., Any], dtype: torch.dtype | None) -> Answer:
    problems: list[str] = []
    unknown: Unknown | None = None
    with isolated():
        for replay in functions(function, dtype):
            if isinstance(replay, Exception):
                problems.append(_said(replay))
                continue
            answer = measure(replay)
            if isinstance(answer, Identity):
                return answer
            unknown = unknown or answer
    return unknown or Unknown(f"it could not be called with one tensor or two: {'; '.join(dict.fromkeys(problems))}")


def _of_module(module: nn.Module) -> Answer | tuple[Answer, ...]:
    projections = within(module)
    if not projections and stacks_of(module, "") is None:
        return replace(_plain(module), class_name=type(module).__name__)
    found, evidence = explore(module)
    named = identities_of_sites(module, found, evidence)
    if isinstance(module, PreTrainedModel) or len(named) > 1:
        return named
    if len(projections) > FEW or not projections:
        return named[0] if named else _inside(module, found)
    # one block: asked itself, which also tells what the finder leaves open, such as what follows the unit
    answer = _measured(module, found)
    return answer if isinstance(answer, Identity) or not named else named[0]


def _plain(module: nn.Module) -> Answer:
    """A module without projections is a function."""
    twin = Mold(module).cast(module)
    return _of_function(twin, None)


def _measured(module: nn.Module, found: FoundSites) -> Answer:
    """A small module as one unit."""
    answers: list[Answer] = []
    problem = ""
    with isolated():
        for replay in replays(module, Mold(module)):
            if isinstance(replay, Exception):
                problem = problem or _said(replay)
                continue
            answer = measure(replay, module)
            if isinstance(answer, Identity):
                return answer
            answers.append(answer)
            if len(answers) > 1:
                break
    if answers:
        return replace(answers[0], class_name=type(module).__name__)
    reasons = [rejection.reason for rejection in found.rejected] or [f"it could not be run: {problem}"]
    return Unknown("; ".join(dict.fromkeys(reasons)), class_name=type(module).__name__)


def _inside(module: nn.Module, found: FoundSites) -> Answer:
    """No block was found in a larger module: the likeliest place that was refused, looked at by itself."""
    unknown: Answer | None = None
    for rejection in found.rejected:
        inner = module.get_submodule(rejection.path) if rejection.path else module
        if inner is not module and 1 < len(within(inner)) <= FEW:
            answer = replace(_measured(inner, FoundSites((), (rejection,))), path=rejection.path)
            if isinstance(answer, Identity):
                return answer
            unknown = unknown or answer
    reasons = "; ".join(f"{one.path or 'the module'}: {one.reason}" for one in found.rejected)
    return unknown or Unknown(
        reasons or "none of its projections feeds another one through an activation", class_name=type(module).__name__
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
