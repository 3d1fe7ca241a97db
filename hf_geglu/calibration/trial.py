"""What a conversion would cost a block on data that it was not fitted to, measured before anything is converted.

Legend of suffixes: T tokens, F intermediate size, D hidden size, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers.activations import ACT2FN

from hf_geglu.calibration.seen import Seen
from hf_geglu.calibration.unit import unit_fitted, unit_now
from hf_geglu.conversions import Coefficients
from hf_geglu.sites import Site


class Trial:
    """Errors of several lines at one site, in what the block adds to the model.

    Args:
        site: whose.
        gate: the activation of the wanted gate, by its name in ACT2FN.
        candidates: the lines to try, by name.
        down_DF: weight of its down projection, of stacked experts (E, D, F); None where the unit does not enter it as
            it is: then the unit itself is compared.
    """

    def __init__(
        self, site: Site, gate: str, candidates: Mapping[str, Coefficients], down_DF: torch.Tensor | None
    ) -> None:
        self.site, self.gate, self.candidates, self.down = site, ACT2FN[gate], dict(candidates), down_DF
        self.square_C = torch.zeros(len(candidates), dtype=torch.float64)
        """Sum over tokens of the squared error of the block's output."""
        self.cost_C = torch.zeros(len(candidates), dtype=torch.float64)
        """Half the sum of (gradient . error)^2: nats of KL divergence to second order, for logits."""
        self.size = torch.zeros((), dtype=torch.float64)
        self.tokens = torch.zeros((), dtype=torch.int64)

    def update(self, seen: Seen) -> None:
        """Take in one batch."""
        before = self._answer(unit_now(seen), seen)
        self.size += before.square().sum().double().cpu()
        for number, line in enumerate(self.candidates.values()):
            after = self._answer(unit_fitted(seen, line, self.gate), seen, line)
            error_TD = after - before
            self.square_C[number] += error_TD.square().sum().double().cpu()
            if seen.grad_TD is not None and error_TD.shape == seen.grad_TD.shape:
                along_T = (error_TD * seen.grad_TD.float()).sum(dim=1)
                self.cost_C[number] += 0.5 * along_T.square().sum().double().cpu()
        self.tokens += len(seen.z_TF)

    def _answer(self, unit_TF: torch.Tensor, seen: Seen, line: Coefficients | None = None) -> torch.Tensor:
        """What the block makes of its unit, without the bias that it had before."""
        if self.down is None:
            return unit_TF
        down = self.down if self.down.dim() == 2 else self.down[seen.expert or 0]
        out = unit_TF @ down.to(unit_TF).T
        if line is not None and line.left is not None and line.right is not None:
            out = out + unit_TF @ line.right.to(unit_TF).T @ line.left.to(unit_TF).T
        if line is not None and line.output is not None:
            out = out + line.output.to(out)
        return out if seen.weight_T1 is None else out * seen.weight_T1.float()

    def errors(self) -> dict[str, float]:
        """Root of the mean squared error of the block's output relative to that of the output, by candidate."""
        size = self.size.clamp_min(1e-300)
        return {
            name: float((square / size).sqrt()) for name, square in zip(self.candidates, self.square_C, strict=True)
        }

    def costs(self) -> dict[str, float]:
        """Nats a token that a candidate is estimated to cost, by name; zeros without gradients."""
        tokens = max(int(self.tokens), 1)
        return {name: float(cost) / tokens for name, cost in zip(self.candidates, self.cost_C, strict=True)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums."""
        return {"square": self.square_C, "cost": self.cost_C, "size": self.size, "tokens": self.tokens}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put them back."""
        self.square_C, self.cost_C = tensors["square"].clone(), tensors["cost"].clone()
        self.size, self.tokens = tensors["size"].clone(), tensors["tokens"].clone()


def best(figures: Mapping[str, float], order: Sequence[str]) -> str:
    """The name with the smallest figure; the first in `order` of those that are equal."""
    return min(order, key=lambda name: figures[name])
