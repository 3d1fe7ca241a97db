"""Units are compared at equal parameters, on equal batches, from equal weights outside the blocks."""

import pytest
import torch

from benchmarks import glu_variants
from benchmarks.glu_variants import UNITS, build, rank_correlation, render, run


def test_all_units_have_as_many_parameters():
    models = [build(unit, 0) for unit in UNITS]
    assert len({sum(weight.numel() for weight in model.parameters()) for model in models}) == 1
    first, *others = ({n: w for n, w in model.named_parameters() if "mlp" not in n} for model in models)
    for other in others:
        assert all(torch.equal(weight, other[name]) for name, weight in first.items())


def test_a_run_learns_and_repeats(monkeypatch):
    monkeypatch.setattr(glu_variants, "HELD_OUT", 2048)
    tokens = torch.randint(0, 40, (156, 128), generator=torch.Generator().manual_seed(0))
    rows = [run(UNITS[6], 1, 12, tokens, tokens) for _ in range(2)]
    assert rows[0]["nll"] == rows[1]["nll"] < 7.9 < torch.tensor(4096.0).log()


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


def test_the_page_has_a_line_for_each_unit():
    rows = [
        {
            "unit": unit.name,
            "seed": seed,
            "steps": 5,
            "parameters": 7,
            "ffn_parameters": 3,
            "nll": unit.published[0] + seed,
        }
        for unit in UNITS
        for seed in (0, 1)
    ]
    page = render({"rows": rows, "device": "CPU", "torch": "2", "transformers": "5"})
    assert "| GEGLU | 2.4420 | -0.0550 (-0.0550, -0.0550) | 1.942 | 1.633 |" in page
    assert "1.00 (65k)" in page
