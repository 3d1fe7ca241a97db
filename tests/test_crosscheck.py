"""The second opinion: what the autograd graph of invented modules shows, and that every difference has its reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.opinions.comparing import compare
from benchmarks.opinions.graph import read_graph
from benchmarks.opinions.resolutions import read_resolutions, unresolved

D, WIDE = 8, 24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.packed = nn.Linear(D, WIDE), nn.Linear(D, WIDE), nn.Linear(D, 2 * WIDE)
        self.down, self.square, self.narrow = nn.Linear(WIDE, D), nn.Linear(WIDE, WIDE), nn.Linear(D, D // 2)
        self.back, self.depthwise = nn.Linear(D // 2, D), nn.Conv1d(WIDE, WIDE, 3, padding=1, groups=WIDE)
        self.norm, self.inner = nn.LayerNorm(D), nn.LayerNorm(WIDE)
        self.up_stack, self.down_stack = nn.Parameter(torch.randn(3, D, WIDE)), nn.Parameter(torch.randn(3, WIDE, D))


def dense(m, x):
    return m.down(F.gelu(m.a(x)))


def by_formula(m, x):
    z = m.a(x)
    return m.down(0.5 * z * (1 + torch.tanh(0.8 * (z + 0.04 * z**3))))


def gated(m, x):
    return m.down(F.silu(m.a(x)) * m.b(x))


def packed(m, x):
    gate, value = m.packed(x).chunk(2, dim=-1)
    return m.down(gate.sigmoid() * value)


def with_norms(m, x):
    return x + m.down(m.inner(F.relu(m.a(m.norm(x)))))


def experts(m, x):
    return torch.bmm(F.gelu(torch.bmm(x.expand(3, -1, -1), m.up_stack)), m.down_stack)


def no_activation(m, x):
    return m.down(m.a(x))


def saturating_alone(m, x):
    return m.down(torch.tanh(m.a(x)))


def other_inputs(m, x):
    return m.down(F.silu(m.a(x)) * m.b(m.norm(x)))


def convolution_between(m, x):
    return m.down(F.silu(m.depthwise(F.glu(m.packed(x), dim=-1).transpose(1, 2)).transpose(1, 2)))


def bottleneck(m, x):
    return m.back(F.relu(m.narrow(x)))


def another_width(m, x):
    return m.square(F.relu(m.a(x)))


def attention(m, x):
    return m.down(torch.softmax(m.a(x) @ m.b(x).transpose(1, 2), dim=-1) @ F.relu(m.a(x)))


def chain_of_three(m, x):
    return m.down(F.relu(m.square(F.relu(m.a(x)))))


def pooled_in_between(m, x):
    return m.down(F.max_pool1d(F.relu(m.a(x)).transpose(1, 2), 2).transpose(1, 2))


BLOCKS = {dense: {"a"}, by_formula: {"a"}, gated: {"a", "b"}, packed: {"packed"}, with_norms: {"a"}}
NO_BLOCKS = [
    no_activation,
    saturating_alone,
    other_inputs,
    convolution_between,
    bottleneck,
    another_width,
    attention,
    chain_of_three,
    pooled_in_between,
]


def blocks(function):
    torch.manual_seed(0)
    module = Block()
    return read_graph(module, {"out": function(module, torch.randn(1, 5, D, requires_grad=True))}).blocks


@pytest.mark.parametrize("function", BLOCKS, ids=lambda function: function.__name__)
def test_what_is_a_block(function):
    (block,) = blocks(function)
    assert block.down == "down.weight"
    assert block.ups == {f"{name}.weight" for name in BLOCKS[function]}


def test_stacked_experts():
    (block,) = blocks(experts)
    assert (block.ups, block.down) == ({"up_stack"}, "down_stack")


@pytest.mark.parametrize("function", NO_BLOCKS, ids=lambda function: function.__name__)
def test_what_is_none(function):
    assert not blocks(function)


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2", "modernbert", "whisper"])
def test_both_agree(model_type):
    comparison = compare(model_type)
    assert comparison.agreed >= 2
    assert not comparison.disagreements
    assert not comparison.skipped


def test_decisions_are_complete():
    decisions = read_resolutions()
    assert all(len(one.why) > 40 for one in decisions.values())  # a reason, not a word


def test_what_is_not_decided_is_said():
    seen, decided = [("A", "graph only"), ("B", "graph only")], [("B", "graph only"), ("C", "finder only")]
    assert unresolved(seen, decided) == ([("A", "graph only")], [("C", "finder only")])


@pytest.mark.parametrize(
    "text", ["- class: A", "- {class: A, opinion: odd, right: finder, why: because}", "- 3"], ids=["short", "odd", "3"]
)
def test_broken_decisions(tmp_path, text):
    path = tmp_path / "resolutions.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"resolutions\.yaml"):
        read_resolutions(path)
