"""Text from wherever it is, as blocks of tokens: Hub dataset, csv, tsv, json, jsonl, txt, parquet, a folder of them,
a saved dataset.

Rows of a table are documents. A txt file is one running text unless told otherwise: its lines are joined again, so
that no end-of-text token cuts a paragraph that was merely wrapped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.batches import Blocks
from hf_geglu.training.objectives import Task
from hf_geglu.training.packing import Packing, Tally, TokenBlocks, pack, packing_for, require_blocks, tokenise
from hf_geglu.training.settings import DataSettings

READERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
"""File name ending -> builder of `datasets` and its options."""

COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst"})
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
STREAM_HELD_OUT = 256
"""Rows at the head of a stream that are evaluated on where there is no validation set and no --max_eval_samples."""

_COMMIT = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")

Rows: TypeAlias = Any
"""`datasets.Dataset` or `datasets.IterableDataset`."""


@dataclass(frozen=True)
class Corpus:
    """Blocks to train and evaluate on.

    Attributes:
        train: blocks of equal length (unless one each document); a stream of them with --streaming.
        validation: the same, the last one perhaps shorter; None without an evaluation.
        lines: for people: what was read, what was dropped.
        column: where the text was.
        revision: commit of the dataset's repository on the Hub; None for local files, or where `datasets` does not say.
    """

    train: Blocks
    validation: TokenBlocks | None
    lines: tuple[str, ...]
    column: str
    revision: str | None = None


@dataclass(frozen=True)
class _Source:
    """Rows and how to read them. joined: the rows are lines of one running text."""

    train: Rows
    validation: Rows | None
    joined: bool


def find_text_column(columns: Mapping[str, str], wanted: str | None = None) -> str:
    """The column with the text, given all columns and their types.

    Args:
        columns: name -> type as `datasets` writes it, such as "string" or "int64".
        wanted: the one that the user named.

    Raises:
        DataError: it is not there, holds no text, or there are several to choose from.
    """
    exist = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"
    texts = [name for name, kind in columns.items() if kind in ("string", "large_string", "string_view")]
    if wanted is not None:
        if wanted not in columns:
            raise DataError(
                f"--text_column {wanted}: expected one of the columns that exist: {exist}. Name one of them."
            )
        if wanted not in texts:
            raise DataError(f"--text_column {wanted} holds {columns[wanted]}: expected text. The columns: {exist}.")
        return wanted
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        return texts[0]
    if not texts:
        raise DataError(f"a dataset without text: expected a column of strings. The columns that exist: {exist}.")
    raise DataError(
        f"{len(texts)} columns hold text and none is called text: expected to know which. Say --text_column "
        f"{' or --text_column '.join(texts)}."
    )


def load_corpus(data: DataSettings, tokenizer: Any, *, task: Task, block_size: int, seed: int) -> Corpus:
    """Read, split, tokenise and pack.

    Raises:
        DataError: no such data, no text in it, or less than one block of it.
        ConfigurationError: `datasets` is not installed.
    """
    source = _open(data)
    column = find_text_column(_columns(source.train), data.text_column)
    revision = hub_revision(source.train)
    train, validation = _split(source, column, data, seed=seed)
    joined = source.joined and not data.line_by_line
    packing = packing_for(task, tokenizer, block_size=block_size, one_each=data.line_by_line, joined=joined)

    def blocks(rows: Rows, tally: Tally, *, keep_tail: bool) -> Iterator[list[int]]:
        texts = _texts(rows, column, joined=joined, tally=tally)
        return pack(tokenise(texts, tokenizer, batch=16 if joined else 256), packing, tally, keep_tail=keep_tail)

    lines = []
    held: TokenBlocks | None = None
    if validation is not None:
        validation = _first(validation, data.max_eval_samples)
        tally = Tally()
        held = TokenBlocks.of(blocks(validation, tally, keep_tail=True))
        if not len(held):
            raise DataError(
                f"a validation set of {tally.documents} rows without text: expected some. Give --validation_file, or "
                "--validation_split_percentage 0 for no evaluation."
            )
        lines.append(tally.line("validation"))
    else:
        lines.append("validation: none, so there is no evaluation")
    train = _first(train, data.max_train_samples)
    if data.streaming:
        stream = StreamedBlocks(lambda: blocks(train, Tally(), keep_tail=False))
        _require_first_block(stream, packing)
        return Corpus(stream, held, ("training: a stream, read in its own order", *lines), column, revision)
    tally = Tally()
    packed = TokenBlocks.of(blocks(train, tally, keep_tail=False))
    require_blocks(tally, packing)
    return Corpus(packed, held, (tally.line("training"), *lines), column, revision)


def hub_revision(rows: Rows) -> str | None:
    """The commit of a dataset's repository, out of the addresses that `datasets` read: hf://datasets/NAME@COMMIT/FILE."""
    checksums = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    commits = {match[1] for address in checksums if (match := _COMMIT.match(str(address)))}
    return commits.pop() if len(commits) == 1 else None


@dataclass(frozen=True)
class StreamedBlocks:
    """Blocks made while they are read; each iteration reads the data anew."""

    read: Callable[[], Iterator[list[int]]] = field(repr=False)

    def __iter__(self) -> Iterator[list[int]]:
        return self.read()


def _require_first_block(stream: StreamedBlocks, packing: Packing) -> None:
    if next(iter(stream), None) is None:
        raise DataError(
            f"a stream with less than {packing.room} tokens: expected at least one block. Lower --block_size."
        )


def _open(data: DataSettings) -> _Source:
    try:
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigurationError(
            "datasets is not installed: expected it for reading text. Run: pip install 'hf_geglu[train]'"
        ) from error
    what = data.dataset_name or " ".join(Path(name).name for name in data.train_file or ())
    try:
        source = _open_files(data) if data.train_file else _open_named(data)
        if data.validation_file and source.validation is None:
            validation, joined = _read_files(data.validation_file, data)
            if joined != source.joined:
                raise DataError(
                    "training text and validation text, one of them txt files and the other a table: expected the "
                    "same kind. Add --text_unit line for txt files with one document a line."
                )
            source = _Source(source.train, validation, joined)
        if not data.streaming and len(source.train) == 0:
            raise DataError(f"{what} has no rows: expected text. Give another dataset.")
    except (DatasetsError, OSError, UnicodeDecodeError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{what} cannot be read: {_first_line(cause)} Expected the name of a dataset on the Hub, or existing csv, "
            "json, jsonl, txt or parquet files in UTF-8."
        ) from error
    return source


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0].rstrip(".")
    return f"{text or type(error).__name__}."


def _open_files(data: DataSettings) -> _Source:
    rows, joined = _read_files(data.train_file or [], data)
    return _Source(rows, None, joined)


def _read_files(names: Iterable[str], data: DataSettings) -> tuple[Rows, bool]:
    """Rows of all these files, which must be of one kind; and whether they are lines of a running text."""
    from datasets import load_dataset

    files = [file for name in names for file in _expand(Path(name))]
    kinds = {_reader(file)[0] for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"files of several kinds ({', '.join(sorted(kinds))}): expected one kind. Give one kind at a time."
        )
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file.name} is empty: expected text. Leave it out, or check how it was made.")
    builder, options = _reader(files[0])
    options = {**options, **_text_options(builder, data)}
    paths = [str(file) for file in files]
    rows = load_dataset(builder, data_files={"train": paths}, split="train", streaming=data.streaming, **options)
    return rows, builder == "text" and data.text_unit == "file"


def _expand(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path.name} does not exist: expected a file or a folder of files. Check the path.")
    if not path.is_dir():
        _reader(path)
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and _ending(file) in READERS)
    if not found:
        raise DataError(f"the folder {path.name} holds no {', '.join(READERS)} files: expected some. Check the path.")
    return found


def _ending(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _reader(path: Path) -> tuple[str, dict[str, Any]]:
    if _ending(path) not in READERS:
        raise DataError(f"{path.name}: expected a file that ends in {', '.join(READERS)}. Rename or convert it.")
    return READERS[_ending(path)]


def _text_options(builder: str, data: DataSettings) -> dict[str, Any]:
    if builder != "text":
        return {}
    if data.text_unit == "paragraph":
        return {"sample_by": "paragraph"}
    return {"sample_by": "line", "keep_linebreaks": data.text_unit == "file"}


def _open_named(data: DataSettings) -> _Source:
    """A dataset with splits: from the Hub, a folder of files, or a folder that `save_to_disk` wrote."""
    from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

    name = data.dataset_name or ""
    path = Path(name)
    joined = False
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = load_from_disk(name)
    else:
        options: dict[str, Any] = {}
        if path.is_dir():
            # For its errors, and to learn whether this is a running text.
            builder = {_reader(file)[0] for file in _expand(path)}
            if builder == {"text"}:
                options = _text_options("text", data)
                joined = data.text_unit == "file"
        try:
            loaded = load_dataset(name, data.dataset_config_name, streaming=data.streaming, **options)
        except ValueError as error:  # an unknown configuration; the message lists those that exist
            raise DataError(f"{name}: {_first_line(error)} Give --dataset_config_name.") from error
    if not isinstance(loaded, DatasetDict | IterableDatasetDict):
        loaded = {data.dataset_train_split: loaded}
    splits = ", ".join(loaded)
    for split in (data.dataset_train_split, data.dataset_test_split):
        if split is not None and split not in loaded:
            raise DataError(
                f"{name} has no split {split}: expected one of {splits}. Name it with --dataset_train_split."
            )
    chosen = data.dataset_test_split or next((split for split in VALIDATION_NAMES if split in loaded), None)
    validation = loaded[chosen] if chosen and not data.validation_file else None
    return _Source(loaded[data.dataset_train_split], validation, joined)


def _columns(rows: Rows) -> dict[str, str]:
    if rows.features is not None:
        return {name: str(getattr(kind, "dtype", None) or kind) for name, kind in rows.features.items()}
    first: dict[str, Any] = next(iter(rows), {})  # a stream knows its columns only when it has been read
    return {name: "string" if isinstance(value, str) else type(value).__name__ for name, value in first.items()}


def _first(rows: Rows, limit: int | None) -> Rows:
    if limit is None:
        return rows
    return rows.select(range(min(limit, len(rows)))) if hasattr(rows, "__len__") else rows.take(limit)


def _texts(rows: Rows, column: str, *, joined: bool, tally: Tally) -> Iterator[str | None]:
    for batch in rows.select_columns([column]).iter(batch_size=1000):
        if joined:
            tally.lines += len(batch[column])
            yield "".join(line or "" for line in batch[column])
        else:
            yield from batch[column]


def _split(source: _Source, column: str, data: DataSettings, *, seed: int) -> tuple[Rows, Rows | None]:
    """Training and validation rows: of a table the seed draws what is held out, of a running text it is the end."""
    if source.validation is not None or data.validation_split_percentage == 0:
        return source.train, source.validation
    if data.streaming:
        count = data.max_eval_samples or STREAM_HELD_OUT
        return source.train.skip(count), source.train.take(count)
    rows = source.train.select_columns([column])
    count = len(rows)
    wanted = max(1, round(count * data.validation_split_percentage / 100))
    if count < 2:
        raise DataError(
            f"{count} row cannot be split in two: expected at least 2 to hold out "
            f"{data.validation_split_percentage:g} %. Give --validation_file, or --validation_split_percentage 0 for "
            "no evaluation."
        )
    if source.joined:
        order = list(range(count - 1, -1, -1))
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    # Blank rows are no text to evaluate on: go on until there is some, but leave something to train on.
    while wanted < count - 1 and not any((rows[i][column] or "").strip() for i in order[:wanted]):
        wanted += 1
    held = sorted(order[:wanted])
    kept = sorted(order[wanted:])
    return rows.select(kept), rows.select(held)
