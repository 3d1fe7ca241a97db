"""The classes of a classifier: their names and numbers, out of the data or out of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.data.sources import Rows

HEAD = 64
"""Rows of a stream that are looked at for their classes."""

LABEL_NAMES = ("label", "labels", "class", "target", "category", "intent", "fine_label")
"""Columns that are taken for the class, in this order."""


@dataclass(frozen=True)
class Classes:
    """Names in order; a class is its place.

    Attributes:
        names: of the classes.
    """

    names: tuple[str, ...]

    def number(self, value: Any) -> int:
        """The class of a value of the data.

        Raises:
            DataError: none of them, as may come out of a stream.
        """
        if isinstance(value, int) and 0 <= value < len(self.names):
            return int(value)
        if not isinstance(value, int) and str(value) in self.names:
            return self.names.index(str(value))
        raise DataError(
            f"a row has the class {value!r}: expected one of {told(self.names)}, or its number from 0. Leave it out, "
            "or give all of them with --label_names."
        )

    def options(self) -> dict[str, Any]:
        """What `from_pretrained` makes a head of."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }


def told(names: Iterable[str], limit: int = 8) -> str:
    """The first of them, for people."""
    names = list(names)
    return ", ".join(names[:limit]) + ", ..." * (len(names) > limit)


def find_label_column(columns: Mapping[str, str], wanted: str | None, *, names: tuple[str, ...] = LABEL_NAMES) -> str:
    """The column with the class.

    Raises:
        DataError: it is not there.
    """
    exist = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"
    if wanted is not None and wanted not in columns:
        raise DataError(f"--label_column {wanted}: expected one of the columns that exist: {exist}. Name one of them.")
    found = wanted or next((name for name in names if name in columns), None)
    if found is None:
        raise DataError(
            f"no column called {', '.join(names)}: expected to know which one holds the class. Say --label_column with "
            f"one of {exist}."
        )
    return found


def classes_of(
    values: Iterable[Any],
    *,
    known: Iterable[str] | None,
    config: Any,
    column: str,
    given: Iterable[str] | None = None,
) -> Classes:
    """The classes of a column, checked value by value.

    Args:
        values: of training and validation rows.
        known: names that the dataset states.
        config: of the model; the names of its head are kept where they are those of the data.
        column: what it is called, for messages.
        given: names that the user states.

    Raises:
        DataError: rows without a class, numbers out of range, fractions, or a single class.
    """
    counts = Counter(values)
    empty = counts.get(None, 0)
    if empty:
        raise DataError(f"{empty:,} rows have no {column}: expected a class in each. Leave these rows out.")
    odd = [value for value in counts if not isinstance(value, int | str)]
    if odd:
        raise DataError(
            f"{column} holds {odd[0]!r}, a {type(odd[0]).__name__}: expected classes, as names or whole numbers. Give "
            "another column. (Fractions are for the recipe text_classification with --problem_type regression.)"
        )
    known = given if given is not None else known
    if known is not None:
        classes = Classes(tuple(known))
        _in_range(counts, len(classes.names), column)
        for value in counts:
            classes.number(value)
    elif all(isinstance(value, int) for value in counts):
        classes = _numbered(counts, config, column)
    else:
        classes = _named(counts, config)
    if len(classes.names) < 2:
        raise DataError(f"{column} holds one class, {classes.names[0]}: expected two or more. Give other data.")
    return classes


def streamed_classes(*, known: Iterable[str] | None, config: Any, column: str, given: Iterable[str] | None) -> Classes:
    """The classes of a stream, which cannot be read beforehand.

    Raises:
        ConfigurationError: neither the user nor the dataset nor the model says them.
    """
    names = tuple(given or known or head_names(config))
    if len(names) < 2:
        raise ConfigurationError(
            f"--streaming, and nothing says the classes of {column}: expected to know them before the data are read. "
            "Give --label_names."
        )
    return Classes(names)


def all_of_one_class(rows: Rows, column: str) -> tuple[str, ...]:
    """A word about a stream that begins with `HEAD` rows of one class, as folders and sorted tables do."""
    seen = {str(row[column]) for row in rows.select_columns([column]).take(HEAD)}
    if len(seen) > 1:
        return ()
    return (
        f"training: the stream begins with {HEAD} rows of one class, and is read in its order: a model forgets one "
        "class over the other. Shuffle the data, or leave --streaming out",
    )


def _in_range(counts: Counter[Any], size: int, column: str) -> None:
    wrong = sorted(value for value in counts if isinstance(value, int) and not 0 <= value < size)
    if wrong:
        rows = sum(counts[value] for value in wrong)
        raise DataError(
            f"{rows:,} rows have {column} {', '.join(map(str, wrong[:5]))}: expected 0 to {size - 1}. Leave them out; "
            "-1 usually marks a test set whose classes are kept secret."
        )


def _numbered(counts: Counter[Any], config: Any, column: str) -> Classes:
    heads = head_names(config)
    if heads and max(counts) < len(heads):
        _in_range(counts, len(heads), column)
        return Classes(heads)
    size = len(counts)
    if sorted(int(value) for value in counts) != list(range(size)):
        raise DataError(
            f"{column} holds {', '.join(str(int(v)) for v in sorted(counts)[:8])}{'...' * (size > 8)}: expected all "
            f"numbers from 0 to {size - 1}. Renumber the classes, or give their names with --label_names."
        )
    return Classes(tuple(f"LABEL_{number}" for number in range(size)))


def _named(counts: Counter[Any], config: Any) -> Classes:
    names = {str(value) for value in counts}
    heads = head_names(config)
    return Classes(heads) if heads and names <= set(heads) else Classes(tuple(sorted(names)))


def head_names(config: Any) -> tuple[str, ...]:
    """Names that a head was trained for; those that transformers makes up are none."""
    names = tuple(str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items()))
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names
