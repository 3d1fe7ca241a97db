"""Files of tensors, written and read one tensor at a time, so that memory is bounded by the largest of them.

The format is safetensors. Where tensors are shared between processes, all of them write together: each tensor is
gathered, the main process puts it into the file, and it is forgotten. Reading takes no company: every process reads its
own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from hf_geglu.files.header import Entry, header_bytes, nbytes
from hf_geglu.training.processes.sharding import Spread, is_shared, part_of, whole

Held: TypeAlias = Tensor | Spread
"""A tensor, shared or not, or something that can be gathered to one."""


class FilesTogether:
    """Files that all processes make together: each hands over its shares, and the main one writes.

    Where that fails, for want of room, it goes on gathering with the others, who would wait for it for ever, and raises
    in `finish`.
    """

    def __init__(self, folder: Path, *, main: bool) -> None:
        """Into an existing folder."""
        self.folder, self._main = folder, main
        self._failure: Exception | None = None

    def alone(self, write: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Call what the main process writes by itself."""
        if self._main and self._failure is None:
            try:
                write(*arguments, **named)
            except Exception as error:  # whatever the libraries raise; handed on by `finish`
                self._failure = error

    def tensors(self, name: str, tensors: Mapping[str, Held]) -> None:
        """NAME.safetensors with these tensors, the same in the same order in every process."""
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # each begins aligned
        entries, end = [], 0
        for key, tensor in ordered:
            start, end = end, end + nbytes(tensor.dtype, tensor.shape)
            entries.append(Entry(key, tensor.dtype, tuple(tensor.shape), start, end))
        path = self.folder / f"{name}.safetensors"
        self.alone(path.write_bytes, header_bytes(entries, {"format": "pt"}))
        for _, tensor in ordered:
            if self._main or is_shared(tensor):
                full = whole(tensor) if isinstance(tensor, Tensor) else tensor.whole()
                self.alone(_append, path, full)

    def finish(self) -> None:
        """Raise what has gone wrong."""
        if self._failure is not None:
            raise self._failure


def _append(path: Path, tensor: Tensor) -> None:
    if tensor.numel():
        with path.open("ab") as file:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


class StoredTensor:
    """A tensor in a file; nothing of it is read before `part`."""

    def __init__(self, file: Any, name: str) -> None:
        """Reads its shape alone."""
        self._file, self._name = file, name
        self.shape = torch.Size(file.get_slice(name).get_shape())

    def part(self, like: Tensor) -> Tensor:
        """What this process holds of it, if it is dealt out as `like` is. It may be part of the mapped file."""
        if not self.shape or not is_shared(like):  # numbers cannot be sliced
            full: Tensor = self._file.get_tensor(self._name)
            return full
        return part_of(self._file.get_slice(self._name), like)


Source: TypeAlias = Tensor | StoredTensor
"""The whole of a tensor, in memory or in a file."""


def part(source: Source, like: Tensor) -> Tensor:
    """What this process holds of it, if it is dealt out as `like` is."""
    return source.part(like) if isinstance(source, StoredTensor) else part_of(source, like)


@contextmanager
def stored_tensors(*paths: Path) -> Iterator[Mapping[str, StoredTensor]]:
    """The tensors of these files by name, while the block lasts."""
    files: Iterable[Any] = [safe_open(path, framework="pt") for path in paths]
    yield {name: StoredTensor(file, name) for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
