"""How a neuron's pre-activation is distributed, weighted by what an error there costs the model.

A fit of ``act(z)`` needs nothing else, and a histogram of it does not grow with the data.

Legend of suffixes: T tokens, F intermediate size, D hidden size, K bins, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from hf_geglu.calibration.seen import Seen
from hf_geglu.calibration.unit import unit_now
from hf_geglu.sites import Site

BINS = 192
REACH = 80.0
"""Bins are equally wide in asinh(z): fine around 0, where activations bend, coarse where they are straight. What lies
beyond +-REACH falls into the outermost bins, at its own mean."""

SPREAD = 0.5
"""Share of the cost that is spread over a token's gradient's directions instead of taken along it. One gradient a token
is a noisy sample of its Fisher information; the spread part is its mean over directions."""

DIRECT = 1e-2
"""How far the down projection's input may be from ``act(z) v`` (relative, 16-bit rounding included) to count as it."""


class WeightedHistogram:
    """The distribution of z for each neuron of a site, each token weighted by the square of v and of the sensitivity of
    the loss to the neuron.

    Args:
        site: whose.
        down_DF: weight of its down projection, (D, F), of stacked experts (E, D, F).
    """

    def __init__(self, site: Site, down_DF: torch.Tensor) -> None:
        self.site, self.down = site, down_DF
        experts = down_DF.shape[0] if down_DF.dim() == 3 else 1
        self.weight_EFK = torch.zeros(experts, site.width, BINS)
        self.first_EFK = torch.zeros(experts, site.width, BINS)
        self.direct = torch.ones(())
        """1 while the unit was seen to enter the down projection as it is, without a norm or scale in between."""
        self.tokens = torch.zeros((), dtype=torch.int64)

    def update(self, seen: Seen) -> None:
        """Take in one batch."""
        z_TF = seen.z_TF.float()
        v_TF = None if seen.v_TF is None else seen.v_TF.float()
        if seen.h_TF is not None and self.direct and not _close(unit_now(seen), seen.h_TF.float()):
            self.direct.zero_()
        cost_TF = self._sensitivity(seen, len(z_TF))
        if v_TF is not None:
            cost_TF = cost_TF * v_TF.square()
        if seen.weight_T1 is not None:
            cost_TF = cost_TF * seen.weight_T1.float().square()
        bins_TF = _bins(z_TF) + torch.arange(self.site.width, device=z_TF.device) * BINS
        expert = seen.expert or 0
        for sums, values in ((self.weight_EFK, cost_TF), (self.first_EFK, cost_TF * z_TF)):
            sums[expert].view(-1).scatter_add_(0, bins_TF.flatten().cpu(), values.flatten().cpu())
        self.tokens += len(z_TF)

    def _sensitivity(self, seen: Seen, tokens: int) -> torch.Tensor:
        """(T, F): square of how far the loss moves with the neuron's output."""
        down_DF = self.down[seen.expert or 0] if self.down.dim() == 3 else self.down
        down_DF = down_DF.to(seen.z_TF.device, torch.float32)
        if not self.direct:
            return torch.ones(tokens, self.site.width, device=seen.z_TF.device)
        norms_F = down_DF.square().sum(dim=0)
        if seen.grad_TD is None:
            return norms_F.expand(tokens, -1)
        grad_TD = seen.grad_TD.float()
        along_TF = (grad_TD @ down_DF).square()
        size_T1 = grad_TD.square().mean(dim=1, keepdim=True)
        return (1 - SPREAD) * along_TF + SPREAD * size_T1 * norms_F

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums."""
        return {"weight": self.weight_EFK, "first": self.first_EFK, "direct": self.direct, "tokens": self.tokens}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put them back."""
        self.weight_EFK, self.first_EFK = tensors["weight"].clone(), tensors["first"].clone()
        self.direct, self.tokens = tensors["direct"].clone(), tensors["tokens"].clone()

    def points(self, prior: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, positions), each (E F, K): where z lies within each bin, and what it weighs there, normalised.

        Other text reaches other values: a neuron of SmolLM2 that stayed below 1.4 on one corpus reached 3.0 on another,
        and its fit, which nothing held there, cost more than all other neurons together. So a prior is mixed in.

        Args:
            prior: its share: half of it the neuron's own distribution mirrored at 0, half that of all the site's
                neurons, mirrored too; a neuron that the data hardly reached is fitted like its neighbours.
        """
        weight, first = self.weight_EFK.flatten(0, 1).double(), self.first_EFK.flatten(0, 1).double()
        shares = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-300)
        average_K = shares.sum(dim=0) / shares.sum().clamp_min(1e-300)
        average_K = (average_K + average_K.flip(0)) / 2
        centres = torch.where(weight > 0, first / weight.clamp_min(1e-300), _middles())
        return shares + prior / 2 * (shares.flip(1) + average_K), centres


def _middles() -> torch.Tensor:
    reach = math.asinh(REACH)
    return torch.sinh(((torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS * 2.0 - 1.0) * reach)


def _bins(z: torch.Tensor) -> torch.Tensor:
    reach = math.asinh(REACH)
    return ((torch.asinh(z) / reach + 1.0) * (BINS / 2)).clamp(0, BINS - 1).long()


def _close(unit: torch.Tensor, hidden: torch.Tensor) -> bool:
    return bool((unit - hidden).norm() <= DIRECT * hidden.norm() + 1e-12)
