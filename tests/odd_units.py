"""Units that look like a GeGLU and are none, and units of the family in unusual clothes.

Each impostor is written next to the words that its explanation must hold. No class here is known to the package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as fn
from torch import nn

D, F = 12, 20


class Unit(nn.Module):
    """Two projections up; what is made of them comes down again."""

    width = F
    d_value = D

    def __init__(self) -> None:
        super().__init__()
        self.pear = nn.Linear(D, F)
        self.plum = nn.Linear(D, F)
        self.back = nn.Linear(self.width, D)

    def forward(self, x):
        return x + self.back(self.unit(self.pear(x), self.plum(x)))

    def unit(self, g, v):
        raise NotImplementedError


class BothActivated(Unit):
    def unit(self, g, v):
        return fn.gelu(g) * torch.tanh(v)


class BothGelu(Unit):
    def unit(self, g, v):
        return fn.gelu(g) * fn.gelu(v)


class WaveNet(Unit):
    def unit(self, g, v):
        return torch.sigmoid(g) * torch.tanh(v)


class ReluOnTheValue(Unit):
    def unit(self, g, v):
        return fn.gelu(g) * v.relu()


class SquaredValue(Unit):
    def unit(self, g, v):
        return fn.gelu(g) * v**2


class AbsoluteValue(Unit):
    def unit(self, g, v):
        return fn.gelu(g) * v.abs()


class Added(Unit):
    def unit(self, g, v):
        return fn.gelu(g) + v


class BothAdded(Unit):
    def unit(self, g, v):
        return fn.gelu(g) + torch.tanh(v)


class Subtracted(Unit):
    def unit(self, g, v):
        return v - fn.gelu(g)


class OnTheProduct(Unit):
    def unit(self, g, v):
        return fn.gelu(g * v)


class OnTheSum(Unit):
    def unit(self, g, v):
        return fn.gelu(g + v)


class OnTheDifference(Unit):
    def unit(self, g, v):
        return fn.gelu(g - v)


class SquareOfTheUnit(Unit):
    def unit(self, g, v):
        return (fn.gelu(g) * v) ** 2


class Maxout(Unit):
    def unit(self, g, v):
        return torch.maximum(g, v)


class Divided(Unit):
    def unit(self, g, v):
        return fn.gelu(g) / (1 + v.abs())


class GateAddedBack(Unit):
    def unit(self, g, v):
        return fn.gelu(g) * v + g


class ValueAddedBack(Unit):
    def unit(self, g, v):
        return fn.gelu(g) * v + v


class ActivatedGateAddedTwice(Unit):
    def unit(self, g, v):
        return fn.gelu(g) * v + torch.tanh(g)


class GateNormed(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(F)

    def unit(self, g, v):
        return fn.gelu(self.norm(g)) * v


class ValueNormed(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.rms = nn.RMSNorm(F)

    def unit(self, g, v):
        return fn.gelu(g) * self.rms(v)


class NormByHand(Unit):
    def unit(self, g, v):
        return fn.gelu(g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-6)) * v


class SoftmaxGate(Unit):
    def unit(self, g, v):
        return torch.softmax(g, dim=-1) * v


class CumulativeGate(Unit):
    def unit(self, g, v):
        return fn.gelu(g.cumsum(-1)) * v


class GateOverPositions(Unit):
    def unit(self, g, v):
        return fn.gelu(g.mean(-2, keepdim=True)) * v


class ShiftedTokens(Unit):
    def unit(self, g, v):
        return fn.gelu(g.roll(1, dims=-2)) * v


class NeighboursValue(Unit):
    def unit(self, g, v):
        return fn.gelu(g) * v.roll(1, dims=-1)


class Reversed(Unit):
    def unit(self, g, v):
        return fn.gelu(g) * v.flip(-1)


class OtherInput(Unit):
    def forward(self, x):
        return self.back(fn.gelu(self.pear(x)) * self.plum(x.flip(-1)))


class ActivatedInput(Unit):
    def forward(self, x):
        return self.back(fn.gelu(self.pear(x)) * self.plum(fn.gelu(x)))


class TwoArguments(Unit):
    def forward(self, x, y):
        return self.back(fn.gelu(self.pear(x)) * self.plum(y))


class SameTwice(Unit):
    def forward(self, x):
        return self.back(fn.gelu(self.pear(x)) * self.pear(x))


class OneGateForAll(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.pear = nn.Linear(D, 1)

    def unit(self, g, v):
        return fn.gelu(g) * v


class GateByHeads(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.pear = nn.Linear(D, 5)

    def unit(self, g, v):
        return fn.gelu(g).repeat_interleave(4, dim=-1) * v


class TheInputIsTheValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pear, self.back = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.back(fn.gelu(self.pear(x)) * x)


class ResidualInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pear, self.plum, self.back = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.back(fn.gelu(self.pear(x)) * self.plum(x) + x)


class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pear, self.plum = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        gate = torch.sigmoid(self.pear(x))
        return gate * fn.relu(self.plum(x)) + (1 - gate) * x


class ThreeBranches(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.fig = nn.Linear(D, F)

    def forward(self, x):
        return self.back(fn.gelu(self.pear(x)) * self.plum(x) * self.fig(x))


class PartlyUngated(Unit):
    def unit(self, g, v):
        return (fn.gelu(g) + 0.1) * v


class NoNameGate(Unit):
    def unit(self, g, v):
        return g / (1 + g.exp2()) * v * torch.cos(g) ** 2


class Linear(Unit):
    def unit(self, g, v):
        return g + 2 * v


class ProductAndSum(Unit):
    def unit(self, g, v):
        return g * v + 0.5 * g + v


class LearnedSlopes(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.rand(F))

    def unit(self, g, v):
        return fn.gelu(self.slope * g) * v


class Noisy(Unit):
    def unit(self, g, v):
        return fn.gelu(g + torch.randn(g.shape)) * v


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pear, self.plum, self.back = nn.Linear(D, F), nn.Linear(F, F), nn.Linear(F, D)

    def forward(self, x):
        return self.back(fn.gelu(self.plum(fn.gelu(self.pear(x)))))


IMPOSTORS = {
    BothActivated: "both branches are activated (gelu(pear) * tanh(plum))",
    BothGelu: "both branches are activated (gelu(pear) * gelu(plum))",
    WaveNet: "both branches are activated (sigmoid(pear) * tanh(plum))",
    ReluOnTheValue: "both branches are activated (gelu(pear) * relu(plum))",
    SquaredValue: "both branches are activated (gelu(pear) * square(plum))",
    AbsoluteValue: "both branches are activated (gelu(pear) * abs(plum))",
    Added: "added, not multiplied",
    BothAdded: "added, not multiplied",
    Subtracted: "added, not multiplied",
    OnTheProduct: "the activation is on the product",
    OnTheSum: "the activation is on the sum",
    OnTheDifference: "the activation is on the difference",
    SquareOfTheUnit: "both branches are activated (square of gelu(pear) * square(plum))",
    Maxout: "whichever is larger",
    Divided: "both branches are activated",
    GateAddedBack: "pear is added to the product: a residual inside the unit",
    ValueAddedBack: "1 is added to the activated gate",
    ActivatedGateAddedTwice: "tanh(pear) is added to the product",
    GateNormed: "pear goes through LayerNorm (norm)",
    ValueNormed: "plum goes through RMSNorm (rms)",
    NormByHand: "pear goes through mean over neurons (a norm)",
    SoftmaxGate: "pear goes through softmax over neurons",
    CumulativeGate: "pear goes through cumsum over neurons",
    GateOverPositions: "positions are mixed",
    ShiftedTokens: "positions are mixed",
    NeighboursValue: "gate and value of different neurons",
    Reversed: "gate and value of different neurons",
    OtherInput: "made of different inputs (pear and plum",
    ActivatedInput: "made of different inputs (pear and plum",
    TwoArguments: "made of different inputs (pear and plum",
    SameTwice: "pear is called twice",
    OneGateForAll: "20 neurons share one number of pear",
    GateByHeads: "4 neurons share one number of pear",
    TheInputIsTheValue: "one branch is the input itself",
    ResidualInside: "the input is added inside the unit",
    Highway: "three branches meet",
    ThreeBranches: "a third branch",
    PartlyUngated: "0.1 is added to the activated gate",
    NoNameGate: "a function without a name",
    Linear: "a sum of both branches",
    ProductAndSum: "no product of two linear branches",
    LearnedSlopes: "each neuron computes a function of its own",
    Noisy: "answers differently when it is asked the same twice",
    Chain: "a chain of more than two projections",
}
"""Class -> words of its explanation."""


class ProjectionOnly(nn.Module):
    """As in diffusers: one projection for both, the value comes first, and nothing comes down."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D, 2 * F)

    def forward(self, hidden_states):
        hidden_states, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return hidden_states * fn.gelu(gate)


class SplitLater(nn.Module):
    """As in x-transformers: a module for the activation, and an optional learned scale."""

    def __init__(self, activation: nn.Module, *, scaled: bool = False) -> None:
        super().__init__()
        self.act, self.proj = activation, nn.Linear(D, 2 * F)
        self.mult_bias = nn.Parameter(torch.ones(F)) if scaled else 1.0

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * self.act(gate) * self.mult_bias


class GluMlp(nn.Module):
    """As in timm: the gate is the second half unless `gate_last` is off."""

    def __init__(self, *, gate_last: bool = True, activation: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, 2 * F), activation(), nn.Linear(F, D)
        self.gate_last = gate_last

    def forward(self, x):
        first, last = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(first * self.act(last) if self.gate_last else self.act(first) * last)


class Scaled(Unit):
    def unit(self, g, v):
        return fn.gelu(1.25 * g) * v


class Swish(Unit):
    def unit(self, g, v):
        return g * torch.sigmoid(1.702 * g) * v


class OtherSwish(Unit):
    def unit(self, g, v):
        return g * torch.sigmoid(2.5 * g) * v


class Folded(Unit):
    def unit(self, g, v):
        return 1.702 * fn.gelu(g / 1.702) * v


class ClampedAndShifted(Unit):
    """As in gpt-oss, but with separate projections."""

    def unit(self, g, v):
        g, v = g.clamp(max=7.0), v.clamp(-7.0, 7.0)
        return (v + 1) * g * torch.sigmoid(1.702 * g)


class ShiftedGate(Unit):
    def unit(self, g, v):
        return fn.gelu(g + 0.5) * v


class Mish(Unit):
    def unit(self, g, v):
        return v * fn.mish(g)


class TanhGate(Unit):
    def unit(self, g, v):
        return torch.tanh(g) * v


class NormAfter(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(F)

    def unit(self, g, v):
        return self.norm(fn.gelu(g) * v)


class LearnedScale(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(F))

    def unit(self, g, v):
        return fn.gelu(g) * v * self.scale


class Groups(nn.Module):
    """Gate and value alternate in groups of five columns."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.back = nn.Linear(D, 2 * F, bias=False), nn.Linear(F, D)

    def forward(self, x):
        h = self.both(x).unflatten(-1, (F // 5, 2, 5))
        return self.back((fn.gelu(h[..., 0, :], approximate="tanh") * h[..., 1, :]).flatten(-2))


class Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.back = nn.Linear(D, 2 * F), nn.Linear(F, D)

    def forward(self, x):
        h = self.both(x)
        return self.back(h[..., ::2] * fn.silu(h[..., 1::2]))


class Head(nn.Module):
    """The finder leaves this one alone (its widths are those of a head); it is a unit all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.apple, self.plum, self.back = nn.Linear(D, F), nn.Linear(D, F), nn.Linear(F, 3)

    def forward(self, x):
        return self.back(self.plum(x) * fn.gelu(self.apple(x)))


class RoundsToBfloat16(Unit):
    def unit(self, g, v):
        return fn.gelu(g.bfloat16(), approximate="tanh") * v.bfloat16()

    def forward(self, x):
        return self.back(self.unit(self.pear(x), self.plum(x)).to(x.dtype))


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.back = nn.Conv2d(D, 2 * F, 1), nn.Conv2d(F, D, 1)

    def forward(self, x):
        value, gate = self.both(x).chunk(2, dim=1)
        return self.back(value * fn.gelu(gate))


class Layer(nn.Module):
    """An attention, a norm, and a gated block whose projections belong to the layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.MultiheadAttention(D, 2, batch_first=True), nn.LayerNorm(D)
        self.one, self.two, self.three = nn.Linear(D, F), nn.Linear(D, F, bias=False), nn.Linear(F, D)

    def forward(self, x):
        x = x + self.mix(x, x, x)[0]
        y = self.norm(x)
        return x + self.three(fn.gelu(self.one(y)) * self.two(y))
