"""What is trained: the whole model, its FFN blocks, only the value branch of its gated blocks, or adapters.

A packed projection holds gate and value in one parameter. Its gradient is then masked: Adam's moments of the gate's
rows stay zero, and so does their update; such parameters are spared from weight decay, which would still pull at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from hf_geglu.conversions import branch_outputs
from hf_geglu.errors import ConfigurationError
from hf_geglu.sites import Site, find_sites
from hf_geglu.sites.weights import bias_name, experts_in, is_stack, output_dim, parameters_of, weight_name
from hf_geglu.training.parameters.adapters import MARK
from hf_geglu.training.processes.sharding import part_of, share

Part = Literal["all", "ffn", "value", "lora"]


@dataclass(frozen=True)
class Trainable:
    """Which parameters of a model are trained.

    Attributes:
        part: as it was asked for.
        names: of the parameters; None for all that are not frozen already.
        values: of packed parameters, a mask of the parameter's shape, broadcast where it can be, that is 1 where the
            value branch lies and 0 where the gate does.
    """

    part: Part
    names: frozenset[str] | None = None
    values: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))

    @contextmanager
    def only(self, model: nn.Module, *, hooks: bool = True) -> Iterator[None]:
        """Freeze everything else inside the block.

        Args:
            model: whose parameters they are.
            hooks: mask the gradients of packed parameters by hooks. A model that will be sharded loses them: then
                `masks` and `mask_gradients` do it, before each step.
        """
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        handles = []
        try:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(before[name] and (self.names is None or name in self.names))
                if hooks and self.part == "value" and name in self.values and parameter.requires_grad:
                    mask = _masked(self.values[name].to(parameter.device))
                    handles.append(parameter.register_hook(mask))  # type: ignore[no-untyped-call]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(before[name])

    def masks(self, model: nn.Module) -> dict[nn.Parameter, Tensor]:
        """What to multiply gradients with, or this process's share of them, so that only the value branches move."""
        if self.part != "value":
            return {}
        return {
            parameter: part_of(self.values[name], parameter).to(share(parameter))
            for name, parameter in model.named_parameters()
            if name in self.values and parameter.requires_grad
        }


def mask_gradients(masks: Mapping[nn.Parameter, Tensor]) -> None:
    """Multiply each gradient with its mask (see `Trainable.masks`)."""
    for parameter, mask in masks.items():
        if parameter.grad is not None:
            share(parameter.grad).mul_(mask)


def choose_trainable(model: nn.Module, part: Part) -> Trainable:
    """Find the parameters of a part.

    Args:
        model: with its weights; changes nothing.
        part: "all"; "ffn": gate, up and down projections of every FFN block; "value": the value branches of the gated
            ones; "lora": adapters that are on the model already (see `adapters`).

    Raises:
        ConfigurationError: the model has no such part.
    """
    if part == "all":
        return Trainable(part)
    if part == "lora":
        found = frozenset(name for name, _ in model.named_parameters() if f".{MARK}" in f".{name}")
        if not found:
            raise ConfigurationError(
                f"--train lora: this {type(model).__name__} has no adapters on it. Wrap the training in "
                "hf_geglu.training.parameters.adapters.adapted, as `finetune` does."
            )
        return Trainable(part, found)
    sites = [site for site in find_sites(model) if part == "ffn" or site.gated]
    if not sites:
        raise ConfigurationError(
            f"--train {part}: {type(model).__name__} has no {'gated ' if part == 'value' else ''}FFN block. "
            + ("Add --convert, or train all or ffn." if part == "value" else "Train all.")
        )
    if part == "ffn":
        return Trainable(part, frozenset(name for site in sites for name in parameters_of(model, site, down=True)))
    return Trainable(
        part, frozenset(name for site in sites for name in _value_names(model, site)), value_masks(model, sites)
    )


def value_masks(model: nn.Module, sites: Iterable[Site] | None = None) -> dict[str, Tensor]:
    """For every packed parameter of a gated block: 1 where its value branch lies. Broadcasts to the parameter.

    Args:
        model: with its weights.
        sites: its sites, where they are at hand.
    """
    masks = {}
    for site in find_sites(model) if sites is None else sites:
        if not site.gated or site.layout == "separate":
            continue
        outputs = torch.zeros(2 * site.width)
        outputs[branch_outputs(site)[1]] = 1.0
        for name, parameter in parameters_of(model, site).items():
            weight = name == weight_name(site.up, site.projection)
            rows = outputs
            if is_stack(site.projection) and weight and parameter.ndim == 2:  # experts one after the other
                rows = outputs.repeat(experts_in(tuple(parameter.shape), site))
            dim = output_dim(site.projection) if weight and parameter.ndim > 1 else parameter.ndim - 1
            dim = 0 if rows is not outputs else dim
            masks[name] = rows.view([-1 if at == dim else 1 for at in range(parameter.ndim)])
    return masks


def _value_names(model: nn.Module, site: Site) -> list[str]:
    names = (weight_name(site.up, site.projection), bias_name(site.up, site.projection))
    return [name for name in parameters_of(model, site) if name in names]


def _masked(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * mask.to(gradient.dtype)
