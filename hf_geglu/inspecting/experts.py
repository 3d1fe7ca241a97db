"""Hears experts whose matrices are one parameter: there is no module to put a hook on, so products with a part of that
parameter are heard instead, each with the number of its expert.

Legend of suffixes: E experts, N tokens routed to one, F neurons of one, B bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_geglu.functional import activation
from hf_geglu.inspecting.measure import CLOSED
from hf_geglu.inspecting.place import Place
from hf_geglu.inspecting.sketch import BINS, bins_of

_PRODUCTS = (
    nn.functional.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
)


class ExpertsPass:
    """What is kept of one stack: counts and sums of each neuron of each expert."""

    def __init__(self, place: Place, experts: int) -> None:
        self.place = place
        self.tokens_E = torch.zeros(experts, dtype=torch.long)
        self.closed_EF = torch.zeros(experts, place.site.width, dtype=torch.long)
        self.histogram_B = torch.zeros(BINS, dtype=torch.long)

    def add(self, expert: int, gate_NF: torch.Tensor) -> None:
        """The gates' inputs of one call of one expert."""
        site = self.place.site
        if site.limit is not None:
            gate_NF = gate_NF.clamp(max=site.limit)
        unit = self.place.unit
        self.tokens_E[expert] += len(gate_NF)
        closed_NF = activation(site.activation)(gate_NF.float()).abs() < CLOSED * unit
        self.closed_EF[expert] += closed_NF.sum(0).cpu()
        self.histogram_B += torch.bincount(bins_of(gate_NF, unit).flatten(), minlength=BINS).cpu()

    def facts(self) -> dict[str, Any]:
        """As fields of `SiteGates`."""
        reached = self.tokens_E > 0
        routed = int(self.tokens_E.sum())
        dead_EF = (self.closed_EF == self.tokens_E[:, None]) & reached[:, None]
        return {
            "tokens": routed,
            "experts": tuple(self.tokens_E.tolist()),
            "closed": self.closed_EF.sum().item() / (routed * self.place.site.width),
            "dead": int(dead_EF.sum()),
            "histogram": (self.histogram_B.double() / self.histogram_B.sum()).float(),
        }


class _Products(TorchFunctionMode):
    def __init__(self, passes: Mapping[int, ExpertsPass]) -> None:
        super().__init__()
        self._passes = passes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], torch.Tensor):
            found = self._passes.get(args[1].untyped_storage().data_ptr())
            if found is not None:
                _hear(found, args[1], output.detach())
        return output


def _hear(found: ExpertsPass, weight: torch.Tensor, output: torch.Tensor) -> None:
    if weight.dim() != 2:  # all experts at once, on all tokens: which of them counts is decided later
        return
    expert = weight.storage_offset() // weight.numel()
    rows = output.reshape(-1, output.shape[-1])
    if found.place.site.layout in ("packed", "interleaved"):
        rows = rows.index_select(1, found.place.outputs()[0].to(rows.device))
    if len(rows):
        found.add(expert, rows)


@contextmanager
def hearing_experts(model: nn.Module, places: Sequence[Place]) -> Iterator[dict[str, ExpertsPass]]:
    """Inside, experts run one after the other ("eager", as their class says it) and are heard."""
    passes: dict[str, ExpertsPass] = {}
    by_storage: dict[int, ExpertsPass] = {}
    for place in places:
        weight = model.get_parameter(place.site.gate)
        if weight.dim() == 3:
            passes[place.site.up] = by_storage[weight.untyped_storage().data_ptr()] = ExpertsPass(place, len(weight))
    if not passes:
        yield passes
        return
    with _one_by_one(model), _Products(by_storage):
        yield passes


@contextmanager
def _one_by_one(model: nn.Module) -> Iterator[None]:
    """Since transformers 5 a config says by which kernel experts run; some take all of them at once."""
    key = "_experts_implementation_internal"
    held = {id(config): config for module in model.modules() if (config := module.__dict__.get("config")) is not None}
    configs = [vars(config) for config in held.values() if key in vars(config)]
    before = [config[key] for config in configs]
    try:
        for config in configs:
            config[key] = "eager"
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config[key] = value
