"""The benchmark of speed runs, on shapes of nothing, and its page says what its record says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import block, clock, decode, generate, memory, render, step, unit
from benchmarks.speed.process import ALLOCATOR, measured

BLOCK: dict[str, Any] = {"hidden": 16, "width": 48, "tokens": 32, "dtype": "bfloat16", "activation": "gelu"}
VERSIONS = {"device": "CPU, 1 threads", "torch": "2", "transformers": "5"}
SHAPE = {"model": "SmolLM2-135M", "layers": 1, "vocabulary": 128}


def test_one_block() -> None:
    found = block.measure(**BLOCK, seconds=0.0)
    names = {"eager HF", "torch.compile", "ours, lean", "ours, tiled", "ours, auto"}
    assert found["error over eager"].keys() == found["saved units"].keys() == names
    assert all(ratio <= 2.0 for ratio in found["error over eager"].values())
    x = found["x units"]
    assert found["saved units"]["eager HF"] == pytest.approx(4 + x, abs=0.01)
    assert found["saved units"]["ours, lean"] == pytest.approx(2 + x, abs=0.01)
    assert found["saved units"]["ours, tiled"] == pytest.approx(x, abs=0.01)
    assert found["time over products"].keys() == {block.PRODUCTS, *names}
    assert found["time over products"][block.PRODUCTS] == found["time over eager"]["eager HF"] == 1.0


def test_the_unit_beside_a_copy() -> None:
    found = unit.measure(**{name: value for name, value in BLOCK.items() if name != "hidden"}, seconds=0.0)
    shares = found["share of a copy's speed"]
    assert shares.keys() == {"copy", "forward", "backward"}
    assert shares["copy"] == 1.0
    case = {"tokens": 32, "width": 48, "dtype": "bfloat16", "activation": "gelu", "device": "cpu", "threads": 1}
    page = render.page({**VERSIONS, "unit": [{**case, render.SHARE: {"forward": 0.913, "backward": 0.85}}]})
    assert "| 32 x 48 | bfloat16 | gelu | cpu, 1 thread | 91% | 85% |" in page


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # asked by torch's compiler
@pytest.mark.parametrize("model", ["SmolLM2-135M", "GPT-2 small"])
def test_one_step(model: str) -> None:
    found = step.measure(shape={**SHAPE, "model": model}, batch=(1, 24), seconds=0.0)
    for part in ("error over eager", "time over eager", "saved over eager"):
        assert list(found[part]) == list(step.SIDES)
        assert found[part][step.EAGER] == 1.0
    assert all(ratio <= 2.0 for ratio in found["error over eager"].values())


def test_few_tokens() -> None:
    case = {**BLOCK, "dtype": "float32", "tokens": [1, 3]}
    found = decode.measure(**case, seconds=0.0, row=4 * 3 * 16 * 48 * 2)
    assert list(found["time over eager"]) == list(found["error over eager"]) == ["1", "3"]
    for part in found.values():
        for own in part.values():
            assert own.keys() == {block.EAGER, "one product for both", "torch.compile", decode.OURS, decode.PACKED}
            assert own[block.EAGER] == 1.0
    assert all(ratio <= 2.0 for own in found["error over eager"].values() for ratio in own.values())


def test_generation() -> None:
    found = generate.measure(shape=SHAPE, dtype="float32", prompt=4, new=3, batch=2, seconds=0.0)
    assert list(found["time over eager"]) == [block.EAGER, decode.OURS, decode.PACKED]
    assert found["same tokens"] == 1.0
    assert 0.1 < found["packed bytes over weights"] < 1.0  # one layer's block beside embedding and attention


def test_a_measurement_has_a_process_of_its_own() -> None:
    """With the allocator's settings, and one side only."""
    peak = measured("peak", threads=1, of="step", side=step.EAGER, shape=SHAPE, batch=(1, 33))
    assert peak > 0
    assert ALLOCATOR["MALLOC_MMAP_MAX_"] == "0"


def test_a_peak_is_what_was_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.ones(2**26)  # 256 MiB each time, more than the allocator keeps

    assert 200 * 2**20 <= memory.peak_bytes(run, device="cpu") <= 400 * 2**20


def test_ratios_are_those_within_a_round() -> None:
    assert clock.ratios({"a": [1.0, 10.0, 4.0], "b": [2.0, 10.0, 1.0]}, over="b") == {"a": 1.0, "b": 1.0}


def test_the_page(tmp_path: Path) -> None:
    sides = dict.fromkeys(step.SIDES, 0.5)
    blocks = {"eager HF": 1.0, "ours, lean": 0.875}
    few = {"1": {"eager HF": 1.0, "ours, decode": 0.5625}, "8": {"eager HF": 1.0, "ours, decode": 0.6875}}
    record = {
        **VERSIONS,
        "blocks": [
            {
                **{**BLOCK, "device": "cpu", "threads": 2, "x units": 0.25},
                **{"error over eager": blocks, "saved units": dict.fromkeys(blocks, 2.25), "time over eager": blocks},
                "time over products": {**blocks, block.PRODUCTS: 1.0},
                "time over quick products": {**blocks, "ours, lean": 1.0165},
            }
        ],
        "peak units": {**BLOCK, "sides": {"ours, tiled": 1.525}},
        "steps": [
            {
                **{"device": "cpu", "threads": 1, "shape": SHAPE, "batch": [1, 24]},
                **dict.fromkeys(("error over eager", "time over eager", "saved over eager", "peak over eager"), sides),
            }
        ],
        "decode": [{**BLOCK, "tokens": [1, 8], **dict.fromkeys(("time over eager", "error over eager"), few)}],
        "generate": [
            {
                **{"shape": SHAPE, "dtype": "float32", "prompt": 32, "new": 24, "time over eager": blocks},
                **{"same tokens": 1.0, "packed bytes over weights": 0.592},
            }
        ],
        "rest": {
            "import_seconds": {"after the Auto classes": 0.012},
            "conversion": {"parameters": 1_100_000_000, "over reading once": {"find_sites": 0.175}},
        },
    }
    render.render(json.loads(json.dumps(record)), tmp_path)
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    for told in (
        "0.875",
        "2.00 + x",
        "1.0165",
        "over products by oneDNN",
        "1.525",
        "0.012 after the Auto classes",
        "1.10 billion",
        "0.175",
        "2 threads",
        "0.5625 | 0.6875",
        "59%",
    ):
        assert told in page
    for plot in render.PLOTS:
        assert plot in page
        assert 1_000 < (tmp_path / plot).stat().st_size < 30_000
