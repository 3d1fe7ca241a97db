"""One look at the original serves many narrow models; each is a row, beside controls that went through the same."""

import json

import pytest
import torch
from tiny_models import VOCAB, tiny

from benchmarks import narrow_runs, records
from benchmarks.narrow_runs import record, rows
from benchmarks.narrow_table import causal_section, section
from hf_geglu.conversions.whitened import FitSettings
from hf_geglu.narrowing.settings import HealSettings, NarrowSettings

SETTINGS = NarrowSettings(
    fit=FitSettings(steps=4, batch=32, dtype=torch.float32), heal=HealSettings(passes=1, low_precision=False)
)
INTERVAL = {"mean": 0.5, "half": 0.25}


def made(kind, **asked):
    generator = torch.Generator().manual_seed(0)
    given = [{"input_ids": torch.randint(3, VOCAB, (6, 12), generator=generator)} for _ in range(4)]
    seen = []

    def measure(student):
        seen.append(student)
        return {"activation": student.config.hidden_act, "calls": len(seen)}

    model = tiny(kind).eval()
    return list(rows(model, given, given[:2], settings=SETTINGS, measure=measure, **asked))


def test_healing_gives_the_row_of_the_local_fit_too():
    found = made("bert", widths=["2/3", "5/6"], stages=["closed", "heal"], blocks=["gated", "dense"])
    places = [(row["width"], row["block"], row["stage"]) for row in found]
    assert places == [
        (w, b, s) for w in ("2/3", "5/6") for b in ("gated", "dense") for s in ("closed", "local", "heal")
    ]
    assert [row["calls"] for row in found] == list(range(1, 13))
    assert {row["tokens"] for row in found} == {4 * 72}
    assert {(row["stage"], row["healing_tokens"]) for row in found} == {("closed", 0), ("local", 0), ("heal", 144)}


def test_the_control_of_a_gated_model_keeps_its_activation():
    found = made("llama", widths=["2/3"], stages=["closed"], blocks=["gated", "swiglu"])
    assert [(row["block"], row["activation"]) for row in found] == [("gated", "gelu"), ("swiglu", "silu")]


@pytest.fixture
def results(tmp_path, monkeypatch):
    for room in (narrow_runs, records):
        monkeypatch.setattr(room, "RESULTS", tmp_path)
    return tmp_path / "table.json"


def test_a_row_takes_the_place_of_its_forerunner(results):
    row = {"model": "m", "width": "2/3", "neurons": 20, "seed": 0, "tokens": 7, "healing_tokens": 3, "nll": {"d": 2.0}}
    row |= {"cpu_seconds": 1, "domains": {"d": {"delta_nll": INTERVAL, "kl": INTERVAL}}}
    row |= {f"{name}{part}": 0.5 for name in ("cosine", "neighbours") for part in ("", "_calibrated", "_other")}
    for block, stage in (("swiglu", "closed"), ("gated", "local"), ("gated", "closed"), ("gated", "local")):
        record(
            "table",
            {"calibrated_on": ["d"], "other": "e", "held_out_sentences": 8},
            {**row, "block": block, "stage": stage},
        )
    held = json.loads(results.read_text(encoding="utf-8"))
    assert [(each["block"], each["stage"]) for each in held["rows"]] == [
        ("gated", "closed"),
        ("swiglu", "closed"),
        ("gated", "local"),
    ]
    for page in (section(held), causal_section(held)):
        assert "SwiGLU control" in page
        assert "dense control*" not in page
    assert "| m | 2/3 (20) | closed | SwiGLU control | d | 2.000 | +0.5000 ± 0.2500 |" in causal_section(held)
