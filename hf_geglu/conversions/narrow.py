"""narrow: which neurons of a block stay when it becomes narrower, and what its down projection makes up for the others.

A block's output is ``Wd h + bd`` with h its F hidden values. Leaving neurons out and solving for Wd again is a least
squares problem in the moments of h; the optimal brain surgeon (Hassibi & Stork 1993; for whole neurons
arXiv:2302.04089, section 3.1) says which neuron's loss the others make up for best, and updates the solution in closed
form. Two neurons that say the same are merged by this: one goes, and its column is added to the other's.

Legend of suffixes: F neurons, D outputs, T tokens.
"""

from __future__ import annotations

import torch

from hf_geglu.conversions.replacement import NewWeights
from hf_geglu.errors import ConversionError

DAMPING = 1e-4
"""Added to the diagonal of the hidden values' covariance, relative to its mean, before it is inverted."""
RIDGE = 1e-3
"""The same where the down projection is solved for: 1e-3 and 1e-4 were alike, 1e-2 worse."""
STRIDE = 32
"""Neurons that go between two updates of everything."""
POOL = 2
"""From how many times as many candidates they are chosen, one by one."""


class Moments:
    """Weighted first and second moments of hidden values and of what they are to explain, streamed in chunks.

    Products are made in float32 and summed up in float64.
    """

    def __init__(self, width: int, d_out: int) -> None:
        self.weight = 0.0
        self._sum = torch.zeros(width + d_out, dtype=torch.float64)
        self._square = torch.zeros(width, width + d_out, dtype=torch.float64)
        self._width = width

    def update(self, hidden_TF: torch.Tensor, target_TD: torch.Tensor, weights_T: torch.Tensor) -> None:
        """Take in tokens, with the weight of each in the error."""
        both = torch.cat([hidden_TF, target_TD], dim=1).float()
        weights = weights_T.float()
        self._square += ((both[:, : self._width] * weights[:, None]).T @ both).double()
        self._sum += (weights @ both).double()
        self.weight += float(weights.sum())

    @property
    def mean_F(self) -> torch.Tensor:
        """Mean of the hidden values."""
        return self._sum[: self._width] / self.weight

    @property
    def mean_D(self) -> torch.Tensor:
        """Mean of the targets."""
        return self._sum[self._width :] / self.weight

    def second(self, *, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden x hidden (F, F), hidden x target (F, D)), about the means or about zero."""
        square = self._square / self.weight
        if centred:
            square = square - torch.outer(self.mean_F, self._sum / self.weight)
        return square[:, : self._width], square[:, self._width :]


def removal_order(
    covariance_FF: torch.Tensor,
    down_DF: torch.Tensor,
    *,
    smallest: int,
    metric_DD: torch.Tensor | None = None,
    stride: int = STRIDE,
) -> torch.Tensor:
    """In which order neurons are given up. One order serves every width down to `smallest`.

    The neurons that cost least go first: ``s_i = w_i^T M w_i / [A^-1]_ii``, A the damped covariance of the hidden
    values, w_i the neuron's column of the down projection, as updated by those that went before; M weighs errors of the
    output.

    Args:
        covariance_FF: of the hidden values, about their mean where the down projection has a bias that can take it.
        down_DF: the down projection.
        smallest: how many neurons are left at the end.
        metric_DD: what an error of the block's output costs, such as the second moment of the gradients there; the
            identity by default.
        stride: neurons that go between two updates of the whole solution.

    Returns:
        (F,) indices; the last `width` of them are the neurons to keep, see `kept`.

    Raises:
        ConversionError: `smallest` is not between 1 and F.
    """
    width = covariance_FF.shape[0]
    if not 1 <= smallest <= width:
        raise ConversionError(f"a block of {width} neurons cannot keep {smallest}; expected between 1 and {width}")
    covariance = covariance_FF.double()
    covariance = covariance + torch.eye(width, dtype=torch.float64) * DAMPING * covariance.diagonal().mean()
    inverse = torch.linalg.inv(covariance)
    columns = down_DF.double().T
    if metric_DD is not None:
        columns = columns @ _root(metric_DD)
    index = torch.arange(width)
    gone: list[torch.Tensor] = []
    while len(index) > smallest:
        out = _cheapest(columns, inverse, min(stride, len(index) - smallest))
        stays = torch.ones(len(index), dtype=torch.bool)
        stays[out] = False
        stay = stays.nonzero().flatten()
        gone.append(index[out])
        across = torch.linalg.solve(inverse[out][:, out], inverse[out][:, stay]).T
        columns = columns[stay] - across @ columns[out]
        inverse = inverse[stay][:, stay] - across @ inverse[out][:, stay]
        index = index[stay]
    return torch.cat([*gone, index])


def _cheapest(columns_FD: torch.Tensor, inverse_FF: torch.Tensor, count: int) -> torch.Tensor:
    """The next ones to go, in order: one by one, but among the `POOL` times `count` that look cheapest now.

    Of two neurons that say the same, both look cheap; once one is gone the other is dear.
    """
    saliency = columns_FD.square().sum(1) / inverse_FF.diagonal()
    pool = saliency.argsort()[: POOL * count]
    columns, inverse = columns_FD[pool].clone(), inverse_FF[pool][:, pool].clone()
    saliency, gone = saliency[pool], []
    for _ in range(count):
        worst = int(saliency.argmin())
        gone.append(worst)
        share = inverse[:, worst] / inverse[worst, worst]
        columns -= torch.outer(share, columns[worst])
        inverse -= torch.outer(share, inverse[worst])
        saliency = columns.square().sum(1) / inverse.diagonal().clamp_min(1e-300)
        saliency[gone] = torch.inf
    return pool[gone]


def _root(metric_DD: torch.Tensor) -> torch.Tensor:
    """R with R R^T = M, slightly damped: directions that no gradient was seen in are not free."""
    metric = metric_DD.double()
    metric = metric + torch.eye(len(metric), dtype=torch.float64) * 1e-3 * metric.diagonal().mean()
    values, vectors = torch.linalg.eigh(metric)
    root: torch.Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def kept(order_F: torch.Tensor, width: int) -> torch.Tensor:
    """The neurons that a block of that width keeps, in their old order."""
    return order_F[len(order_F) - width :].sort().values


def ridge(moments: Moments, *, bias: bool, damping: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The down projection (D, F) and its bias (D,) that explain the targets best. Without `bias` there is none."""
    square, cross = moments.second(centred=bias)
    square = square + torch.eye(len(square), dtype=torch.float64) * damping * square.diagonal().mean()
    solution = torch.linalg.solve(square, cross)
    offset = moments.mean_D - moments.mean_F @ solution if bias else None
    return solution.T.float().contiguous(), None if offset is None else offset.float()


def narrowed(block: NewWeights, neurons_N: torch.Tensor) -> NewWeights:
    """Those neurons of a gated block as they are; the down projection is to be solved for again."""
    return NewWeights(
        gate=block.gate[neurons_N].clone(),
        up=block.up[neurons_N].clone(),
        down=block.down[:, neurons_N].clone(),
        gate_bias=None if block.gate_bias is None else block.gate_bias[neurons_N].clone(),
        up_bias=None if block.up_bias is None else block.up_bias[neurons_N].clone(),
        down_bias=None if block.down_bias is None else block.down_bias.clone(),
    )
