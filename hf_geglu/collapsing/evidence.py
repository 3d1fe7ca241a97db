"""How far the inputs of a block are from their mean: by how much a value branch that is not quite constant can move.

Legend of suffixes: N inputs of a block (tokens), D their size, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_geglu.distance import cast
from hf_geglu.errors import SurgeryError
from hf_geglu.inputs import Inputs
from hf_geglu.modes import evaluating
from hf_geglu.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spread:
    """Of the inputs of one block."""

    mean_D: torch.Tensor
    """Float64."""
    radius: float
    """Largest Euclidean distance of an input from the mean."""
    deviation_F: torch.Tensor
    """Largest ``|Wv_n (x - mean)|`` of each neuron."""
    tokens: int


def spreads(
    model: nn.Module, sites: Mapping[str, tuple[Site, torch.Tensor]], batches: Sequence[Inputs]
) -> dict[str, Spread]:
    """Run the model twice over the batches: for the means, then for the distances from them. Changes nothing.

    Args:
        model: in any mode; it is run in evaluation mode, without gradients.
        sites: by the path of the up projection: its block, and the weights of its value branch (F, D), float64.
        batches: keyword arguments of a forward each.

    Returns:
        The spread of each site that the batches reach.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add(path: str, x_ND: torch.Tensor) -> None:
        total_D = x_ND.sum(0, dtype=torch.float64)
        sums[path] = sums[path] + total_D if path in sums else total_D
        counts[path] = counts.get(path, 0) + len(x_ND)

    _run(model, {path: site for path, (site, _) in sites.items()}, batches, add)
    means = {path: total / counts[path] for path, total in sums.items()}
    radius = dict.fromkeys(means, 0.0)
    deviation: dict[str, torch.Tensor] = {}

    def measure(path: str, x_ND: torch.Tensor) -> None:
        away_ND = x_ND.double() - means[path]
        radius[path] = max(radius[path], away_ND.norm(dim=1).max().item())
        moved_F = (away_ND @ sites[path][1].T).abs().amax(0)
        deviation[path] = torch.maximum(deviation[path], moved_F) if path in deviation else moved_F

    _run(model, {path: sites[path][0] for path in means}, batches, measure)
    return {
        path: Spread(mean_D=means[path], radius=radius[path], deviation_F=deviation[path], tokens=counts[path])
        for path in means
    }


def _run(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Sequence[Inputs],
    take: Callable[[str, torch.Tensor], None],
) -> None:
    with _hooked(model, sites, take), evaluating(model), torch.no_grad():
        for batch in batches:
            with torch.random.fork_rng(devices=[]):
                model(**cast(batch, model))


@contextmanager
def _hooked(model: nn.Module, sites: Mapping[str, Site], take: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    handles = []
    try:
        for path, site in sites.items():

            def hear(_: nn.Module, args: tuple[Any, ...], path: str = path, site: Site = site) -> None:
                if not args or not isinstance(args[0], torch.Tensor):
                    raise SurgeryError(
                        f"{path} is called without a tensor as its first argument, so its inputs are not seen"
                    )
                x = args[0].detach()
                take(path, (x.movedim(site.dim, -1) if site.dim != -1 else x).reshape(-1, site.d_in))

            handles.append(model.get_submodule(path).register_forward_pre_hook(hear))
        yield
    finally:
        for handle in handles:
            handle.remove()
