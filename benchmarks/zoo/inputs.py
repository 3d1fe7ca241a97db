"""Inputs for one forward of any model of the zoo."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_geglu.inputs import synthetic_inputs


class NoInputsError(ValueError):
    """Nothing says what the model's inputs look like."""


def inputs_for(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of one forward.

    Raises:
        NoInputsError: neither the config nor the signature says enough.
    """
    inputs = synthetic_inputs(model)
    if inputs is None:
        raise NoInputsError("neither the config nor the signature says what the inputs look like")
    return dict(inputs)
