"""Inputs for one forward of any model of the zoo."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.given import GIVEN, Maker
from hf_geglu.inputs import candidate_inputs, synthetic_inputs


class NoInputsError(ValueError):
    """Nothing says what the model's inputs look like."""


def inputs_for(model: nn.Module, model_type: str = "") -> dict[str, Any]:
    """Keyword arguments of one forward, that the model takes.

    Args:
        model: of the zoo.
        model_type: for the parts that have no config of their own.

    Raises:
        NoInputsError: it takes none of what its config and signature suggest; says what it had against the first.
    """
    maker = GIVEN.get(model_type or getattr(getattr(model, "config", None), "model_type", ""))
    if maker is not None:
        return maker(Maker(model))
    inputs = synthetic_inputs(model)
    # nothing is generated here, and some caches are written in place, which gradients do not survive
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if inputs is not None:
        return {**cache, **inputs}
    suggestion = next(candidate_inputs(model), None)
    if suggestion is None:
        wanted = ", ".join(inspect.signature(model.forward).parameters)
        raise NoInputsError(f"nothing says what these arguments look like: {wanted}")
    with torch.no_grad():
        model(**suggestion)
    raise NoInputsError(f"all outputs are NaN, or there are none, on {', '.join(suggestion)}")
