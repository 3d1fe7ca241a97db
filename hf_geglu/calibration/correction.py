"""A correction of the down projection, of low rank: what the fitted lines of a block leave over, as far as the block's
new hidden values tell it.

Neurons that are off by a little each add up: on SmolLM2 half of what the per-neuron fits cost is such a sum. Ridge
regression of it on the hidden values finds the part that is linear in them. What keeps it true on other text is the
penalty, which counts each neuron's column in that neuron's own size, and the rank.

Legend of suffixes: T tokens, F intermediate size, D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from transformers.activations import ACT2FN

from hf_geglu.calibration.seen import Seen
from hf_geglu.calibration.unit import unit_fitted, unit_now
from hf_geglu.conversions import Coefficients
from hf_geglu.plan import SitePlan

TOKENS = 6144
"""That a correction was tuned on: the used part of 8,192."""
RANK, MOST = 16, 64
"""For so many tokens, and at most. On SmolLM2 the ranks 4, 8, 16, 32 and 576 (all) left .908, .894, .885, .885 and .916
of the estimated cost on a domain not calibrated on. More text bears a higher one."""
RIDGE, FLOOR = 0.5, 0.03
"""For so many tokens: penalty on the square of a column, in units of its neuron's mean square plus `FLOOR` times the
mean over neurons. There .3, .5 and 1 left .771, .762 and .774 (five layers); a penalty that is the same for all neurons
.82 at best. More text needs less of it."""
EVEN = 0.1
"""Of the metric of outputs, the share that counts all directions alike."""
MEMORY = 1 << 30
"""Bytes that the sums of the sites of one pass may take; a model with more is passed more than once."""


class Metric:
    """Second moment of the gradients at a site's output: what an error there costs, by direction."""

    def __init__(self, width: int) -> None:
        self.sum_DD = torch.zeros(width, width)

    def update(self, seen: Seen) -> None:
        """Take in one batch."""
        if seen.grad_TD is not None:
            grad_TD = seen.grad_TD.float()
            self.sum_DD += (grad_TD.T @ grad_TD).cpu()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums."""
        return {"metric": self.sum_DD}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put them back."""
        self.sum_DD = tensors["metric"].clone()


class Correction:
    """The sums that the correction of one site is solved from.

    Args:
        entry: the site.
        line: of its neurons, as fitted.
        down_DF: weight of its down projection.
    """

    def __init__(self, entry: SitePlan, line: Coefficients, down_DF: torch.Tensor) -> None:
        self.line, self.gate, self.down = line, ACT2FN[entry.scaling.gate], down_DF
        self.square_FF = torch.zeros(entry.site.width, entry.site.width)
        self.product_FD = torch.zeros(entry.site.width, entry.site.d_out)
        self.tokens = torch.zeros((), dtype=torch.int64)

    def update(self, seen: Seen) -> None:
        """Take in one batch."""
        unit_TF = unit_fitted(seen, self.line, self.gate)
        left_TD = (unit_now(seen) - unit_TF) @ self.down.to(unit_TF).T
        if self.line.output is not None:
            left_TD = left_TD - self.line.output.to(left_TD)
        self.square_FF += (unit_TF.T @ unit_TF).cpu()
        self.product_FD += (unit_TF.T @ left_TD).cpu()
        self.tokens += len(unit_TF)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums."""
        return {"square": self.square_FF, "product": self.product_FD, "tokens": self.tokens}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put them back."""
        self.square_FF, self.product_FD = tensors["square"].clone(), tensors["product"].clone()
        self.tokens = tensors["tokens"].clone()

    def solved(self, metric_DD: torch.Tensor) -> Coefficients | None:
        """The line with the correction; None where no token came by, or one that overflowed.

        Minimises |left over - h B|^2 + |diag(penalty)^1/2 B|^2, then keeps the directions in which B does most, inputs
        measured in the same sum and outputs in the metric. How many, and how large the penalty is, depends on how many
        tokens there were, see `strength`.

        Args:
            metric_DD: what errors of the output cost, in any unit.
        """
        sizes_F = self.square_FF.diagonal()
        mean = float(sizes_F.mean())
        if not 0.0 < mean < float("inf") or not bool(torch.isfinite(self.product_FD).all()):
            return None
        rank, ridge = strength(int(self.tokens))
        root_FF = torch.linalg.cholesky(self.square_FF + torch.diag(ridge * (sizes_F + FLOOR * mean)))
        whitened_FD = torch.linalg.solve_triangular(root_FF, self.product_FD, upper=False)
        size = float(metric_DD.diagonal().mean())
        even_DD = torch.eye(len(metric_DD))
        cost_DD = torch.linalg.cholesky(metric_DD / size + EVEN * even_DD) if size > 0.0 else even_DD
        seen_FD = whitened_FD @ cost_DD
        directions_DR = torch.linalg.eigh(seen_FD.T @ seen_FD).eigenvectors[:, -rank:]
        right_FR = torch.linalg.solve_triangular(root_FF.T, seen_FD @ directions_DR, upper=True)
        left_DR = torch.linalg.solve_triangular(cost_DD.T, directions_DR, upper=True)
        return replace(self.line, left=left_DR.contiguous(), right=right_FR.T.contiguous())


def strength(tokens: int) -> tuple[int, float]:
    """(rank, penalty): `RANK` and `RIDGE` up to `TOKENS`; beyond, the rank grows with the tokens, up to `MOST`, and the
    penalty falls with their square root."""
    times = max(1.0, tokens / TOKENS)
    return max(RANK, min(MOST, int(RANK * times))), RIDGE / times**0.5


def groups(entries: Sequence[SitePlan]) -> Iterator[list[SitePlan]]:
    """Sites whose sums fit into `MEMORY` together; one that does not fit is a group of its own."""
    group: list[SitePlan] = []
    held = 0
    for entry in entries:
        size = 4 * entry.site.width * (entry.site.width + entry.site.d_out)
        if group and held + size > MEMORY:
            yield group
            group, held = [], 0
        group.append(entry)
        held += size
    if group:
        yield group
