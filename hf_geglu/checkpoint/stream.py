"""Writes shards: unchanged tensors as bytes, changed ones in pieces, so that memory does not grow with the
checkpoint."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from hf_geglu.checkpoint.layout import Output, Shard
from hf_geglu.checkpoint.stored import Span, bytes_of
from hf_geglu.conversions.precision import rounded
from hf_geglu.errors import WeightsError
from hf_geglu.files.folder import sync
from hf_geglu.files.header import nbytes

PIECE = 2**19
"""Bytes of a source tensor that are worked on at a time: what is made of them stays in a processor's cache (on larger
pieces the same arithmetic took four times as long)."""

COPY = 2**25
"""Bytes that are copied at a time, between two reports of progress."""

WORKERS = min(4, os.cpu_count() or 1)
"""Threads. More than a few gain nothing: memory and disk are what they wait for."""

Progress = Callable[[int], None]
"""Called with the number of bytes that have been written since the last call; from more than one thread."""

_CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY)


def write_shards(shards: Iterable[Shard], folder: Path, progress: Progress) -> None:
    """Write shards into a folder. Each has another name until it is complete and has reached the disk.

    While one shard is computed, the system copies what does not change in it, and brings the one before it to the disk.

    Raises:
        WeightsError: a tensor that changes holds NaN or infinity, or leaves the range of its dtype; or a source file
            became shorter meanwhile.
        OSError: as the system refuses a write.
    """
    with ThreadPoolExecutor(WORKERS) as pool, ThreadPoolExecutor(1) as closer:
        closing: Future[None] | None = None
        for shard in shards:
            draft = _write(shard, folder / f"{shard.name}.draft", pool, progress)
            if closing is not None:
                closing.result()
            closing = closer.submit(_close, draft, folder / shard.name)
        if closing is not None:
            closing.result()


def _write(shard: Shard, path: Path, pool: ThreadPoolExecutor, progress: Progress) -> Path:
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    pen = _Pen(handle, progress)
    tasks: list[Future[None]] = []
    try:
        data = pen.write(memoryview(shard.head), 0)
        copies = []
        for output, entry in zip(shard.outputs, shard.entries, strict=True):
            if output.copied and isinstance(output.source, Span):
                copies.append(_Copy(output.source.handle, output.source.offset, data + entry.start, output.nbytes))
            else:
                tasks.append(pool.submit(pen.change, output, data + entry.start))
        tasks += [pool.submit(pen.copy, copy) for copy in _dealt(_joined(copies))]
        for task in tasks:
            task.result()
    finally:
        pen.stop.set()
        wait(tasks)
        os.close(handle)
    return path


def _close(draft: Path, path: Path) -> None:
    """Bring a finished file to the disk and give it its name."""
    sync(draft)
    draft.rename(path)


@dataclass(frozen=True, slots=True)
class _Copy:
    source: int
    start: int
    target: int
    count: int


def _joined(copies: Iterable[_Copy]) -> list[_Copy]:
    """Copies that follow each other in both files, in one."""
    ordered = sorted(copies, key=lambda copy: copy.target)
    joined: list[_Copy] = ordered[:1]
    for before, copy in pairwise(ordered):
        last = joined[-1]
        alike = before.source == copy.source and copy.start - copy.target == last.start - last.target
        if alike and last.target + last.count == copy.target:
            joined[-1] = _Copy(last.source, last.start, last.target, last.count + copy.count)
        else:
            joined.append(copy)
    return joined


def _dealt(copies: Iterable[_Copy]) -> list[_Copy]:
    """Copies in pieces, so that several threads have something to do and progress is seen."""
    return [
        _Copy(copy.source, copy.start + done, copy.target + done, min(COPY, copy.count - done))
        for copy in copies
        for done in range(0, copy.count, COPY)
    ]


class _Pen:
    """Writes into one file, from several threads at different places."""

    def __init__(self, handle: int, progress: Progress) -> None:
        self._handle, self._progress = handle, progress
        self._in_kernel = hasattr(os, "copy_file_range")
        self._large = threading.Lock()
        self.stop = threading.Event()

    def write(self, view: memoryview, offset: int) -> int:
        """All of it; returns how much that was."""
        total = len(view)
        while len(view):
            count = os.pwrite(self._handle, view, offset)
            view, offset = view[count:], offset + count
        self._progress(total)
        return total

    def copy(self, copy: _Copy) -> None:
        """Bytes from one file to another, in the kernel where it can."""
        done = 0
        while done < copy.count and not self.stop.is_set():
            start, target, left = copy.start + done, copy.target + done, copy.count - done
            if self._in_kernel:
                try:
                    moved = os.copy_file_range(copy.source, self._handle, left, start, target)
                except OSError as error:
                    if error.errno not in _CANNOT:
                        raise
                    self._in_kernel = False
                    continue
                self._progress(moved)
            else:
                moved = self.write(memoryview(os.pread(copy.source, min(left, PIECE), start)), target)
            if not moved:
                raise WeightsError("a source file became shorter while it was read; run again")
            done += moved

    def change(self, output: Output, offset: int) -> None:
        """Compute a tensor in pieces along a dimension that its change leaves alone, and write them in their places."""
        change, source, shape = output.change, output.source, output.source.shape
        row, rows = nbytes(output.dtype, output.shape[1:]), shape[0] if shape else 1
        lengthens = change is not None and change.dim == 0 and len(shape) > 1 and output.shape[0] == 2 * rows
        cut = change is None or change.dim is None or change.rows is not None or (change.dim > 0 and len(shape) > 1)
        if not cut and not lengthens:
            with self._large:  # one at a time: they are whole in memory
                self.write(bytes_of(_by_columns(output)), offset)
            return
        for start, stop in _steps(shape, source.dtype):
            if self.stop.is_set():
                return
            new = _changed(output, source.rows(start, stop), (start, stop))
            # [gate | value] along the rows: each half of a piece belongs into its half of the tensor
            for half, piece in enumerate(new.chunk(2) if lengthens else (new,)):
                self.write(bytes_of(piece), offset + (start + half * rows) * row)


def _by_columns(output: Output) -> torch.Tensor:
    """A tensor that holds both branches one above the other."""
    source, shape = output.source, output.source.shape
    old = source.whole()
    if len(shape) < 2:
        return _changed(output, old)
    new = torch.empty(output.shape, dtype=output.dtype)
    for start, stop in _steps((shape[1], shape[0], *shape[2:]), source.dtype):
        new[:, start:stop] = _changed(output, old[:, start:stop])
    return new


def _changed(output: Output, piece: torch.Tensor, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """A piece after cast and change; which rows it is, unless it has all of them."""
    try:
        loaded, change = piece.to(output.cast), output.change
        if change is None:
            return rounded(loaded, output.cast)
        return (change.function if rows is None else change.of_rows(*rows))(loaded).contiguous()
    except WeightsError as error:
        if torch.isfinite(piece).all():
            raise WeightsError(f"{output.source.name}: {error}") from error
        raise WeightsError(
            f"{output.source.name} in {output.source.file} holds NaN or infinite values; nothing was converted. Check "
            "where the checkpoint comes from"
        ) from error


def _steps(shape: tuple[int, ...], dtype: torch.dtype) -> Iterable[tuple[int, int]]:
    rows = shape[0] if shape else 1
    each = max(1, PIECE // max(1, nbytes(dtype, shape[1:])))
    return ((start, min(start + each, rows)) for start in range(0, rows, each))
