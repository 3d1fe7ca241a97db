"""Statistics of neurons in bounded memory: what is kept does not grow with the number of tokens.

Legend of suffixes: N tokens of one call, F neurons, B bins of the histogram, R columns of the random sketch.
"""

from __future__ import annotations

import torch

BINS = 96
_SCALE, _STEPS = 0.25, 9.0
"""Bin k of the gate's input z holds ``asinh(z / 0.25)`` in [k - 48, k - 47) / 9: 0.03 wide near zero, 11 % of |z| far
from it, up to |z| = 25.8; beyond is the last bin."""

SKETCH = 128
"""Columns of the random projection (Johnson and Lindenstrauss): a correlation r is seen with a standard error of
``(1 - r^2) / sqrt(128)``, 0.009 at 0.95."""


def edges(unit: float = 1.0) -> torch.Tensor:
    """The (BINS + 1,) borders of the bins, in units of z."""
    at = (torch.arange(BINS + 1, dtype=torch.float64) - BINS / 2) / _STEPS
    return torch.sinh(at) * _SCALE * unit


def bins_of(z_NF: torch.Tensor, unit: float) -> torch.Tensor:
    """The bin of each input of a gate, (N, F)."""
    return (torch.asinh(z_NF.float() / (_SCALE * unit)) * _STEPS + BINS / 2).floor().long().clamp_(0, BINS - 1)


class Moments:
    """Mean and variance of (N, F) numbers that come in parts, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum_F: torch.Tensor | None = None
        self._square_F: torch.Tensor | None = None
        self._shift_F: torch.Tensor | None = None

    def add(self, values_NF: torch.Tensor) -> None:
        """One part."""
        wide_NF = values_NF.double()
        if self._shift_F is None:  # around the first mean nothing cancels
            self._shift_F = wide_NF.mean(0)
            self._sum_F, self._square_F = torch.zeros_like(self._shift_F), torch.zeros_like(self._shift_F)
        assert self._sum_F is not None
        assert self._square_F is not None
        away_NF = wide_NF - self._shift_F
        self.count += len(wide_NF)
        self._sum_F += away_NF.sum(0)
        self._square_F += away_NF.square().sum(0)

    @property
    def mean_F(self) -> torch.Tensor:
        """Of all that came."""
        assert self._shift_F is not None
        assert self._sum_F is not None
        return self._shift_F + self._sum_F / self.count

    @property
    def variance_F(self) -> torch.Tensor:
        """Of all that came (divided by the count)."""
        assert self._sum_F is not None
        assert self._square_F is not None
        return (self._square_F / self.count - (self._sum_F / self.count).square()).clamp_min(0.0)


class Histogram:
    """How often the input of each gate was where; (F, BINS) counts."""

    def __init__(self, width: int, unit: float) -> None:
        self.unit = unit
        self.counts_FB = torch.zeros(width, BINS, dtype=torch.int32)

    def add(self, z_NF: torch.Tensor) -> None:
        """One part."""
        where = bins_of(z_NF, self.unit) + torch.arange(z_NF.shape[1], device=z_NF.device) * BINS
        counts = torch.bincount(where.flatten(), minlength=self.counts_FB.numel())
        self.counts_FB += counts.view_as(self.counts_FB).int().cpu()

    def quantile_F(self, share: float) -> torch.Tensor:
        """The input below which that share of each neuron's lie, to the width of a bin."""
        cumulated_FB = self.counts_FB.long().cumsum(1)
        total_F = cumulated_FB[:, -1:]
        at_F = (cumulated_FB < share * total_F).sum(1).clamp_max(BINS - 1)
        borders = edges(self.unit)
        return (borders[at_F] + borders[at_F + 1]) / 2


class Correlations:
    """Random projections of what each neuron gives, from which near-equal ones are found without an F x F matrix."""

    def __init__(self, width: int, seed: int) -> None:
        self._seed, self._calls = seed, 0
        self._sketch_FR = torch.zeros(width, SKETCH, dtype=torch.float64)
        self._signs_R = torch.zeros(SKETCH, dtype=torch.float64)

    def add(self, hidden_NF: torch.Tensor) -> None:
        """One part. The signs depend on the seed and the number of the part only."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._calls)
        self._calls += 1
        signs_NR = torch.randint(0, 2, (len(hidden_NF), SKETCH), generator=generator).float() * 2 - 1
        self._sketch_FR += (hidden_NF.float().T @ signs_NR.to(hidden_NF.device)).double().cpu()
        self._signs_R += signs_NR.double().sum(0)

    def candidates(self, mean_F: torch.Tensor, least: float, most: int) -> torch.Tensor:
        """(P, 2) pairs whose sketched correlation is at least `least` in size, the `most` closest ones."""
        centred_FR = self._sketch_FR - mean_F.cpu()[:, None] * self._signs_R
        return near_pairs(centred_FR, least, most)


def near_pairs(rows_FR: torch.Tensor, least: float, most: int, block: int = 512) -> torch.Tensor:
    """(P, 2) pairs i < j of rows with ``|cos| >= least``, closest first, at most `most`; rows of zeros have none.
    Works block by block."""
    norm_F = rows_FR.norm(dim=1)
    unit_FR = torch.where(norm_F[:, None] > 0, rows_FR / norm_F.clamp_min(1e-300)[:, None], 0.0)
    pairs, sizes = [], []
    for start in range(0, len(unit_FR), block):
        cosine = (unit_FR[start : start + block] @ unit_FR.T).abs()
        rows, columns = (cosine >= least).nonzero(as_tuple=True)
        after = columns > rows + start
        rows, columns = rows[after], columns[after]
        pairs.append(torch.stack([rows + start, columns], dim=1))
        sizes.append(cosine[rows, columns])
        if sum(len(part) for part in pairs) > 4 * most:
            pairs, sizes = _closest(pairs, sizes, most)
    pairs, sizes = _closest(pairs, sizes, most)
    return pairs[0]


def _closest(
    pairs: list[torch.Tensor], sizes: list[torch.Tensor], most: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    size = torch.cat(sizes) if sizes else torch.zeros(0)
    order = size.argsort(descending=True, stable=True)[:most]
    pair = torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long)
    return [pair[order]], [size[order]]


def nearest_cosine(rows_FD: torch.Tensor, block: int = 512) -> torch.Tensor:
    """(F,) the largest ``|cos|`` of each row with another one. Works block by block."""
    unit_FD = rows_FD / rows_FD.norm(dim=1, keepdim=True).clamp_min(1e-30)
    nearest = []
    for start in range(0, len(unit_FD), block):
        cosine = (unit_FD[start : start + block] @ unit_FD.T).abs()
        own = torch.arange(len(cosine))
        cosine[own, own + start] = 0.0
        nearest.append(cosine.amax(1))
    return torch.cat(nearest)
