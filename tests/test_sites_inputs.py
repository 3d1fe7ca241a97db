"""Blocks that no synthetic arguments fit: what the inputs of the whole model show of them, and what stays undecided."""

from __future__ import annotations

import torch
import torch.nn.functional as fn
from torch import nn

from hf_geglu.sites import find_sites

D, F, SMALL = 12, 20, 4


class Streams(nn.Module):
    """Two streams of different widths with an FFN block each, in one module (LiLT); the second stream's comes in pairs,
    which nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.fig, self.date = nn.Linear(D, F), nn.Linear(F, D)
        self.lime, self.kiwi = nn.Linear(SMALL, F), nn.Linear(F, SMALL)

    def forward(self, text, places):
        text = text + self.date(fn.gelu(self.fig(text)))
        first, second = places
        return text, self.kiwi(fn.silu(self.lime(first + second)))


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, words, places, times=2):
        assert times == 3
        return self.block(words, (places, places.flip(0)))


INPUTS = {"words": torch.randn(2, 5, D), "places": torch.randn(2, 5, SMALL).half(), "times": 3}


def test_what_a_block_holds_beside_its_site_is_not_forgotten():
    found = find_sites(Model(Streams()))
    assert [site.up for site in found] == ["block.fig"]
    (left,) = found.rejected
    assert left.path == "block"
    assert left.reason.startswith("could not be run alone")


def test_inputs_of_the_model_show_the_second_stream():
    model = Model(Streams())
    state = torch.get_rng_state()
    found = find_sites(model, inputs=INPUTS)
    assert [(site.up, site.activation) for site in found] == [("block.fig", "gelu"), ("block.lime", "silu")]
    assert not found.rejected
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_that_the_model_does_not_take_change_nothing():
    without = find_sites(Model(Streams()))
    assert find_sites(Model(Streams()), inputs={"nonsense": 1}) == without


class Table(nn.Module):
    """Attention whose bias is looked up by a table of the right size."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x, table):
        scores = self.q(x) @ self.k(x).transpose(-1, -2) + table["bias"][: x.shape[1]]
        return scores.softmax(-1) @ self.v(x)


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Table()

    def forward(self, x):
        return self.block(x, {"bias": x.new_zeros(1, x.shape[1])})


def test_attention_that_runs_with_the_inputs_is_decided():
    alone = find_sites(WithTable())
    assert [entry.path for entry in alone.rejected] == ["block"]
    assert alone.rejected[0].reason.startswith("could not be run alone")
    assert not find_sites(WithTable(), inputs={"x": torch.randn(1, 3, D)}).rejected


class Cross(nn.Module):
    """Keys and values of another width than the queries, and a mask that is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(D, D), nn.Linear(F, D), nn.Linear(F, D), nn.Linear(D, D)

    def forward(self, query, memory, mask):
        scores = self.q(query) @ self.k(memory).transpose(-1, -2) + mask.sum()
        return self.o(scores.softmax(-1) @ self.v(memory)) + query


class Smooth(nn.Module):
    """A residual unit around an anti-aliasing filter that belongs to no module, as long as no signal is."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(600, 600, 7, padding=3)
        self.back = nn.Conv1d(600, 600, 1)
        self.register_buffer("filter", torch.ones(1, 1, 12))

    def forward(self, x):
        padded = fn.pad(x, (20, 20), mode="reflect")
        smooth = fn.conv1d(padded, self.filter.expand(600, -1, -1), groups=600)
        return x + self.back(fn.silu(self.wide(smooth[..., 15:-14])))


def test_arguments_are_made_in_the_width_that_is_read():
    assert not find_sites(nn.Sequential(Cross(), nn.ReLU())).rejected


def test_a_filter_is_no_projection():
    (entry,) = find_sites(nn.Sequential(Smooth(), nn.ReLU())).rejected
    assert "a convolution wider than 1 is one of its projections" in entry.reason


class Normalised(nn.Module):
    """A perceptron with a norm of its own statistics behind each projection (LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, F), nn.BatchNorm1d(F), nn.Linear(F, D)

    def forward(self, x):
        return self.down(fn.hardswish(self.norm(self.up(x).flatten(0, 1)).view(*x.shape[:2], F)))


def test_the_reason_names_what_stands_before_the_activation():
    (entry,) = find_sites(nn.Sequential(Normalised(), nn.ReLU())).rejected
    assert "norm is the first that changes what up says" in entry.reason


class Queries(Streams):
    """The second stream is used where there is a length only, which is 0 unless it is given (InstructBLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.lime, self.kiwi = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, text, query_count=0):
        queries, text = text[:, :query_count], text[:, query_count:]
        text = text + self.date(fn.gelu(self.fig(text)))
        return torch.cat([self.kiwi(fn.silu(self.lime(queries))) if query_count else queries, text], dim=1)


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Queries()

    def forward(self, text):
        return self.block(text, query_count=2)


def test_a_stream_that_was_not_called_is_said_or_found():
    (left,) = find_sites(Asking()).rejected
    assert "some of its projections were not called" in left.reason
    found = find_sites(Asking(), inputs={"text": torch.randn(2, 5, D)})
    assert [site.up for site in found] == ["block.fig", "block.lime"]
    assert not found.rejected


class Convolutional(nn.Module):
    """Cannot be run, and need not be: whatever its projections are used for, they are no FFN block."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back, self.head = nn.Conv2d(D, F, 3), nn.Conv2d(F, D, 1), nn.Linear(D, 7)

    def forward(self, x, maps):
        return self.head(self.back(self.wide(maps["one"])))


def test_what_can_be_no_block_is_decided_without_a_run():
    (entry,) = find_sites(nn.Sequential(Convolutional(), nn.ReLU())).rejected
    assert "no two of its projections lead back" in entry.reason
