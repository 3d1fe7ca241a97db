"""What a sweep writes names no machine."""

import json
import tempfile
from pathlib import Path

import torch

from benchmarks.records import RESULTS
from benchmarks.sweep.pool import Limits, sweep
from benchmarks.sweep.scrubbing import ROOT, scrub


def test_folders_go():
    installed = Path(torch.__file__)
    assert scrub(f"in <module 'torch' from '{installed}'>") == "in <module 'torch' from 'torch/__init__.py'>"
    assert scrub(f"{tempfile.gettempdir()}/sweep-ab_1/all/config.json is gone") == "/FOLDER/config.json is gone"
    assert scrub("/elsewhere/tmp/sweep-ab_1 is gone") == "/FOLDER is gone"
    assert scrub(f"{ROOT}/benchmarks/coverage.py:12") == "benchmarks/coverage.py:12"
    assert scrub(f"{Path.home()}/.cache/model") == "~/.cache/model"


def test_everything_in_a_row_is_scrubbed():
    row = {
        "type": "bert",
        "reads": [{"error": f"{ROOT}/a", "difference": 0.5, "weights": []}],
        "loss": [1.0],
        "exact": None,
    }
    assert scrub(row) == {**row, "reads": [{"error": "a", "difference": 0.5, "weights": []}]}


def test_what_is_no_folder_stays():
    text = "layers.0.mlp/fc1: 3/4 of the inputs, https://example.org/a"
    assert scrub(text) == text


def test_rows_are_scrubbed_before_they_are_written(tmp_path, monkeypatch):
    """By the sweep itself, whatever the two sides answer."""
    monkeypatch.setattr("benchmarks.sweep.pool.one", lambda name, *_, partial: {"type": name, "crash": f"in {ROOT}/x"})
    monkeypatch.setattr(
        "benchmarks.sweep.pool.deal", lambda types, sides, work, **_: [work(name, ()) for name in types]
    )
    done = []
    rows = tmp_path / "rows.jsonl"
    sweep(["bert"], rows, partial=lambda _: False, processes=1, limits=Limits(), done=done.append)
    assert json.loads(rows.read_text()) == done[0] == {"type": "bert", "crash": "in x"}


def test_the_records_name_no_machine():
    for path in RESULTS.glob("co*.json"):
        text = path.read_text(encoding="utf-8")
        assert "site-packages" not in text
        assert str(ROOT) not in text
        assert "/sweep-" not in text
