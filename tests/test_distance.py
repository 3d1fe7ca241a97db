"""Distances of outputs that are compared in parts are those of the whole."""

import pytest
import torch

from hf_geglu import distance


@pytest.mark.parametrize("part", [1, 37, 10**9])
def test_in_parts_as_in_one(part, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(3, 5, 70, generator=generator)
    after = before + 0.01 * torch.randn(before.shape, generator=generator)
    after[1, 2, 3] = before[1, 2, 3] + 4.0
    for tensor in (before, after):
        tensor[0, 0, :5] = -float("inf")  # masked in both
    monkeypatch.setattr(distance, "PART", part)
    tokens = torch.randint(70, (3, 5), generator=generator)
    found = distance.comparison({"logits": before}, {"logits": after}, dtype="", tokens=tokens, causal=True)
    shown = torch.isfinite(before)
    assert found.max_abs == pytest.approx(4.0, abs=1e-6)
    assert found.max_rel == pytest.approx(4.0 / before[shown].abs().max().item(), abs=1e-6)
    assert found.tokens == 12
    p, q = (torch.log_softmax(each[:, :-1].double(), dim=-1) for each in (before, after))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).nan_to_num().sum() / 12), rel=1e-9)
    square, size = distance.squares(before, after)
    assert square == pytest.approx(float((after - before).double()[shown].square().sum()), rel=1e-5)
    assert size == pytest.approx(float(before[shown].double().square().sum()), rel=1e-9)


def test_what_is_masked_in_one_only_is_infinitely_far():
    before, after = torch.zeros(2, 3), torch.zeros(2, 3)
    after[0, 0] = -float("inf")
    assert distance.comparison({"logits": before}, {"logits": after}, dtype="").max_abs > 1e300
    assert distance.squares(before, after) == (0.0, 0.0)
