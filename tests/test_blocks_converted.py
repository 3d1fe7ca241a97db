"""Blocks of every kind, with names nobody has seen, converted in memory: exact where promised, put back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as fn
from torch import nn

import hf_geglu

D, F, E = 12, 24, 3


class Experts(nn.Module):
    """Every token goes to one of three experts, whose matrices lie in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = nn.Linear(D, E)
        self.squash = nn.SiLU()
        self.rise = nn.Parameter(torch.randn(E, 2 * F, D))
        self.fall = nn.Parameter(torch.randn(E, D, F))

    def forward(self, x):
        flat = x.reshape(-1, D)
        chosen = self.choice(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for expert in range(E):
            at = torch.where(chosen == expert)[0]
            out[at] = self.expert(flat[at], expert)
        return out.view_as(x)

    def expert(self, x, e):
        gate, value = fn.linear(x, self.rise[e]).chunk(2, dim=-1)
        return fn.linear(self.squash(gate) * value, self.fall[e])


class TransposedGateLast(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.Parameter(torch.randn(E, D, 2 * F))
        self.rise_bias = nn.Parameter(torch.randn(E, 2 * F))
        self.fall = nn.Parameter(torch.randn(E, F, D))

    def expert(self, x, e):
        value, gate = (x @ self.rise[e] + self.rise_bias[e]).chunk(2, dim=-1)
        return (value * self.squash(gate)) @ self.fall[e]


class InterleavedExperts(TransposedGateLast):
    def expert(self, x, e):
        both = x @ self.rise[e] + self.rise_bias[e]
        return (both[..., 1::2] * self.squash(both[..., ::2])) @ self.fall[e]


class SeparateExperts(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.Parameter(torch.randn(E, F, D))
        self.side = nn.Parameter(torch.randn(E, F, D))

    def expert(self, x, e):
        return fn.linear(fn.silu(fn.linear(x, self.rise[e])) * fn.linear(x, self.side[e]), self.fall[e])


class DenseExperts(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.Parameter(torch.randn(E, F, D))
        self.squash = nn.GELU()

    def expert(self, x, e):
        return fn.linear(self.squash(fn.linear(x, self.rise[e])), self.fall[e])


class DenseTransposedExperts(DenseExperts):
    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.Parameter(torch.randn(E, D, F))

    def expert(self, x, e):
        return fn.linear(fn.gelu(x @ self.rise[e], approximate="tanh"), self.fall[e])


class Pointwise(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(D, F, 1, groups=groups), nn.Conv2d(F, D, 1)
        self.squash = nn.GELU()

    def forward(self, x):
        image = x.transpose(1, 2).unflatten(2, (2, -1))
        return image + self.two(self.squash(self.one(image)))


class Grouped(Pointwise):
    def __init__(self) -> None:
        super().__init__(groups=4)


class Called(nn.Module):
    """No attribute holds the activation, and a norm comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(D, F, bias=False), nn.Linear(F, D), nn.LayerNorm(F)

    def forward(self, x):
        return x + self.two(self.norm(fn.gelu(self.one(x))))


class CalledGated(Called):
    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(D, F)

    def forward(self, x):
        return self.two(fn.silu(self.one(x)) * self.side(x))


class Clamped(CalledGated):
    """As in DeepSeek-V4: a scaling folded into the weights would move what is clamped."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 1.5

    def forward(self, x):
        gate, value = self.one(x).clamp(max=self.limit), self.side(x).clamp(-self.limit, self.limit)
        return self.two(fn.silu(gate) * value)


class ClampedExperts(InterleavedExperts):
    """As in gpt-oss: interleaved, clamped, value + 1, the activation written out."""

    def __init__(self) -> None:
        super().__init__()
        self.limit, self.alpha = 7.0, 1.702

    def expert(self, x, e):
        both = x @ self.rise[e] + self.rise_bias[e]
        gate, value = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
        return ((value + 1) * (gate * torch.sigmoid(gate * self.alpha))) @ self.fall[e]


EXACT = [DenseExperts, DenseTransposedExperts, Pointwise, Grouped, Called]
APPROXIMATE = [Experts, TransposedGateLast, InterleavedExperts, SeparateExperts, CalledGated, Clamped, ClampedExperts]


@pytest.mark.parametrize("kind", EXACT + APPROXIMATE)
def test_converted_and_reverted(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(D), kind()).double().eval()
    if hasattr(model[1], "fall"):
        with torch.no_grad():
            model[1].rise.mul_(0.3)
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    x = torch.randn(2, 6, D, dtype=torch.float64)
    expected = model(x)

    (site,) = hf_geglu.find_sites(model).sites
    report = hf_geglu.convert(model, inputs={"input": x})

    assert report.exact == (kind in EXACT)
    difference = (model(x) - expected).abs().max().item() / expected.abs().max().item()
    assert difference < (1e-14 if kind in EXACT else 0.05)
    assert report.response is not None
    assert report.response > 0
    (gradient,) = [value.gradient for value in report.values]
    assert gradient is not None
    assert gradient > 0
    assert not hf_geglu.find_sites(model).sites or hf_geglu.find_sites(model).sites[0].up == site.up

    hf_geglu.revert(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), expected)
