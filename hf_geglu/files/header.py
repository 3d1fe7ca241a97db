"""The head of a safetensors file: read with distrust, written with care.

A file is 8 bytes of header length (little endian), a JSON header, and the bytes that the header lists, without holes
(safetensors, "Format"). Whatever is read here came from elsewhere, so each statement of a header is checked against the
file before anyone acts on it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hf_geglu.errors import WeightsError

MOST_HEADER_BYTES = 100_000_000
"""What the safetensors library allows, too."""

ALIGNMENT = 8
"""The library pads headers with spaces so that the data begins at a multiple of this."""

_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}
DTYPES: Mapping[str, torch.dtype] = MappingProxyType({name: dtype for dtype, name in _NAMES.items()})
"""The format's names of the dtypes that torch has. Others (packed 4- and 6-bit floats) are refused with their name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: `start` and `end` count from the beginning of the data, after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself, checked."""

    entries: tuple[Entry, ...]
    """In the order of their bytes."""
    metadata: Mapping[str, str]
    data: int
    """Offset of the first byte of data."""


def nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Bytes of a contiguous tensor."""
    return dtype.itemsize * math.prod(shape)


def rank(dtype: torch.dtype) -> int:
    """Where the safetensors library puts tensors of a dtype among others in a file: wide ones first, so that all are
    aligned. Tensors of one dtype are sorted by name."""
    return _ORDER[dtype]


def read_header(path: Path) -> Header:
    """The header of a safetensors file, after checking all it says against the length of the file.

    Reads the header only, and never more than `MOST_HEADER_BYTES`.

    Raises:
        WeightsError: the file is truncated or damaged; names the file and what is wrong with it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            if length is None or 8 + length > size:
                raise _damaged(path, "it is truncated inside its header")
            if length > MOST_HEADER_BYTES:
                raise _damaged(path, f"its header claims {length:,} bytes, where {MOST_HEADER_BYTES:,} are allowed")
            text = file.read(length)
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror or error})") from error
    entries, metadata = _parse(path, text)
    end = 0
    for entry in entries:
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise _damaged(path, f"{entry.name} {kind}")
        end = entry.end
    if 8 + length + end != size:
        raise _damaged(
            path, f"it has {size:,} bytes where its header promises {8 + length + end:,}: truncated or damaged"
        )
    return Header(entries, metadata, 8 + length)


def header_bytes(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Length, JSON and padding, ready to be followed by the data.

    Args:
        entries: in the order of their bytes, without holes.
        metadata: the file's own; transformers reads ``{"format": "pt"}``.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    for entry in entries:
        content[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def read_json(path: Path, *, most: int = MOST_HEADER_BYTES) -> Any:
    """A JSON file of a checkpoint. A name that occurs twice in one object is an error, not the last one's word.

    Raises:
        WeightsError: it cannot be read, is too large or is no JSON.
    """
    try:
        if path.stat().st_size > most:
            raise WeightsError(f"{path.name} has {path.stat().st_size:,} bytes, where {most:,} are allowed")
        text = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path.name} cannot be read ({error.strerror or error})") from error
    return parse_json(path.name, text)


def parse_json(name: str, text: bytes) -> Any:
    """`text` as JSON; `name` is for the error. Raises WeightsError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise WeightsError(f"{name} names {twice!r} twice; {_AGAIN}")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise WeightsError(f"{name} is damaged ({type(error).__name__}: {str(error)[:100]}); {_AGAIN}") from error


_AGAIN = "download the checkpoint again"


def _damaged(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{path.name} is damaged: {what}; {_AGAIN}")


def _parse(path: Path, text: bytes) -> tuple[tuple[Entry, ...], Mapping[str, str]]:
    content = parse_json(f"the header of {path.name}", text)
    if not isinstance(content, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "the metadata of its header are not texts")
    entries = [_entry(path, name, value) for name, value in content.items()]
    return tuple(sorted(entries, key=lambda entry: (entry.start, entry.end))), metadata


def _entry(path: Path, name: str, value: Any) -> Entry:
    match value:
        case {"dtype": str(dtype_name), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise _damaged(path, f"its header says nothing usable of {name!r}")
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in (*shape, start, end)):
        raise _damaged(path, f"its header gives {name!r} an impossible shape or place")
    dtype = DTYPES.get(dtype_name)
    if dtype is None:
        raise WeightsError(
            f"{name} in {path.name} has the dtype {dtype_name[:40]!r}, which torch {torch.__version__} cannot hold; "
            "convert a checkpoint in float32, bfloat16 or float16"
        )
    if end - start != nbytes(dtype, shape):
        raise _damaged(
            path, f"its header gives {name!r} {end - start:,} bytes, its shape needs {nbytes(dtype, shape):,}"
        )
    return Entry(name, dtype, tuple(shape), start, end)
