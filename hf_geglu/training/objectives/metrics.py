"""What an evaluation counts besides the loss, as sums: sums can be added over batches and processes.

C = classes
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

_IGNORED = -100


class Metric(Protocol):
    """Turns predictions into counts, and all counts into values."""

    loss_name: ClassVar[str]
    """What the loss of such predictions is: "nll" of tokens, which says a perplexity; "cross_entropy" of classes, "mse"
    of numbers."""

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Counts of one batch: a vector in float64 on the CPU, always of the same length."""

    def values(self, counts: Tensor) -> dict[str, float]:
        """Name -> value, given the sum of all counts."""


@dataclass(frozen=True)
class ClassMetric:
    """Accuracy and macro-averaged F1: the mean over the classes that occur in labels or predictions, as in
    scikit-learn; of two classes also the F1 of the second, as in GLUE.

    Attributes:
        classes: how many.
    """

    loss_name: ClassVar[str] = "cross_entropy"

    classes: int

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(3 C,): per class, right predictions, predictions, labels."""
        wanted = labels.flatten().cpu()
        predicted = logits.flatten(0, -2).argmax(-1).cpu()[wanted != _IGNORED]
        wanted = wanted[wanted != _IGNORED]
        parts = (wanted[wanted == predicted], predicted, wanted)
        return torch.cat([torch.bincount(part, minlength=self.classes).double() for part in parts])

    def values(self, counts: Tensor) -> dict[str, float]:
        """accuracy, f1_macro[, f1]."""
        right, predicted, labels = counts.view(3, self.classes)
        occurring = (predicted + labels) > 0
        f1 = 2 * right / (predicted + labels).clamp(min=1)
        found = {"accuracy": float(right.sum() / labels.sum()), "f1_macro": float(f1[occurring].mean())}
        return found | ({"f1": float(f1[1])} if self.classes == 2 else {})


@dataclass(frozen=True)
class LabelMetric:
    """Of several answers of yes or no an example: F1 over all of them (micro), its mean over the labels that occur in
    labels or predictions (macro), and the share of examples with all of them right.

    Attributes:
        labels: how many.
    """

    loss_name: ClassVar[str] = "cross_entropy"

    labels: int

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(3 C + 2,): per label right, predicted and given; examples that are right, examples."""
        kept = ~labels.isnan().any(-1)
        said, given = logits[kept].cpu() > 0, labels[kept].cpu() > 0.5
        parts = [(said & given).sum(0), said.sum(0), given.sum(0)]
        whole = torch.stack([(said == given).all(-1).sum(), kept.sum().cpu()])
        return torch.cat([*parts, whole]).double()

    def values(self, counts: Tensor) -> dict[str, float]:
        """f1_micro, f1_macro, accuracy."""
        right, said, given = counts[:-2].view(3, self.labels)
        occurring = (said + given) > 0
        f1 = 2 * right / (said + given).clamp(min=1)
        return {
            "f1_micro": float(2 * right.sum() / (said + given).sum().clamp(min=1)),
            "f1_macro": float(f1[occurring].mean()) if bool(occurring.any()) else 0.0,
            "accuracy": float(counts[-2] / counts[-1]),
        }


@dataclass(frozen=True)
class NumberMetric:
    """Mean squared error and Pearson's correlation of predicted and given numbers."""

    loss_name: ClassVar[str] = "mse"

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(7,): how many, sums of both, of their squares, of their product, of the squared error."""
        kept = ~labels.isnan()
        x, y = logits.view(labels.shape)[kept].cpu().double(), labels[kept].cpu().double()
        sums = [x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum(), ((x - y) ** 2).sum()]
        return torch.stack([kept.sum().cpu().double(), *sums])

    def values(self, counts: Tensor) -> dict[str, float]:
        """mse, pearson (0 where either does not vary)."""
        n, x, y, xx, yy, xy, error = counts.tolist()
        spread = max(n * xx - x * x, 0.0) * max(n * yy - y * y, 0.0)
        return {"mse": error / n, "pearson": (n * xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0}


@dataclass(frozen=True)
class TokenAccuracy:
    """Share of the tokens whose most likely prediction is right, given the right tokens before it."""

    loss_name: ClassVar[str] = "nll"

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(2,): right, all."""
        counted = labels != _IGNORED
        right = (logits.argmax(-1) == labels) & counted
        return torch.stack([right.sum(), counted.sum()]).double().cpu()

    def values(self, counts: Tensor) -> dict[str, float]:
        """token_accuracy."""
        return {"token_accuracy": float(counts[0] / counts[1])}


@dataclass(frozen=True)
class EntityMetric:
    """Precision, recall and F1 of whole entities (type, first and last word right) of B-/I- labels, and the accuracy of
    words. Entities are read as conlleval and seqeval's default do: one begins at B-, and at I- after another type.

    Attributes:
        names: of the classes, in order.
    """

    loss_name: ClassVar[str] = "cross_entropy"

    names: tuple[str, ...]

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(5,): right entities, predicted, labelled; right words, words."""
        found = torch.zeros(5, dtype=torch.float64)
        for predicted, wanted in zip(logits.argmax(-1).cpu(), labels.cpu(), strict=True):
            counted = wanted != _IGNORED
            words, gold = predicted[counted].tolist(), wanted[counted].tolist()
            ours, theirs = entities(self.names[i] for i in words), entities(self.names[i] for i in gold)
            right = sum(a == b for a, b in zip(words, gold, strict=True))
            found += torch.tensor([len(ours & theirs), len(ours), len(theirs), right, len(gold)], dtype=torch.float64)
        return found

    def values(self, counts: Tensor) -> dict[str, float]:
        """precision, recall, f1 (0 where there is nothing to be right about), accuracy."""
        right, predicted, labelled, words_right, words = counts.tolist()
        return {
            "precision": right / max(predicted, 1.0),
            "recall": right / max(labelled, 1.0),
            "f1": 2 * right / max(predicted + labelled, 1.0),
            "accuracy": words_right / words,
        }


def entities(names: Iterable[str]) -> set[tuple[str, int, int]]:
    """(type, first word, last word) of each entity in a row of labels such as O, B-PER, I-PER."""
    found: set[tuple[str, int, int]] = set()
    begin, kind = 0, ""
    for place, name in enumerate([*names, "O"]):
        prefix, _, now = name.partition("-")
        if kind and (prefix != "I" or now != kind):
            found.add((kind, begin, place - 1))
            kind = ""
        if prefix in ("B", "I") and (prefix == "B" or not kind):
            begin, kind = place, now
    return found


def entity_names(names: Sequence[str]) -> bool:
    """Whether these classes are B- and I- of something."""
    return any(name.startswith(("B-", "I-")) for name in names)
