"""Classes nobody has seen: odd names, odd layouts, and near misses that must not be taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as fn
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_geglu.sites import find_sites

D, F = 12, 20


class Two(nn.Module):
    """Base of the dense ones: `apple` goes up, `pear` comes down."""

    def __init__(self, d_in: int = D, width: int = F, d_out: int = D) -> None:
        super().__init__()
        self.apple = nn.Linear(d_in, width)
        self.pear = nn.Linear(width, d_out)


class Three(Two):
    """Base of the gated ones: `plum` is the second branch."""

    def __init__(self) -> None:
        super().__init__()
        self.plum = nn.Linear(D, F)


class Packed(Two):
    """Base of the packed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.apple = nn.Linear(D, 2 * F, bias=False)


class Dense(Two):
    def __init__(self) -> None:
        super().__init__()
        self.squash = nn.GELU()
        self.drop = nn.Dropout(0.5)

    def forward(self, banana):
        return self.pear(self.drop(self.squash(self.apple(banana))))


class FunctionInAttribute(Two):
    def __init__(self) -> None:
        super().__init__()
        self.squash = fn.silu

    def forward(self, x):
        return x + self.pear(self.squash(self.apple(x)).float().to(x.dtype))


class Functional(Two):
    def forward(self, x):
        return self.pear(fn.gelu(self.apple(x), approximate="tanh"))


class InPlace(Two):
    def forward(self, x):
        return self.pear(self.apple(x).relu_())


class PythonGelu(Two):
    def forward(self, x):
        h = self.apple(x)
        return self.pear(h * 0.5 * (1 + torch.erf(h / 2**0.5)))


class InFloat32(Two):
    def forward(self, x):
        return self.pear(fn.gelu(self.apple(x).float()).to(x.dtype))


class Conv1DBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Conv1D(F, D), Conv1D(D, F)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


class Weightwise(Two):
    def forward(self, x):
        return fn.linear(fn.relu(fn.linear(x, self.apple.weight)), self.pear.weight)


class Gated(Three):
    def forward(self, x):
        return self.pear(self.apple(x) * fn.gelu(self.plum(x)))


class GatedOffset(Three):
    def forward(self, x):
        return self.pear((self.apple(x) + 1) * fn.silu(self.plum(x)))


class GateFirst(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.squash = nn.SiLU()

    def forward(self, x):
        a, b = self.apple(x).chunk(2, dim=-1)
        return self.pear(self.squash(a) * b)


class GateLast(GateFirst):
    def forward(self, x):
        a, b = self.apple(x).chunk(2, dim=-1)
        return self.pear(a * self.squash(b))


class Interleaved(GateFirst):
    def forward(self, x):
        h = self.apple(x)
        return self.pear((h[..., ::2] + 1) * self.squash(h[..., 1::2]))


class Glu(Packed):
    def forward(self, x):
        return self.pear(fn.glu(self.apple(x)))


class Normed(Two):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(F)

    def forward(self, x):
        return self.pear(self.norm(fn.gelu(self.apple(x))))


class Scaled(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(F))

    def forward(self, x):
        return self.pear(fn.gelu(self.apple(x)) * self.scale)


class Shifted(Two):
    def forward(self, x):
        return self.pear(fn.gelu(self.apple(x)) + 0.001)


class NormedGate(Three):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(F)

    def forward(self, x):
        return self.pear(self.norm(self.apple(x) * fn.silu(self.plum(x))))


class Squared(Two):
    def forward(self, x):
        return self.pear(torch.square(torch.relu(self.apple(x))))


class Twice(Two):
    def forward(self, x):
        x = fn.relu(x)
        return self.pear(fn.relu(self.apple(x)))


class OneForTwo(Two):
    def __init__(self) -> None:
        super().__init__()
        self.squash = nn.SiLU()

    def forward(self, x):
        return self.squash(self.pear(self.squash(self.apple(x))))


class NeedsAResidual(Two):
    def forward(self, hidden, residual, *, eps):
        return residual + self.pear(fn.relu(self.apple(hidden)))


def names(layout: str, activation: str, path: str | None = None, half: str | None = None, offset: float = 0.0):
    return layout, activation, path, half, offset


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Dense, names("dense", "gelu", "squash")),
        (FunctionInAttribute, names("dense", "silu", "squash")),
        (Functional, names("dense", "gelu_pytorch_tanh", "fn.gelu(_, approximate='tanh')")),
        (InPlace, names("dense", "relu", "_.relu_()")),
        (Squared, names("dense", "relu2", "torch.square(torch.relu(_))")),
        (Twice, names("dense", "relu", "fn.relu(_) #1")),
        (OneForTwo, names("dense", "silu", "self.squash(_) #1")),
        (PythonGelu, names("dense", "gelu", "_ * 0.5 * (1 + torch.erf(_ / 2 ** 0.5))")),
        (InFloat32, names("dense", "gelu", "fn.gelu(_)")),
        (Conv1DBlock, names("dense", "relu", "torch.relu(_)")),
        (Weightwise, names("dense", "relu", "fn.relu(_)")),
        (Gated, names("separate", "gelu", "fn.gelu(_)")),
        (GatedOffset, names("separate", "silu", "fn.silu(_)", offset=1.0)),
        (GateFirst, names("packed", "silu", "squash", "first")),
        (GateLast, names("packed", "silu", "squash", "last")),
        (Interleaved, names("interleaved", "silu", "squash", "last", 1.0)),
        (Glu, names("packed", "sigmoid", None, "last")),
        (NeedsAResidual, names("dense", "relu", "fn.relu(_)")),
        (Normed, names("dense", "gelu", "fn.gelu(_)")),
        (Scaled, names("dense", "gelu", "fn.gelu(_)")),
        (Shifted, names("dense", "gelu", "fn.gelu(_)")),
        (NormedGate, names("separate", "silu", "fn.silu(_)")),
    ],
)
def test_taken(block: type[nn.Module], expected: tuple[object, ...]) -> None:
    (site,) = find_sites(nn.Sequential(nn.LayerNorm(D), block())).sites
    where = site.activation_call or site.activation_path
    path = expected[2] if site.activation_call or expected[2] is None else f"1.{expected[2]}"
    assert (site.layout, site.activation, where, site.gate_half, site.value_offset) == (
        *expected[:2],
        path,
        *expected[3:],
    )
    assert (site.block, site.kind, site.width, site.d_in, site.d_out) == ("1", "module", F, D, D)
    if site.layout == "separate":
        assert (site.gate, site.up, site.down) == ("1.plum", "1.apple", "1.pear")


class BothActivated(Three):
    def forward(self, x):
        return self.pear(fn.gelu(self.apple(x)) * fn.gelu(self.plum(x)))


class Added(Three):
    def forward(self, x):
        return self.pear(fn.gelu(self.apple(x)) + self.plum(x))


class TwoInputs(Three):
    def forward(self, x):
        return self.pear(fn.gelu(self.apple(x)) * self.plum(x.flip(-1)))


class TwoArguments(Three):
    def forward(self, x, y):
        return self.pear(fn.gelu(self.apple(x)) * self.plum(y))


class OneProjectionTwice(Two):
    def forward(self, x):
        return self.pear(fn.gelu(self.apple(x)) * self.apple(x))


class NormedBefore(Two):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(F)

    def forward(self, x):
        return self.pear(fn.gelu(self.norm(self.apple(x))))


class Escaping(Two):
    def forward(self, x):
        h = self.apple(x)
        return self.pear(fn.gelu(h) + h)


class NearlyGelu(Two):
    def forward(self, x):
        h = self.apple(x)
        return self.pear(h * torch.sigmoid(1.7 * h))


class GatesAnArgument(Two):
    def forward(self, x, per_layer_input):
        return self.pear(fn.gelu(self.apple(x)) * per_layer_input.repeat(1, 1, 2)[..., :F])


class Unknown(Two):
    def forward(self, x):
        return self.pear(torch.sin(self.apple(x)))


class Linear(Two):
    def forward(self, x):
        return self.pear(self.apple(x))


class Saturating(Two):
    def forward(self, x):
        return self.pear(torch.tanh(self.apple(x)))


class Bottleneck(Two):
    def __init__(self) -> None:
        super().__init__(D, D // 2, D)

    def forward(self, x):
        return x + self.pear(fn.gelu(self.apple(x)))


class Head(Two):
    def __init__(self) -> None:
        super().__init__(D, D, 3)

    def forward(self, x):
        return self.pear(fn.gelu(self.apple(x)))


class Perceptron(Two):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(F, F)

    def forward(self, x):
        return self.pear(fn.relu(self.middle(fn.relu(self.apple(x)))))


class TokenMixing(Two):
    def forward(self, x):
        return self.pear(fn.gelu(self.apple(x)).cumsum(dim=-2))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(D, D // 4, 1), nn.Conv2d(D // 4, D, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.excite(fn.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class WideConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(D, F, 3, padding=1), nn.Conv1d(F, D, 3, padding=1)

    def forward(self, x):
        return self.two(fn.gelu(self.one(x)))


class Unlinked(Two):
    def forward(self, x):
        return self.apple(x).sum() + self.pear(x.new_zeros(4, F)).sum()


class Raises(Two):
    def forward(self, x):
        raise KeyError("no such luck")


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (BothActivated, "best fit is separate"),
        (Added, "best fit is"),
        (TwoInputs, "read different inputs"),
        (TwoArguments, "read different inputs"),
        (OneProjectionTwice, "run twice, once for the gate and once for the value"),
        (NormedBefore, "neurons are mixed"),
        (Escaping, "best fit is"),
        (Unknown, "best fit is"),
        (GatesAnArgument, "best fit is"),
        (NearlyGelu, "best fit is dense quick_gelu"),
        (Linear, "low-rank pair"),
        (Saturating, "tanh"),
        (Bottleneck, "bottleneck (12 -> 6 -> 12)"),
        (Head, "d_in != d_out"),
        (Perceptron, "chain of more than two projections"),
        (TokenMixing, "not position by position"),
        (SqueezeExcite, "bottleneck (12 -> 3 -> 12)"),
        (WideConvolutions, "convolution wider than 1"),
        (Unlinked, "nothing that one of its projections says reaches another"),
        (Raises, "KeyError: 'no such luck'"),
    ],
)
def test_refused(block: type[nn.Module], words: str) -> None:
    found = find_sites(nn.ModuleDict({"it": block()}))
    assert found.sites == ()
    (rejection,) = found.rejected
    assert (rejection.path, rejection.class_name) == ("it", block.__name__)
    assert words in rejection.reason


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x, rotation):
        q, k, v = self.q(x) * rotation[0], self.k(x) * rotation[1], self.v(x)
        return self.o(torch.softmax(q @ k.mT, -1) @ v), None, None


class Layer(nn.Module):
    """An inline block behind an attention that cannot be run alone and answers with three things."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Attention()
        self.up, self.down, self.squash = nn.Linear(D, F), nn.Linear(F, D), nn.GELU(approximate="tanh")

    def forward(self, x, rotation):
        mixed, _, _ = self.mix(x, rotation)
        x = x + mixed
        return x + self.down(self.squash(self.up(x)))


def test_an_inline_block_behind_an_attention_that_cannot_be_run() -> None:
    (site,) = find_sites(nn.ModuleList([Layer()])).sites
    assert (site.block, site.kind, site.activation) == ("0", "inline", "gelu_pytorch_tanh")
    assert (site.up, site.down, site.activation_path) == ("0.up", "0.down", "0.squash")


def test_an_attention_is_not_an_ffn() -> None:
    assert find_sites(nn.ModuleList([Attention()])).sites == ()


def test_a_shared_block_appears_once_under_its_first_path() -> None:
    shared = Dense()
    (site,) = find_sites(nn.ModuleList([shared, nn.Sequential(shared), shared])).sites
    assert site.block == "0"


def test_the_model_may_be_the_block_itself() -> None:
    (site,) = find_sites(Dense()).sites
    assert (site.block, site.up, site.down, site.activation_path) == ("", "apple", "pear", "squash")


def test_a_sequential_is_a_block() -> None:
    (site,) = find_sites(nn.Sequential(nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)))).sites
    assert (site.up, site.down, site.activation_path) == ("0.0", "0.2", "0.1")


class SharedActivation(Dense):
    def forward(self, x):
        return self.pear(self.squash(self.apple(self.squash(x))))


class FixedView(Dense):
    def forward(self, x):
        return self.pear(self.squash(self.apple(x).view(*x.shape[:-1], F)))


def test_an_activation_that_a_conversion_could_not_exchange_has_no_path() -> None:
    (site,) = find_sites(FixedView()).sites
    assert site.activation == "gelu"
    assert site.activation_path is None


def test_of_an_activation_that_serves_twice_the_call_is_exchanged() -> None:
    (site,) = find_sites(SharedActivation()).sites
    assert (site.activation, site.activation_call) == ("gelu", "self.squash(_)")


def test_nothing_to_find() -> None:
    assert len(find_sites(nn.Linear(3, 4))) == 0
    assert len(find_sites(nn.Sequential(nn.Linear(3, 4)))) == 0
    assert list(find_sites(nn.ReLU())) == []
