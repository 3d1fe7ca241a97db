"""The pure part of narrowing: which neurons go, what the others make up for, and coordinates to train in."""

import pytest
import torch
from torch.nn.functional import gelu

from hf_geglu.conversions import NewWeights
from hf_geglu.conversions.narrow import Moments, kept, narrowed, removal_order, ridge
from hf_geglu.conversions.whitened import FitSettings, WhitenedBlock, fit, hidden, output, whitening
from hf_geglu.errors import ConversionError, PlanError
from hf_geglu.width import narrow_width, parse_width


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(d=6, f=12, *, seed=0):
    return NewWeights(
        gate=draw(f, d, seed=seed),
        up=draw(f, d, seed=seed + 1),
        down=draw(d, f, seed=seed + 2),
        gate_bias=draw(f, seed=seed + 3),
        up_bias=draw(f, seed=seed + 4),
        down_bias=draw(d, seed=seed + 5),
    )


def moments_of(hidden_TF, target_TD, weights_T=None):
    moments = Moments(hidden_TF.shape[1], target_TD.shape[1])
    weights_T = torch.ones(len(hidden_TF)) if weights_T is None else weights_T
    for part in zip(hidden_TF.split(50), target_TD.split(50), weights_T.split(50), strict=True):
        moments.update(*part)
    return moments


def lost(hidden_TF, down_DF, neurons):
    """Smallest squared error that those neurons, their columns solved for again, leave."""
    target = hidden_TF.double() @ down_DF.double().T
    target = target - target.mean(0)
    given = hidden_TF[:, neurons].double()
    given = given - given.mean(0)
    solution = torch.linalg.lstsq(given, target).solution
    return float((given @ solution - target).square().sum())


def test_the_first_to_go_is_the_one_that_the_others_replace_best():
    h = draw(400, 7) @ draw(7, 7, seed=1)
    down = draw(3, 7, seed=2)
    covariance, _ = moments_of(h, h.new_zeros(400, 0)).second(centred=True)
    order = removal_order(covariance, down, smallest=6, stride=1)
    losses = [lost(h, down, [n for n in range(7) if n != gone]) for gone in range(7)]
    assert int(order[0]) == losses.index(min(losses))


def test_removal_one_by_one_is_greedily_best():
    h = draw(400, 8) @ draw(8, 8, seed=1)
    down = draw(3, 8, seed=2)
    covariance, _ = moments_of(h, h.new_zeros(400, 0)).second(centred=True)
    order = removal_order(covariance, down, smallest=4, stride=1).tolist()
    left = list(range(8))
    for gone in order[:4]:
        losses = {n: lost(h, down, [m for m in left if m != n]) for n in left}
        assert losses[gone] <= 1.05 * min(losses.values())  # damping is 1e-4, so ties may fall either way
        left.remove(gone)
    assert sorted(order) == list(range(8))


def test_twins_are_merged_without_loss():
    base = draw(500, 6)
    h = torch.cat([base, 2.0 * base], dim=1)  # neuron n + 6 says what n says
    down = draw(4, 12, seed=1)
    covariance, _ = moments_of(h, h.new_zeros(500, 0)).second(centred=True)
    keep = kept(removal_order(covariance, down, smallest=6, stride=2), 6)
    assert sorted(int(n) % 6 for n in keep) == list(range(6))
    solved, bias = ridge(moments_of(h[:, keep], h @ down.T), bias=True, damping=1e-9)
    assert torch.allclose(h[:, keep] @ solved.T + bias, h @ down.T, atol=1e-3)


def test_an_order_serves_every_width_above_the_smallest():
    order = torch.tensor([4, 2, 0, 1, 3])
    assert kept(order, 2).tolist() == [1, 3]
    assert kept(order, 4).tolist() == [0, 1, 2, 3]


def test_directions_that_no_error_counts_in_do_not_choose():
    h = draw(500, 4)
    down = torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    covariance, _ = moments_of(h, h.new_zeros(500, 0)).second(centred=True)
    assert set(removal_order(covariance, down, smallest=2, stride=1)[2:].tolist()) == {0, 1}
    metric = torch.diag(torch.tensor([0.0, 1.0]))
    assert set(removal_order(covariance, down, smallest=2, stride=1, metric_DD=metric)[2:].tolist()) == {2, 3}


def test_ridge_is_weighted_least_squares_with_an_intercept():
    h, y, w = draw(300, 5), draw(300, 2, seed=1) + 7.0, draw(300, seed=2).abs()
    solved, bias = ridge(moments_of(h, y, w), bias=True, damping=0.0)
    root = w.sqrt()[:, None]
    expected = torch.linalg.lstsq(torch.cat([h, torch.ones(300, 1)], 1) * root, y * root).solution
    assert torch.allclose(torch.cat([solved.T, bias[None]]), expected, atol=1e-3)
    without, none = ridge(moments_of(h, y, w), bias=False, damping=0.0)
    assert none is None
    assert torch.allclose(without.T, torch.linalg.lstsq(h * root, y * root).solution, atol=1e-3)


@pytest.mark.parametrize("smallest", [0, 9])
def test_a_block_cannot_keep_more_neurons_than_it_has(smallest):
    with pytest.raises(ConversionError, match="8 neurons cannot keep"):
        removal_order(torch.eye(8), draw(2, 8), smallest=smallest)


def test_narrowed_is_a_selection():
    whole, x = block(), draw(20, 6, seed=9)
    part = narrowed(whole, torch.tensor([1, 5, 7]))
    assert torch.allclose(hidden(part, x, gelu), hidden(whole, x, gelu)[:, [1, 5, 7]], atol=1e-5)
    assert part.down.shape == (6, 3)


def test_whitening_evens_directions_half_way():
    x = draw(4000, 5) * torch.tensor([1.0, 3.0, 9.0, 0.5, 2.0])
    root, back = whitening(x.T @ x / len(x))
    assert torch.allclose(root @ back, torch.eye(5), atol=1e-4)
    even = x @ root.T
    spread = (even.T @ even / len(even)).diagonal()
    assert torch.allclose(spread.mean(), torch.tensor(1.0), atol=1e-3)
    assert torch.allclose(spread / spread[0], torch.tensor([1.0, 3.0, 9.0, 0.5, 2.0]), rtol=0.1)


def whitened(start, x, **options):
    h = hidden(start, x, gelu)
    return WhitenedBlock(
        start, input_covariance_DD=x.T @ x / len(x), hidden_covariance_FF=h.T @ h / len(h), output_scale=3.0, **options
    )


def test_coordinates_change_nothing_at_the_start():
    start, x = block(), draw(200, 6, seed=9)
    assert torch.allclose(output(whitened(start, x).weights(), x, gelu), output(start, x, gelu), atol=1e-3)


def test_a_fit_comes_nearer_and_is_repeatable():
    goal, start, x = block(seed=3), block(f=8, seed=20), draw(600, 6, seed=9)
    target, weights = output(goal, x, gelu), torch.ones(600)
    settings = FitSettings(steps=150, batch=128, learning_rate=2e-2, dtype=torch.float32)
    results = []
    for _ in range(2):
        fitted = whitened(start, x)
        before = (output(fitted.weights(), x, gelu) - target).square().mean()
        fit(fitted, x, target, weights, gelu, settings=settings)
        after = (output(fitted.weights(), x, gelu) - target).square().mean()
        assert after < 0.3 * before
        results.append(fitted.weights().gate)
    assert torch.equal(*results)


def test_the_control_keeps_its_value_branch():
    start, x = block(), draw(200, 6, seed=9)
    fitted = whitened(start, x, learn_value=False)
    fit(fitted, x, x, torch.ones(200), gelu, settings=FitSettings(steps=5, batch=64, dtype=torch.float32))
    assert torch.allclose(fitted.weights().up, start.up, atol=1e-4)
    assert torch.equal(fitted.weights().up_bias, start.up_bias)
    assert not torch.allclose(fitted.weights().gate, start.gate, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "gated", "expected"),
    [("same", False, 1536), ("matched", False, 1024), ("matched", True, 1536), (0.75, True, 1152), (1000, False, 1000)],
)
def test_widths(asked, gated, expected):
    assert narrow_width(asked, 1536, gated=gated) == expected


@pytest.mark.parametrize("asked", [0, -3, 2000, 1.5, 0.0, "half", True])
def test_widths_that_are_none(asked):
    with pytest.raises(PlanError, match="expected 'same', 'matched'"):
        narrow_width(asked, 1536, gated=False)


def test_widths_as_they_are_typed():
    assert [parse_width(text) for text in ("same", "matched", "0.75", "1024")] == ["same", "matched", 0.75, 1024]
    with pytest.raises(PlanError, match="a share such as"):
        parse_width("two thirds")
