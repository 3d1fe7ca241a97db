"""What a text is to be given: one class, several labels, or a number. transformers calls that the `problem_type`.

As in transformers' `run_classification.py`, fractions say a regression and lists several labels, unless the user says
otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.objectives.metrics import ClassMetric, LabelMetric, NumberMetric
from hf_geglu.training.tasks.classes import Classes, classes_of, streamed_classes, told

Number: TypeAlias = int | float | list[float]

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


class Target(Protocol):
    """What the values of a column become."""

    @property
    def metric(self) -> ClassMetric | LabelMetric | NumberMetric:
        """Of an evaluation."""

    @property
    def options(self) -> Mapping[str, Any]:
        """What `from_pretrained` makes a head of."""

    @property
    def line(self) -> str:
        """For people."""

    def of(self, value: Any, /) -> Number:
        """What is predicted: a whole number, a fraction, or one fraction a label."""


@dataclass(frozen=True)
class OneClass:
    """One class each."""

    classes: Classes

    @property
    def metric(self) -> ClassMetric:
        """Accuracy and F1."""
        return ClassMetric(len(self.classes.names))

    @property
    def options(self) -> Mapping[str, Any]:
        """As many outputs as classes."""
        return {**self.classes.options(), "problem_type": SINGLE}

    @property
    def line(self) -> str:
        """Their names."""
        return f"{len(self.classes.names)} classes: {told(self.classes.names)}"

    def of(self, value: Any) -> int:
        """The number of the class; 1.0 counts as 1."""
        return self.classes.number(_whole(value))


@dataclass(frozen=True)
class SeveralLabels:
    """Any number of labels each, as a list of names or numbers, or as a 0 or 1 for each label (`hot`)."""

    classes: Classes
    hot: bool
    column: str

    @property
    def metric(self) -> LabelMetric:
        """F1 over labels."""
        return LabelMetric(len(self.classes.names))

    @property
    def options(self) -> Mapping[str, Any]:
        """As many outputs as labels."""
        return {**self.classes.options(), "problem_type": MULTI}

    @property
    def line(self) -> str:
        """Their names."""
        how = "0 or 1 for each" if self.hot else "any number of them each"
        return f"{len(self.classes.names)} labels, {how}: {told(self.classes.names)}"

    def of(self, value: Any) -> list[float]:
        """One answer a label."""
        row = _listed(value, self.column)
        if not self.hot:
            has = {self.classes.number(each) for each in row}
            return [float(number in has) for number in range(len(self.classes.names))]
        if len(row) != len(self.classes.names) or any(each not in (0, 1) for each in row):
            raise DataError(
                f"a row has {self.column} {row[:8]}: expected {len(self.classes.names)} numbers, each 0 or 1. Mend it."
            )
        return [float(each) for each in row]


@dataclass(frozen=True)
class ANumber:
    """A number each."""

    column: str
    note: str = ""
    metric: NumberMetric = field(default_factory=NumberMetric)

    @property
    def options(self) -> Mapping[str, Any]:
        """One output."""
        return {"num_labels": 1, "problem_type": REGRESSION}

    @property
    def line(self) -> str:
        """What the loss is."""
        return f"regression: the loss is the squared error of {self.column}{self.note}"

    def of(self, value: Any) -> float:
        """As a fraction."""
        if isinstance(value, bool | str | list) or value is None or not math.isfinite(value):
            raise DataError(
                f"a row has {self.column} {value!r}: expected a finite number for a regression. Leave it out, or give "
                "another --problem_type."
            )
        return float(value)


def target_of(
    values: Sequence[Any] | None,
    *,
    wanted: str | None,
    known: Iterable[str] | None,
    given: Iterable[str] | None,
    config: Any,
    column: str,
    first: Any = None,
) -> Target:
    """What the values of a column are, checked one by one.

    Args:
        values: of all rows; None for a stream, which is not read beforehand.
        wanted: --problem_type.
        known: names that the dataset states.
        given: --label_names.
        config: of the model.
        column: what it is called, for messages.
        first: of a stream, the first value.

    Raises:
        DataError: values that are none of what was said.
        ConfigurationError: a stream of classes that nobody names.
    """
    some = first if values is None else next((value for value in values if value is not None), None)
    kind = wanted or (MULTI if isinstance(some, list) else REGRESSION if isinstance(some, float) else SINGLE)
    if kind == REGRESSION:
        if given is not None:
            raise ConfigurationError("--label_names and a regression, which has no classes. Leave one of them out.")
        number = ANumber(column, _note(values, wanted))
        for value in values or ():
            number.of(value)
        return number
    if kind == SINGLE:
        if values is None:
            return OneClass(streamed_classes(known=known, config=config, column=column, given=given))
        if any(isinstance(value, list) for value in values):
            raise DataError(f"{column} holds lists: expected classes. Say --problem_type {MULTI} for several each.")
        whole = [_whole(value) for value in values]
        return OneClass(classes_of(whole, known=known, config=config, column=column, given=given))
    if values is None:
        names = streamed_classes(known=known, config=config, column=column, given=given)
        return SeveralLabels(names, isinstance(first, list) and _is_hot([first], len(names.names)), column)
    rows = [_listed(value, column) for value in values]
    if known is None and _is_hot(rows, None if given is None else len(list(given))):
        size = len(rows[0])
        names = Classes(tuple(given) if given is not None else tuple(f"LABEL_{number}" for number in range(size)))
        labels = SeveralLabels(names, True, column)
    else:
        every: Iterator[Any] = (value for row in rows for value in row)
        labels = SeveralLabels(classes_of(every, known=known, config=config, column=column, given=given), False, column)
    for row in rows:
        labels.of(row)
    return labels


def _whole(value: Any) -> Any:
    """Classes that a table has turned into fractions, because some were missing."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(
            f"a row has {column} {value!r}: expected a list of labels, perhaps an empty one. Mend it, or say "
            "--problem_type single_label_classification."
        )
    return value


def _is_hot(rows: Sequence[list[Any]], size: int | None) -> bool:
    """Rows of 0 and 1, all as long. Numbers of classes look like that too: but no class is twice in a row, and they
    are whole."""
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or (size is not None and lengths != {size}) or lengths <= {0, 1}:
        return False
    if any(each not in (0, 1) or isinstance(each, str) for row in rows for each in row):
        return False
    return any(isinstance(each, float) for row in rows for each in row) or any(len(set(row)) < len(row) for row in rows)


def _note(values: Sequence[Any] | None, wanted: str | None) -> str:
    """Classes that look like fractions are often meant as classes."""
    found = set(values or ())
    if wanted or not found or len(found) > 20 or not all(isinstance(v, float) and v.is_integer() for v in found):
        return ""
    return f" ({len(found)} whole numbers; if they are classes: --problem_type {SINGLE})"
