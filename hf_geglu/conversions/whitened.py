"""A gated block to be trained in coordinates in which its inputs are even, and the fit of one block to given outputs.

Adam moves every weight by about the learning rate, but a weight on a strong direction of the input moves the output
more than one on a weak direction. So the block learns ``P`` with ``W = P C^-1/4``, C the covariance of what the matrix
is given, scaled so that P is of ordinary size; for the down projection outputs are counted in units of their own spread
too. C^-1/2 would make all directions equal, and noise as loud as signal; the root in between did best.

Legend of suffixes: D model width, F neurons, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from hf_geglu.conversions.replacement import NewWeights

Activation = Callable[[torch.Tensor], torch.Tensor]

FLOOR = 1e-5
"""Directions weaker than this, relative to the strongest, count as this strong."""


def whitening(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, S^-1) with ``S = C^-1/4``, scaled so that ``S x`` has variance 1 on average. Both like C, in float32."""
    values, vectors = torch.linalg.eigh(covariance.double())
    roots = values.clamp_min(float(values.max()) * FLOOR).pow(0.25)
    size = roots.square().mean().sqrt()
    return ((vectors / roots) @ vectors.T / size).float(), ((vectors * roots) @ vectors.T * size).float()


class WhitenedBlock(nn.Module):
    """The parameters of one block in even coordinates; `weights` gives the block they stand for, with gradients."""

    input_root: torch.Tensor
    hidden_root: torch.Tensor

    def __init__(
        self,
        start: NewWeights,
        *,
        input_covariance_DD: torch.Tensor,
        hidden_covariance_FF: torch.Tensor,
        output_scale: float,
        learn_value: bool = True,
    ) -> None:
        """Start at `start`.

        Args:
            start: the block.
            input_covariance_DD: of what gate and value read.
            hidden_covariance_FF: of what the down projection reads.
            output_scale: the unit in which outputs are counted.
            learn_value: train the value branch; else it stays as it is, which is the control that says what the gate
                has done and what training alone would have.
        """
        super().__init__()
        input_root, input_back = whitening(input_covariance_DD)
        hidden_root, hidden_back = whitening(hidden_covariance_FF)
        self.register_buffer("input_root", input_root)
        self.register_buffer("hidden_root", hidden_root)
        self.scale = output_scale
        self.gate = nn.Parameter(start.gate.float() @ input_back)
        self.up = nn.Parameter(start.up.float() @ input_back, requires_grad=learn_value)
        self.down = nn.Parameter(start.down.float() @ hidden_back / output_scale)
        self.gate_bias = _parameter(start.gate_bias)
        self.up_bias = _parameter(start.up_bias, learn=learn_value)
        self.down_bias = _parameter(None if start.down_bias is None else start.down_bias.float() / output_scale)

    def weights(self) -> NewWeights:
        """The block in ordinary coordinates."""
        return NewWeights(
            gate=self.gate @ self.input_root,
            up=self.up @ self.input_root,
            down=self.scale * (self.down @ self.hidden_root),
            gate_bias=self.gate_bias,
            up_bias=self.up_bias,
            down_bias=None if self.down_bias is None else self.scale * self.down_bias,
        )

    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def _parameter(value: torch.Tensor | None, *, learn: bool = True) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.float().clone(), requires_grad=learn)


def hidden(block: NewWeights, x_TD: torch.Tensor, activation: Activation, offset: float = 0.0) -> torch.Tensor:
    """What the down projection of a gated block reads, (T, F)."""
    value = linear(x_TD, block.up, block.up_bias)
    return activation(linear(x_TD, block.gate, block.gate_bias)) * (value + offset if offset else value)


def output(block: NewWeights, x_TD: torch.Tensor, activation: Activation, offset: float = 0.0) -> torch.Tensor:
    """What a gated block gives, (T, D)."""
    return linear(hidden(block, x_TD, activation, offset), block.down, block.down_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """Of the fit of one block.

    Attributes:
        steps: of Adam.
        batch: tokens a step.
        learning_rate: at its highest, after `warmup` steps; then down to zero along a cosine.
        warmup: steps.
        seed: of the order of tokens.
        dtype: of the products; the parameters are float32 in any case.
    """

    steps: int = 500
    batch: int = 2048
    learning_rate: float = 2e-3
    warmup: int = 20
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return schedule(step, self.steps, self.warmup, self.learning_rate)


def schedule(step: int, steps: int, warmup: int, highest: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    return highest * min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit(
    block: WhitenedBlock,
    x_TD: torch.Tensor,
    target_TD: torch.Tensor,
    weights_T: torch.Tensor,
    activation: Activation,
    *,
    settings: FitSettings,
    metric_DD: torch.Tensor | None = None,
    offset: float = 0.0,
) -> None:
    """Train `block`, in place, to give `target_TD` for `x_TD`: Adam on ``sum_t w_t e_t^T M e_t``.

    Args:
        block: where to start.
        x_TD: what gate and value read.
        target_TD: what the block is to give.
        weights_T: of each token in the error.
        activation: the gate's.
        settings: steps, batch, learning rate.
        metric_DD: M; the identity by default.
        offset: that the block adds to its value branch.
    """
    root = None if metric_DD is None else _root(metric_DD).to(settings.dtype)
    spread = ((target_TD - target_TD.mean(0)).square_().sum(-1) * weights_T).mean()
    optimizer = torch.optim.Adam(block.trained(), lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(x_TD), generator=generator)
    at = 0
    for step in range(settings.steps):
        if at and at + settings.batch > len(order):
            order, at = torch.randperm(len(x_TD), generator=generator), 0
        chosen = order[at : at + settings.batch]
        at += settings.batch
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        with torch.enable_grad():
            with torch.autocast("cpu", settings.dtype, enabled=settings.dtype != torch.float32):
                given = output(block.weights(), x_TD[chosen].to(settings.dtype), activation, offset)
            error = given.float() - target_TD[chosen]
            if root is not None:
                error = (error.to(settings.dtype) @ root).float()
            loss = (error.square().sum(-1) * weights_T[chosen]).mean() / spread
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _root(metric_DD: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(metric_DD.double())
    root: torch.Tensor = (vectors * values.clamp_min(0).sqrt()).float()
    return root
