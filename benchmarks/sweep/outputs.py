"""The floating-point tensors of one forward by name. Needs torch only: the reading side knows nothing of hf_geglu."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


def run(model: nn.Module, inputs: Mapping[str, Any], *, gradients: bool = False) -> Tensors:
    """Outputs of a model in eval mode, for the same random numbers at every call; nested ones as "name.0.1"."""
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        return dict(_tensors("", model(**inputs)))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}".lstrip("."), item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}.{index}".lstrip("."), item)


def distance(before: Tensors, after: Tensors) -> tuple[float, float]:
    """(largest absolute difference, the same relative to the largest magnitude of its tensor).

    Values that are equal, infinities and NaN included, count as 0.

    Raises:
        ValueError: other names or shapes, or NaN where the other has a number.
    """
    if before.keys() != after.keys():
        raise ValueError(f"outputs {sorted(before)} became {sorted(after)}")
    absolute = relative = 0.0
    for name, one in before.items():
        other = after[name]
        if one.shape != other.shape:
            raise ValueError(f"{name} of shape {tuple(one.shape)} became {tuple(other.shape)}")
        wide_one, wide_other = one.detach().double(), other.detach().double()
        same = (wide_one == wide_other) | (wide_one.isnan() & wide_other.isnan())
        difference = torch.where(same, 0.0, (wide_one - wide_other).abs())
        if not difference.isfinite().all():
            raise ValueError(f"{name} is infinite or NaN where it was a number")
        finite = wide_one[wide_one.isfinite()]
        size = finite.abs().max().item() if finite.numel() else 0.0
        absolute = max(absolute, difference.max().item())
        relative = max(relative, difference.max().item() / max(size, 1e-30))
    return absolute, relative


def says_something(outputs: Tensors) -> bool:
    """Whether some tensor is finite somewhere: where all is NaN, equal outputs prove nothing."""
    return any(bool(tensor.isfinite().any()) for tensor in outputs.values())
