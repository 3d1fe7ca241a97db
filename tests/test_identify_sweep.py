"""The sweep over transformers' classes: one type, the second opinion, and the page."""

import json
from pathlib import Path

import pytest
import torch.nn.functional as fn
from torch import nn
from transformers.activations import ACT2FN
from versions import BEFORE_5

from benchmarks.identification.job import identify_type
from benchmarks.identification.rendering import render
from benchmarks.identification.sources import misnamed_gate, opinion
from benchmarks.identification.tallies import contradictions, differs, explained, headline, merged, read_decisions
from benchmarks.records import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "identify.md"


def _keep(_):
    raise AssertionError("one row is enough")


def test_one_type():
    row = identify_type({"type": "bert"}, _keep)
    found = {one["class"]: one for one in row["classes"]}
    assert set(found) == {"BertIntermediate", "BertLayer"}  # the class with the name, and the one that holds the block
    assert found["BertIntermediate"]["named"]
    assert not found["BertLayer"]["named"]
    assert all(one["activation"] == "gelu" for one in found.values())
    assert [one["verdict"] for one in row["findings"]] == ["followed"]


def test_a_type_that_is_not_built():
    assert "no model type" in identify_type({"type": "nonsense"}, _keep)["skipped"]


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.act_fn = nn.Linear(4, 16), nn.Linear(8, 4), ACT2FN["silu"]

    def forward(self, x):
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(self.act_fn(value) * gate)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = fn.gelu(self.up(x), approximate="tanh")
        return self.down(h) * 0.5


def test_second_opinion_reads_names_only():
    assert (opinion(Gated()).activations, opinion(Gated()).gated) == (frozenset({"silu"}), True)
    assert (opinion(Dense()).activations, opinion(Dense()).gated) == (frozenset({"gelu_pytorch_tanh"}), False)
    assert misnamed_gate(Gated(), "first") == "value, gate = self.up(x).chunk(2, dim=-1)"
    assert misnamed_gate(Gated(), "last") is None


def _row(**changes):
    row = {
        "class": "Unit",
        "type": "one",
        "named": True,
        "known": True,
        "family": "geglu",
        "activation": "gelu",
        "formula": "gelu(gate) * value",
        "layout": "separate",
        "gate": "mlp.gate_proj",
        "gelu": "erf",
        "said": ["gelu"],
        "said_gated": True,
    }
    return {**row, **changes}


UNKNOWN = {"class": "Lost", "type": "one", "named": True, "known": False, "said": [], "said_gated": None}


def _record(*classes, findings=()):
    rows = [{"type": "one", "classes": list(classes), "findings": []}]
    return {
        "seconds": 1,
        "cpu_seconds": 1,
        "cpu_seconds_of_audit": 1,
        "processes": 2,
        "transformers": "5",
        "torch": "2",
        "types": [{"type": "two", "skipped": "not built: no such package"}],
        "classes": merged(rows),
        "findings": list(findings),
    }


def test_contradictions_must_be_decided():
    record = _record(_row(), _row(**{"class": "Liar", "said": ["silu"]}))
    assert not differs(_row())
    assert [one["class"] for one in contradictions(record, {})[0]] == ["Liar"]
    assert contradictions(record, {"Liar": {"right": "identify", "why": "it is"}}) == ([], [])
    assert contradictions(record, {"Liar": {}, "Gone": {}})[1] == ["Gone"]


def test_what_counts_as_explained():
    assert explained(_row())
    assert explained({**UNKNOWN, "reason": "positions are mixed"})
    assert not explained({**UNKNOWN, "reason": "it could not be run: KeyError"})
    record = _record(_row(), {**UNKNOWN, "reason": "it could not be run: KeyError"})
    assert "1 identified, 0 explained, 1 neither (50.0 %" in headline(record)[0]


def test_known_in_one_type_is_known():
    rows = [
        {"type": "a", "classes": [{**UNKNOWN, "class": "Unit", "reason": "no"}]},
        {"type": "b", "classes": [_row(type="b")]},
    ]
    (one,) = merged(rows)
    assert one["known"]
    assert one["types"] == ["b"]


def test_page():
    lie = {
        "type": "gpt_oss",
        "entry": "hidden_act",
        "stated": "silu",
        "verdict": "ignored",
        "computed": ["quick_gelu"],
        "tried": "gelu",
        "then": ["quick_gelu"],
        "blocks": 0,
        "setting": "",
    }
    page = render(_record(_row(misnamed="value, gate = x", gate_half="first"), findings=[lie]), {})
    assert (
        "| `hidden_act = silu` | ignored | the blocks compute quick_gelu; with `gelu` they compute quick_gelu" in page
    )
    assert "| Unit | `value, gate = x` | the first half: `gelu(gate) * value` |" in page
    assert "- two: not built: no such package" in page


@pytest.mark.skipif(BEFORE_5, reason="recorded with the newest transformers")
def test_the_page_is_the_record():
    record = json.loads((RESULTS / "identify.json").read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == render(record, read_decisions())
    assert contradictions(record, read_decisions()) == ([], [])
