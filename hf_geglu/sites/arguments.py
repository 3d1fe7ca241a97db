"""Synthetic arguments for a forward nobody has told us anything about.

The first parameter is the hidden state; the others are filled by what their names say about their kind. A small
number of shapes and two ways of filling are tried, in this order, and the first run that gets through counts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

Filling = Literal["absent", "tensors", "everything", "lengths"]
"""How required arguments that say nothing of themselves are filled: with None, or with tensors like the hidden state;
with those come positions that are added to it, instead of the cosine and sine of a rotation. "everything": those that
are mostly None (masks, caches) are tensors too, beside a rotation.
The last way also sets optional lengths whose default is 0, which means "none of these" (the queries of a Q-Former),
and gives something to attend to."""

SIDE = 2
TOKENS = SIDE * SIDE
LONG = 64
"""Of a signal between wide convolutions, which pad and shrink it."""

_NUMBER = re.compile(r"(^|_)(height|width|h|w|num_frames|frames|grid_h|grid_w)$")
_ONE = re.compile(r"batch|num_|idx|index|layer_id")
_GRID = re.compile(r"dimensions|resolution|shape|size|grid")
_CHOICE = re.compile(r"(top_?k|rout|select|expert).*(ind|idx|ids|experts)")
_SHARE = re.compile(r"(top_?k|rout|gating|expert).*(weight|score|prob)")
_ABSENT = re.compile(r"mask|past|cache|position|bias|cu_seqlens|ids$|emb$|rotary|freqs")
_ALWAYS = re.compile(r"^position_embeddings")
_STATE = re.compile(r"hidden|residual|input|states|tensor|skip|shortcut|query|^x$")


def shapes(width: int, *, channels_first: bool, tokens: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Shapes of a hidden state of this width, the common ones first; images and signals where a block convolves; last
    one with as many `tokens`, where that may matter."""
    sequences = ((1, TOKENS, width), (TOKENS, width), (1, SIDE, SIDE, width))
    images = ((1, width, SIDE, SIDE), (1, width, TOKENS), (1, width, 4 * SIDE, 4 * SIDE), (1, width, LONG))
    odd = () if tokens is None else ((1, tokens, width),)
    return (images + sequences if channels_first else sequences) + odd


def fill(module: nn.Module, x: torch.Tensor, filling: Filling) -> dict[str, Any] | None:
    """Keyword arguments for the required parameters after the first; None where `forward` takes none at all."""
    parameters = _parameters(module)
    if not parameters:
        return None
    filled = {
        parameter.name: _value(parameter.name, x, filling)
        for parameter in parameters[1:]
        if _required(parameter) or _ALWAYS.match(parameter.name) or _routes(parameter.name)
    }
    if filling == "lengths":
        filled.update((parameter.name, SIDE) for parameter in parameters[1:] if _optional_length(parameter))
        filled.update((p.name, _another(x)) for p in parameters[1:] if p.name == "encoder_hidden_states")
    return filled


def fillings(module: nn.Module) -> tuple[Filling, ...]:
    """The ways of filling that make a difference for this module."""
    others = _parameters(module)[1:]
    ways: tuple[Filling, ...] = ("absent",)
    if any(_required(parameter) or _ALWAYS.match(parameter.name) for parameter in others):
        ways += ("tensors",)
    if any(_required(parameter) and _ABSENT.search(parameter.name) for parameter in others):
        ways += ("everything",)
    if any(_optional_length(parameter) for parameter in others):
        ways += ("lengths",)
    return ways


def _parameters(module: nn.Module) -> tuple[inspect.Parameter, ...]:
    forward = module.__dict__.get("forward", module.forward)
    if inspect.ismethod(forward):
        return _parameters_of(forward.__func__)[1:]
    return _parameters_of(forward)


@lru_cache(maxsize=256)
def _parameters_of(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD)


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty and parameter.kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )


def _routes(name: str) -> bool:
    """Whether it says which experts a token goes to: needed even where it has a default."""
    return bool(_CHOICE.search(name) or _SHARE.search(name))


def _optional_length(parameter: inspect.Parameter) -> bool:
    return parameter.name.endswith("_length") and parameter.default == 0


def _value(name: str, x: torch.Tensor, filling: Filling) -> Any:
    if _ALWAYS.match(name) and filling != "tensors":
        # cosine and sine of no rotation, of width 1: they broadcast against heads of any size
        return x.new_ones(1, TOKENS, 1), x.new_zeros(1, TOKENS, 1)
    if _CHOICE.search(name):
        # every token goes to the first expert, twice: some squeeze a single choice away
        return torch.zeros(_tokens(x), 2, dtype=torch.long)
    if _SHARE.search(name):
        return x.new_ones(_tokens(x), 2)
    if _NUMBER.search(name):
        return SIDE
    if _GRID.search(name):
        return (SIDE, SIDE)
    if _STATE.search(name):
        return _another(x)
    if _ONE.search(name):
        return 1
    if filling != "everything" and (_ABSENT.search(name) or filling != "tensors"):
        return None
    return _another(x)


def _another(x: torch.Tensor) -> torch.Tensor:
    """A state like x that is not x: two projections that read one each do not read the same."""
    return x.detach().flip(-1)


def _tokens(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()
