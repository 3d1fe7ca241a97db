"""The page says what the rows say: totals that can be counted by hand, and no shortfall without its reason."""

import json

import pytest

from benchmarks.sweep.rendering import headline, render
from benchmarks.sweep.row import Row
from benchmarks.sweep.verdict import compact, problems, reloads, settle

SITE = {
    "up": "layers.0.fc1",
    "block_class": "MLP",
    "kind": "module",
    "layout": "dense",
    "activation": "gelu",
    "swappable": True,
}
SAME = {"difference": 0.0, "weights": [], "missing": [], "unexpected": [], "mismatched": []}


def row(name, **values):
    complete = {
        "model_class": "BertModel",
        "device": "cpu",
        "sites": [SITE],
        "tier": "portable",
        "exact": True,
        "converted": 1,
        "max_abs": 0.0,
        "max_rel": 0.0,
        "dtype": "float64",
        "values": 1,
        "values_reached": 1,
        "values_alive": 1,
        "loss": [1.0, 0.9],
        "reverted": True,
        "reads": [{"what": "all", "way": "plugin", **SAME}],
        "seconds": {"all": 1.0},
    }
    return Row(type=name, **{**complete, **values}).to_dict()


def test_a_complete_type_has_no_problem():
    assert problems(row("bert")) == []
    assert reloads(row("bert"))


FALLS_SHORT = {
    "not built: needs a package": {"not_built": "needs a package"},
    "crashed in convert: ended by signal SIGSEGV": {
        "crash": "ended by signal SIGSEGV",
        "seconds": {"build": 0.1, "convert": -1.0},
    },
    "finding: ValueError: no": {"find_error": "ValueError: no"},
    "undecided: mlp (Odd): could not be run alone on synthetic input: shape": {
        "rejected": [["mlp", "Odd", "could not be run alone on synthetic input: shape"]]
    },
    "refused: mlp.up: in forward": {"refused": [["mlp.up", "in forward"]]},
    "convert: VerificationError: off": {"convert_error": "VerificationError: off"},
    "planned to be exact, but differs by 0.5 in float64": {"max_abs": 0.5, "max_rel": 0.1},
    "1 value branches without gradient": {"values_alive": 0},
    "revert did not give back the original": {"reverted": False},
    "reload (all, remote): difference 1e-06": {"reads": [{"what": "all", "way": "remote", **SAME, "difference": 1e-6}]},
    "reload (all, plugin): OSError: gone (the original does not survive it either)": {
        "reads": [
            {"what": "all", "way": "plugin", "error": "OSError: gone"},
            {"what": "original", "way": "plain", "error": "OSError: gone"},
        ]
    },
    "the whole model was not run: ValueError: bbox": {"not_run": "ValueError: bbox"},
}


@pytest.mark.parametrize("expected", FALLS_SHORT)
def test_each_shortfall_is_said(expected):
    assert problems(row("odd", **FALLS_SHORT[expected])) == [expected]


def test_a_rejection_with_a_decision_is_no_shortfall():
    decided = [["pooler", "BertPooler", "one projection (dense) followed by tanh: a pooler or a head"]]
    assert problems(row("bert", rejected=decided)) == []


def test_totals():
    rows = [row(name) for name in ("a", "b", "c")]
    rows += [row("odd", **values) for values in FALLS_SHORT.values()]
    record = {"seconds": 600, "processes": 2, "rows": rows, "transformers": "5.0"}
    text = "\n".join(headline(record))
    assert "model types built, of those that transformers has: 14 of 15 (93.3 %)" in text
    assert "the whole sweep: 10.0 min (target: < 20 min)" in text
    # one differs, and one whose original does not survive either is not counted
    assert "reloaded in a fresh process with difference 0.0: 12 of 13 (92.3 %) types, 12 of 13 (92.3 %) loads" in text


def is_undecided(row):
    return any(text.startswith("undecided") for text in problems(row))


def test_what_another_model_shows_is_settled():
    attention = ["attention", "Attention", "could not be run alone on synthetic input: x"]
    alone = row("part", rejected=[attention], not_run="ValueError: bbox")
    whole = row("whole", rejected=[attention], second_opinion=True, looked_into=["Attention"])
    elsewhere = row("whole", second_opinion=True, looked_into=["Attention"])
    beside = row("whole", rejected=[attention], second_opinion=True, looked_into=["MLP"])
    assert is_undecided(alone)
    assert is_undecided(beside)  # the model ran, but not through that module
    assert not is_undecided(whole)
    assert not is_undecided(settle([alone, elsewhere])[0])
    assert is_undecided(settle([alone, beside])[0])
    said = {"block_class": "Attention", "opinion": "graph only", "down": "w", "finder": "nothing", "graph": "a -> w"}
    doubted = row("whole", second_opinion=True, looked_into=["Attention"], disagreements=[said])
    assert is_undecided(settle([alone, doubted])[0])


def test_a_compact_row_says_the_same():
    rejected = [["pooler", "P", "a head"], ["attention", "A", "could not be run alone on synthetic input: x"]]
    full = row("bert", sites=[SITE, {**SITE, "up": "layers.1.fc1"}], rejected=rejected)
    small = compact(full)
    assert compact(small) == small
    assert small["rejections"] == 2
    assert problems(small) == problems(full)
    pages = [render({"seconds": 60, "processes": 2, "rows": [each]}) for each in (full, small)]
    assert pages[0] == pages[1]
    assert "| 2 dense gelu |" in pages[0]


def test_page():
    rows = [
        row("bert"),
        row("odd|name", refused=[["layers.0.mlp.up", "in forward"], ["layers.1.mlp.up", "in forward"]]),
        row("none", sites=[], tier="", exact=None, converted=0, reads=[], max_abs=None, loss=[]),
    ]
    page = render({"seconds": 60, "processes": 2, "rows": json.loads(json.dumps(rows))})
    assert "| bert | BertModel | 1 dense gelu | portable | exact | 0 | 1/1 | ok | 1.0 |" in page
    assert "| none | BertModel | none |" in page
    assert "| module | dense | an attribute | 2 | 2 |" in page
    # two layers, one shortfall
    assert "- **1** odd|name: refused: layers.N.mlp.up: in forward" in page
