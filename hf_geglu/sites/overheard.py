"""The arguments that a model itself gives to its blocks, for those that synthetic ones do not fit.

A twin of the whole model is run on the user's inputs or on synthetic ones, with no product computed, until every block
that is asked for has been called once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from hf_geglu.inputs import Inputs, candidate_inputs
from hf_geglu.sites.isolation import isolated
from hf_geglu.sites.trace import Trace
from hf_geglu.sites.twin import Mold

ATTEMPTS = 6
"""Sets of inputs that are tried; later ones are ever less likely."""


@dataclass(frozen=True, slots=True, eq=False)
class Arguments:
    """Of one call. Their values are noise; their shapes and kinds are real."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def fresh(
        self, leaves: list[torch.Tensor], replaced: Mapping[int, torch.Tensor] = MappingProxyType({})
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies for one run; what its floating-point tensors are copies of, with a gradient each, goes to `leaves`.
        Those of these indices among the leaves are replaced."""
        return _copied(self.args, leaves, replaced), _copied(dict(self.kwargs), leaves, replaced)


class _Enough(Exception):
    pass


def overhear(model: nn.Module, paths: list[str], mold: Mold, inputs: Inputs | None) -> dict[str, Arguments]:
    """What the modules at these paths are called with, as far as the model runs on `inputs` or on synthetic ones."""
    heard: dict[str, Arguments] = {}
    if not paths or (inputs is None and getattr(model, "config", None) is None):
        return heard

    called: dict[str, Arguments] = {}

    def before(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.setdefault(path, Arguments(_copied(args), _copied(kwargs)))

    def after(path: str, *_: Any) -> None:  # only what a block got through was right for it
        heard.setdefault(path, called[path])
        if len(heard) == len(paths):
            raise _Enough

    with isolated(), torch.no_grad():
        twin = mold.cast(model)
        trace = Trace(recording=False)
        trace.attach(twin)
        for path in paths:
            module = twin.get_submodule(path)
            module.register_forward_pre_hook(partial(before, path), with_kwargs=True)
            module.register_forward_hook(partial(after, path))
        own = [] if inputs is None else [_widened(dict(inputs))]
        for attempt in chain(own, islice(candidate_inputs(twin), ATTEMPTS)):
            called.clear()
            try:
                with trace:
                    twin(**attempt)
            except Exception:  # somebody else's code, or _Enough: what was heard until then is what counts
                if len(heard) < len(paths):
                    continue
            break
    return heard


def _widened(value: Any) -> Any:
    """A copy for the twin, which computes in float64 on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", torch.float64 if value.is_floating_point() else None, copy=True)
    if isinstance(value, (tuple, list)):
        return type(value)(_widened(item) for item in value)
    if isinstance(value, dict):
        return {key: _widened(item) for key, item in value.items()}
    return value


def _copied(
    value: Any,
    leaves: list[torch.Tensor] | None = None,
    replaced: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> Any:
    if isinstance(value, torch.Tensor):
        index = -1 if leaves is None else len(leaves)
        copied = (replaced[index] if index in replaced and value.is_floating_point() else value).detach().clone()
        if leaves is None or not copied.is_floating_point():
            return copied
        leaves.append(copied.requires_grad_())
        return copied.clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(item, leaves, replaced) for item in value)
    if type(value) is dict:
        return {key: _copied(item, leaves, replaced) for key, item in value.items()}
    try:
        return copy.deepcopy(value)  # a cache, which a run would fill
    except Exception:  # whatever cannot be copied is looked at only
        return value
