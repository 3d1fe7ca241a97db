"""Tensors as they lie in a checkpoint: known by name, dtype and shape, read row by row, never all at once."""

from __future__ import annotations

import os
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_geglu.errors import WeightsError
from hf_geglu.files.header import Entry, nbytes
from hf_geglu.files.weights import WeightFiles, check_complete, check_place, read_headers

_COMPARED = 2**22
"""Bytes of two tensors that are compared at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored(ABC):
    """One tensor of a checkpoint."""

    name: str
    file: str
    """Name of the file that holds it."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size when it lies contiguously."""
        return nbytes(self.dtype, self.shape)

    @abstractmethod
    def rows(self, start: int, stop: int) -> torch.Tensor:
        """``tensor[start:stop]``, contiguous and in memory of its own. A tensor without dimensions has one row."""

    def whole(self) -> torch.Tensor:
        """All of it."""
        return self.rows(0, self.shape[0] if self.shape else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span(Stored):
    """A tensor that lies in one piece in an open file: bytes that can be copied."""

    handle: int
    offset: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read those bytes."""
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        size = nbytes(self.dtype, self.shape[1:])
        return read_tensor(self.handle, self.offset + start * size, self.dtype, shape, self.file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Stored):
    """A tensor that torch has mapped from a .bin; any strides."""

    tensor: torch.Tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Copy those rows."""
        piece = self.tensor[start:stop] if self.shape else self.tensor
        return piece.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeros(Stored):
    """What a bias is made of that only the converted block has. It lies beside its weight."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Make them."""
        return torch.zeros((stop - start, *self.shape[1:]), dtype=self.dtype)


@contextmanager
def open_checkpoint(weights: WeightFiles) -> Iterator[tuple[Stored, ...]]:
    """The tensors of a checkpoint, file by file in the order of their bytes. Usable inside the block.

    Raises:
        WeightsError: a file is damaged, or the files contradict each other or the index.
    """
    with ExitStack() as stack:
        if weights.format == "safetensors":
            yield tuple(_open_safetensors(weights, stack))
        else:
            yield tuple(_open_torch(weights))


def _open_safetensors(weights: WeightFiles, stack: ExitStack) -> Iterator[Stored]:
    for name, header in read_headers(weights).items():
        handle = os.open(weights.folder / name, os.O_RDONLY)
        stack.callback(os.close, handle)
        for entry in header.entries:
            yield span(name, handle, header.data, entry)


def span(file: str, handle: int, data: int, entry: Entry) -> Span:
    """A tensor of an open safetensors file whose data begin at `data`."""
    return Span(
        name=entry.name,
        file=file,
        dtype=entry.dtype,
        shape=entry.shape,
        handle=handle,
        offset=data + entry.start,
    )


def _open_torch(weights: WeightFiles) -> Iterator[Stored]:
    places: dict[str, str] = {}
    for path in weights.paths:
        for name, tensor in _load_torch(path).items():
            check_place(weights, places, name, path.name)
            yield Loaded(name=name, file=path.name, dtype=tensor.dtype, shape=tuple(tensor.shape), tensor=tensor)
    check_complete(weights, places)


def _load_torch(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .bin, mapped rather than read where its format allows (torch >= 1.6 wrote it)."""
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path.name} holds pickled objects other than tensors ({str(error).splitlines()[0][:120]}); it was not "
            "opened. Ask its owner for safetensors"
        ) from error
    except (RuntimeError, ValueError, TypeError, EOFError, OSError, KeyError, AttributeError, IndexError) as error:
        raise WeightsError(
            f"{path.name} is damaged ({type(error).__name__}: {str(error)[:120]}); download the checkpoint again"
        ) from error
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{path.name} holds no tensors by name; expected what torch.save(model.state_dict()) writes")
    odd = [name for name, value in content.items() if not (isinstance(name, str) and _plain(value))]
    if odd:
        raise WeightsError(
            f"{path.name} holds {str(odd[0])[:80]!r}, which is no plain tensor; expected what "
            "torch.save(model.state_dict()) writes"
        )
    return content


def _plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def same_numbers(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are equal, read piece by piece."""
    if one.shape != other.shape:
        return False
    rows = one.shape[0] if one.shape else 1
    step = max(1, _COMPARED * rows // max(1, one.nbytes))
    return all(
        torch.equal(one.rows(start, min(start + step, rows)), other.rows(start, min(start + step, rows)))
        for start in range(0, rows, step)
    )


def read_tensor(handle: int, offset: int, dtype: torch.dtype, shape: tuple[int, ...], file: str) -> torch.Tensor:
    """Bytes of an open file as a tensor. Raises WeightsError where the file has become shorter."""
    buffer = torch.empty(nbytes(dtype, shape), dtype=torch.uint8)
    view = bytes_of(buffer)
    while len(view):
        count = os.preadv(handle, [view], offset)
        if not count:
            raise WeightsError(f"{file} ends in the middle of a tensor; did another process change it? Run again")
        view, offset = view[count:], offset + count
    return buffer.view(dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's bytes, not copied."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
