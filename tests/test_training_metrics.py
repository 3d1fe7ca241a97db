"""Metrics are sums, and what they say is what the textbook says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_geglu.training.objectives.metrics import ClassMetric, EntityMetric, TokenAccuracy, entities, entity_names

IGNORED = -100
pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def logits_for(predicted: list[int], classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()


@given(pairs)
def test_accuracy_and_macro_f1(found: list[tuple[int, int]]) -> None:
    predicted, labels = (list(each) for each in zip(*found, strict=True))
    metric = ClassMetric(4)
    halves = [
        metric.counts(logits_for(predicted[s], 4), torch.tensor(labels[s]))
        for s in (slice(0, len(labels) // 2), slice(len(labels) // 2, None))
        if labels[s]
    ]
    values = metric.values(torch.stack(halves).sum(0))
    assert values["accuracy"] == pytest.approx(sum(a == b for a, b in found) / len(found))
    f1 = []
    for one in set(predicted) | set(labels):
        right = sum(a == b == one for a, b in found)
        f1.append(2 * right / (predicted.count(one) + labels.count(one)))
    assert values["f1_macro"] == pytest.approx(sum(f1) / len(f1))


def test_two_classes_have_the_f1_of_the_second() -> None:
    metric = ClassMetric(2)
    counts = metric.counts(logits_for([1, 1, 0, 0], 2), torch.tensor([1, 0, 1, IGNORED]))
    assert metric.values(counts) == pytest.approx({"accuracy": 1 / 3, "f1_macro": 0.25, "f1": 0.5})


def test_token_accuracy() -> None:
    logits = logits_for([1, 2, 3], 4)[None]
    counts = TokenAccuracy().counts(logits, torch.tensor([[1, 0, IGNORED]]))
    assert TokenAccuracy().values(counts) == {"token_accuracy": 0.5}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("O B-A I-A O", {("A", 1, 2)}),
        ("B-A B-A I-A", {("A", 0, 0), ("A", 1, 2)}),
        ("I-A I-A O", {("A", 0, 1)}),
        ("B-A I-B I-B", {("A", 0, 0), ("B", 1, 2)}),
        ("O O", set()),
        ("B-A-X I-A-X", {("A-X", 0, 1)}),
    ],
)
def test_entities(names: str, found: set[tuple[str, int, int]]) -> None:
    assert entities(names.split()) == found


def test_an_entity_is_right_as_a_whole() -> None:
    metric = EntityMetric(("O", "B-A", "I-A"))
    labels = torch.tensor([[IGNORED, 1, 2, 0, 1], [1, IGNORED, 2, 0, 0]])
    predicted = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 2, 0, 1]])
    logits = torch.nn.functional.one_hot(predicted, 3).float()
    values = metric.values(metric.counts(logits, labels))
    # labelled: A(0,1), A(3,3) | A(0,1); predicted: A(0,0), A(3,3) | A(0,1), A(3,3); right: 2
    assert values == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "accuracy": 6 / 8})
    assert entity_names(metric.names)
    assert not entity_names(["NOUN", "VERB"])
