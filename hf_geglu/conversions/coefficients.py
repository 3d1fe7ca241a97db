"""The line that a conversion folds into the weights, number by number: ``act(z) = f(a z + b) (alpha z + beta) + d``.

A row of `scaling.SCALINGS` is the same line with one a, alpha and beta for all neurons, b = 0 and d = 0. Where they
were fitted to a model's activations, every neuron has its own; a plan holds no tensors, so they travel beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from hf_geglu.conversions.precision import Factor
from hf_geglu.conversions.scaling import Scaling

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coefficients:
    """One line a neuron. Each tensor is (F,), or (E, F) for stacked experts; numbers serve all neurons.

    A gated block takes ``f(a z + b) (beta v)``: its value branch is occupied, so alpha is 0 there and d has no place.
    """

    a: Factor = 1.0
    b: Factor = 0.0
    alpha: Factor = 0.0
    beta: Factor = 1.0
    left: torch.Tensor | None = None
    """(D, R), see `down`."""
    right: torch.Tensor | None = None
    """(R, F), see `down`."""
    output: torch.Tensor | None = None
    """(D,), added to the bias of the down projection: Wd d, and what a refit found."""

    @classmethod
    def of(cls, line: Scaling | Coefficients) -> Coefficients:
        """The same for a row of `SCALINGS`."""
        if isinstance(line, Coefficients):
            return line
        return cls(a=line.a, alpha=line.alpha, beta=line.beta)

    @property
    def down(self) -> torch.Tensor | None:
        """(D, F) float64, the product of `left` and `right`: added to the weight of the down projection.

        Summed in a fixed order, number by number, so that every machine that replays it gets the same bits; a matrix
        product sums in an order of its own.
        """
        if self.left is None or self.right is None:
            return None
        left_DR, right_RF = self.left.double(), self.right.double()
        total = left_DR[:, :1] * right_RF[:1]
        for rank in range(1, len(right_RF)):
            total += left_DR[:, rank : rank + 1] * right_RF[rank : rank + 1]
        return total

    def down_rows(self, start: int, stop: int) -> torch.Tensor:
        """``down[start:stop]``, the same bits, without making the rest."""
        assert self.left is not None
        return replace(self, left=self.left[start:stop]).down  # type: ignore[return-value]

    def down_columns(self, start: int, stop: int) -> torch.Tensor:
        """``down[:, start:stop]``, the same bits, without making the rest."""
        assert self.right is not None
        return replace(self, right=self.right[:, start:stop]).down  # type: ignore[return-value]

    def part(self, start: int, stop: int) -> Coefficients:
        """The line of neurons, or of stacked experts, `start` to `stop`."""

        def cut(factor: Factor) -> Factor:
            return factor[start:stop] if isinstance(factor, torch.Tensor) else factor

        return Coefficients(a=cut(self.a), b=cut(self.b), alpha=cut(self.alpha), beta=cut(self.beta))

    @property
    def even(self) -> bool:
        """Whether all neurons have the same line."""
        return not any(isinstance(factor, torch.Tensor) for factor in (self.a, self.b, self.alpha, self.beta))

    @property
    def width(self) -> int | None:
        """None: a block keeps its neurons."""
        return None

    @property
    def fits_gated(self) -> bool:
        """Whether it leaves the value branch's direction alone, as a block that is already gated needs."""
        return not isinstance(self.alpha, torch.Tensor) and self.alpha == 0.0

    @property
    def idle(self) -> bool:
        """Whether a gated block stays as it is."""
        return self.fits_gated and all(
            not isinstance(given, torch.Tensor) and given == usual
            for given, usual in ((self.a, 1.0), (self.b, 0.0), (self.beta, 1.0))
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is to be saved, numbers as tensors without dimensions."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float64).contiguous()
            for name, value in held.items()
            if value is not None
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Coefficients:
        """What `tensors` gave."""
        given: dict[str, Any] = {name: value if value.ndim else value.item() for name, value in tensors.items()}
        return cls(**given)

    def of_neurons(self, neurons_N: torch.Tensor, experts_N: torch.Tensor) -> Coefficients:
        """The line of those neurons, of those experts where they differ: tensors become (N,) float64."""

        def pick(factor: Factor) -> Factor:
            if not isinstance(factor, torch.Tensor):
                return factor
            found = factor.cpu().double()
            return found[experts_N, neurons_N] if found.ndim == 2 else found[neurons_N]

        return Coefficients(a=pick(self.a), b=pick(self.b), alpha=pick(self.alpha), beta=pick(self.beta))
