"""Rows from wherever they are: Hub dataset, csv, tsv, json, jsonl, txt, parquet, a folder of them, a saved dataset, a
folder of pictures.

Rows of a table are documents. A txt file is one running text unless told otherwise: its lines are joined again, so
that no end-of-text token cuts a paragraph that was merely wrapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.settings.data import DataSettings

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
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
VALIDATION_NAMES = ("validation", "valid", "val", "dev")

_COMMIT = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")

Rows: TypeAlias = Any
"""`datasets.Dataset` or `datasets.IterableDataset`."""


@dataclass(frozen=True)
class Source:
    """Rows and how to read them.

    Attributes:
        train, validation: rows; no validation where the source has none.
        joined: the rows are lines of one running text.
        revision: commit of the dataset's repository on the Hub, where `datasets` says it.
    """

    train: Rows
    validation: Rows | None
    joined: bool
    revision: str | None = None


def open_source(data: DataSettings, *, pictures: bool = False) -> Source:
    """The dataset or the files that the settings name. A mixture is opened source by source (`mixture`).

    Raises:
        DataError: no such data, or none in it.
        ConfigurationError: `datasets` is not installed.
    """
    what = data.dataset_name or " ".join(Path(name).name for name in data.train_file or ())
    with readable(what):
        if data.train_file:
            rows, joined = _read_files(data.train_file, data, pictures=pictures)
            source = Source(rows, None, joined)
        else:
            source = _open_named(data, pictures=pictures)
        if data.validation_file and source.validation is None:
            source = Source(source.train, validation_rows(data, joined=source.joined, pictures=pictures), source.joined)
        if not data.streaming and len(source.train) == 0:
            raise DataError(f"{what} has no rows: expected some. Give another dataset.")
    return Source(source.train, source.validation, source.joined, hub_revision(source.train))


def validation_rows(data: DataSettings, *, joined: bool, pictures: bool = False) -> Rows:
    """What --validation_file names.

    Raises:
        DataError: another kind than the training data.
    """
    rows, lines = _read_files(data.validation_file or [], data, pictures=pictures)
    if lines != joined:
        raise DataError(
            "training text and validation text, one of them txt files and the other a table: expected the same kind. "
            "Add --text_unit line for txt files with one document a line."
        )
    return rows


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn what `datasets` raises about data that it cannot find or read into one of our errors."""
    try:
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigurationError(
            "datasets is not installed: expected it for reading data. Run: pip install 'hf_geglu[train]'"
        ) from error
    try:
        yield
    except (DatasetsError, OSError, UnicodeDecodeError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{what} cannot be read: {first_line(cause)} Expected the name of a dataset on the Hub, or existing csv, "
            "json, jsonl, txt or parquet files in UTF-8."
        ) from error


def first_line(error: BaseException) -> str:
    """Of its message, as a sentence."""
    text = str(error).strip().split("\n")[0].rstrip(".")
    return f"{text or type(error).__name__}."


def hub_revision(rows: Rows) -> str | None:
    """The commit of a dataset's repository, out of the addresses that `datasets` read: hf://datasets/NAME@COMMIT/FILE."""
    checksums = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    commits = {match[1] for address in checksums if (match := _COMMIT.match(str(address)))}
    return commits.pop() if len(commits) == 1 else None


def column_types(rows: Rows) -> dict[str, str]:
    """Name -> type as `datasets` writes it, such as "string" or "int64"."""
    if rows.features is not None:
        return {name: str(getattr(kind, "dtype", None) or kind) for name, kind in rows.features.items()}
    first: dict[str, Any] = next(iter(rows), {})  # a stream knows its columns only when it has been read
    return {name: "string" if isinstance(value, str) else type(value).__name__ for name, value in first.items()}


def _read_files(names: Iterable[str], data: DataSettings, *, pictures: bool) -> tuple[Rows, bool]:
    """Rows of all these files, which must be of one kind; and whether they are lines of a running text."""
    from datasets import load_dataset

    names = list(names)
    if pictures and not all(_ending(Path(name)) == ".parquet" for name in names):
        folders = [str(_picture_folder(Path(name))) for name in names]
        if len(folders) == 1:
            options = {"data_dir": folders[0], "drop_labels": False}
            return load_dataset("imagefolder", split="train", streaming=data.streaming, **options), False
        raise DataError(f"{len(folders)} folders of pictures: expected one, with a folder for each class in it.")
    files = [file for name in names for file in _expand(Path(name))]
    kinds = {_reader(file)[0] for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"files of several kinds ({', '.join(sorted(kinds))}): expected one kind. Give one kind at a time, or a "
            "--dataset_mixture."
        )
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file.name} is empty: expected text. Leave it out, or check how it was made.")
    builder, options = _reader(files[0])
    options = {**options, **_text_options(builder, data)}
    paths = [str(file) for file in files]
    rows = load_dataset(builder, data_files={"train": paths}, split="train", streaming=data.streaming, **options)
    return rows, builder == "text" and data.text_unit == "file"


def _picture_folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(f"{path.name} is no folder: expected one with a folder of pictures for each class.")
    if not any(file.suffix.lower() in PICTURES for file in path.rglob("*")):
        raise DataError(f"the folder {path.name} holds no pictures: expected {', '.join(sorted(PICTURES))}.")
    return path


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


def _open_named(data: DataSettings, *, pictures: bool) -> Source:
    """A dataset with splits: from the Hub, a folder of files, or a folder that `save_to_disk` wrote."""
    from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

    name = data.dataset_name or ""
    path = Path(name)
    joined = False
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = load_from_disk(name)
    else:
        options: dict[str, Any] = {}
        if path.is_dir() and pictures:
            _picture_folder(path)
        elif path.is_dir():
            # For its errors, and to learn whether this is a running text.
            builder = {_reader(file)[0] for file in _expand(path)}
            if builder == {"text"}:
                options = _text_options("text", data)
                joined = data.text_unit == "file"
        try:
            loaded = load_dataset(
                name, data.dataset_config_name, revision=data.dataset_revision, streaming=data.streaming, **options
            )
        except ValueError as error:  # an unknown configuration; the message lists those that exist
            raise DataError(f"{name}: {first_line(error)} Give --dataset_config_name.") from error
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
    return Source(loaded[data.dataset_train_split], validation, joined)
