"""Rows to train on and rows to evaluate on: opened, reduced to the columns that a task reads, split, without
duplicates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_geglu.errors import DataError
from hf_geglu.training.data.mixture import open_mixture
from hf_geglu.training.data.pictures import Stored, undecoded
from hf_geglu.training.data.sources import Rows, column_types, open_source
from hf_geglu.training.settings.data import DataSettings

STREAM_HELD_OUT = 256
"""Rows at the head of a stream that are evaluated on where there is no validation set and no --max_eval_samples."""

ColumnNames = dict[str, str]
"""Column as it is called -> what the task calls it."""


@dataclass(frozen=True)
class RowSets:
    """What a task makes examples of.

    Attributes:
        train: rows with the columns that the task asked for, by the task's names.
        validation: the same; None without an evaluation.
        joined: the rows are lines of one running text.
        columns: what each column was called.
        lines: for people: what was mixed and what was dropped.
        revision: commit of the dataset's repository on the Hub.
    """

    train: Rows
    validation: Rows | None
    joined: bool
    columns: ColumnNames
    lines: tuple[str, ...] = ()
    revision: str | None = None


def row_sets(
    data: DataSettings,
    find: Callable[[dict[str, str]], ColumnNames],
    *,
    inputs: Sequence[str] | None = None,
    seed: int,
    pictures: bool = False,
) -> RowSets:
    """Open, choose columns, split, drop duplicates, limit.

    Args:
        data: which.
        find: given name -> type of the columns that exist, which of them the task reads and what it calls them.
        inputs: of those, by the task's names, what makes two rows the same; None: all of them.
        seed: of the split and of mixtures.
        pictures: the dataset holds pictures.

    Raises:
        DataError: what `find` raises; no data; all of the validation rows occur in the training data.
    """
    chosen: list[ColumnNames] = []

    def choose(rows: Rows) -> Rows:
        names = find(column_types(rows))
        chosen.append(names)
        rows = rows.select_columns(list(names))
        renamed = {old: new for old, new in names.items() if old != new}
        return rows.rename_columns(renamed) if renamed else rows

    lines: tuple[str, ...] = ()
    if data.dataset_mixture:
        source, lines = open_mixture(data, choose, seed=seed)
        train, validation = source.train, source.validation
    else:
        source = open_source(data, pictures=pictures)
        train = choose(source.train)
        validation = None if source.validation is None else choose(source.validation)
    inputs = tuple(chosen[0].values()) if inputs is None else inputs
    if validation is None:
        train, validation = _split(train, data, joined=source.joined, seed=seed, first=inputs[0])
    validation = None if validation is None else _limited(validation, data.max_eval_samples)
    train = _limited(train, data.max_train_samples)
    if validation is not None and data.dedup_validation and not source.joined:
        train, validation, dropped = _apart(train, validation, inputs, pictures=pictures, streaming=data.streaming)
        lines += dropped
    return RowSets(train, validation, source.joined, chosen[0], lines, source.revision)


def _limited(rows: Rows, limit: int | None) -> Rows:
    if limit is None:
        return rows
    return rows.select(range(min(limit, len(rows)))) if hasattr(rows, "__len__") else rows.take(limit)


def _split(rows: Rows, data: DataSettings, *, joined: bool, seed: int, first: str) -> tuple[Rows, Rows | None]:
    """Training and validation rows: of a table the seed draws what is held out, of a running text it is the end."""
    if data.validation_split_percentage == 0:
        return rows, None
    if data.streaming:
        count = data.max_eval_samples or STREAM_HELD_OUT
        return rows.skip(count), rows.take(count)
    count = len(rows)
    wanted = max(1, round(count * data.validation_split_percentage / 100))
    if count < 2:
        raise DataError(
            f"{count} row cannot be split in two: expected at least 2 to hold out "
            f"{data.validation_split_percentage:g} %. Give --validation_file, or --validation_split_percentage 0 for "
            "no evaluation."
        )
    if joined:
        order = list(range(count - 1, -1, -1))
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    if first == "text":
        # Blank rows are no text to evaluate on: go on until there is some, but leave something to train on.
        while wanted < count - 1 and not any(str(rows[i][first] or "").strip() for i in order[:wanted]):
            wanted += 1
    return rows.select(sorted(order[wanted:])), rows.select(sorted(order[:wanted]))


def _apart(
    train: Rows, validation: Rows, inputs: Sequence[str], *, pictures: bool, streaming: bool
) -> tuple[Rows, Rows, tuple[str, ...]]:
    """Both without rows that occur in both: dropped from the validation set, or from a stream, which cannot be searched
    beforehand."""
    if streaming:
        held = set(_keys(validation, inputs, pictures=pictures))
        if pictures:
            train = undecoded(train, inputs[0])
        return (
            train.filter(lambda row: _key_of([row[name] for name in inputs], pictures=pictures) not in held),
            validation,
            ("validation: its rows are left out of the stream wherever they occur again",),
        )
    held_keys = list(_keys(validation, inputs, pictures=pictures))
    wanted = set(held_keys)
    seen = {key for key in _keys(train, inputs, pictures=pictures) if key in wanted}
    kept = [number for number, key in enumerate(held_keys) if key not in seen]
    if len(kept) == len(held_keys):
        return train, validation, ()
    if not kept:
        raise DataError(
            f"all {len(held_keys)} validation rows occur in the training data: expected held-out ones. Give other "
            "rows, or --dedup_validation false to evaluate on these."
        )
    line = f"validation: {len(held_keys) - len(kept):,} of {len(held_keys):,} rows occur in the training data, dropped"
    return train, validation.select(kept), (line,)


def _keys(rows: Rows, inputs: Sequence[str], *, pictures: bool = False) -> Iterator[bytes]:
    rows = rows.select_columns(list(inputs))
    if pictures:
        rows = undecoded(rows, inputs[0])
    for batch in rows.iter(batch_size=16 if pictures else 1000):
        for values in zip(*(batch[name] for name in inputs), strict=True):
            yield _key_of(values, pictures=pictures)


def _key_of(values: Sequence[Any], *, pictures: bool) -> bytes:
    if pictures:
        return hashlib.blake2b(Stored.of(values[0], 0).content, digest_size=16).digest()
    text = json.dumps(list(values), ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
