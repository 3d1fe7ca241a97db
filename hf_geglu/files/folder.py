"""A folder that is there completely or not at all, whatever happens to the process that writes it.

What is being written lies in a hidden workplace beside the target, under a name that the next attempt finds again, and
gets its own name in one step at the end. A workplace whose process was killed is taken over by the next one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hf_geglu.errors import HfGegluError, OutputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The folder as a path, if it may be written. Creates nothing.

    Raises:
        OutputError: it is a file, or it is not empty and `overwrite` is off.
    """
    target = Path(folder)
    if target.is_symlink() and not target.exists():
        raise OutputError(f"{target.name} is a symbolic link to nothing; remove it, or choose another output folder")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target.name} is a file; expected a folder to write to")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise OutputError(f"the output folder {target.name} is not empty; choose another one, or say --overwrite")
    return target


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where a folder is made: ``.NAME.partial/`` beside it, held by one process at a time."""

    target: Path
    root: Path

    @property
    def folder(self) -> Path:
        """What will become the target."""
        return self.root / "folder"

    def place(self) -> None:
        """Give the finished folder its name, in place of what had it before. Files must have reached the disk."""
        sync_tree(self.folder)
        if self.target.is_dir() and not _exchange(self.folder, self.target):
            old = self.root / "old"
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)
            self.folder.rename(self.target)
        elif not self.target.is_dir():
            self.folder.rename(self.target)
        sync(self.target.parent)

    def clear(self) -> None:
        """Remove the workplace. A target that was set aside for the new one and never replaced is put back."""
        old = self.root / "old"
        if old.is_dir() and not self.target.exists():
            old.rename(self.target)
        shutil.rmtree(self.root, ignore_errors=True)


@contextmanager
def workplace(target: Path) -> Iterator[Workplace]:
    """The workplace of a target, with whatever a killed process has left in it; nobody else gets in meanwhile.

    Raises:
        OutputError: another process is writing the same folder.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    root = target.parent / f".{target.name}.partial"
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise OutputError(f"{root.name} beside the output folder is in the way; remove it")
    root.mkdir(exist_ok=True)
    lock = FileLock(root / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"another process is writing {target.name} at this moment; wait for it, or choose another output folder"
        ) from error
    try:
        yield Workplace(target, root)
    finally:
        lock.release()


@contextmanager
def whole_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its place when the block ends well and vanishes when it does not.

    With `overwrite` a folder of that name is replaced as a whole, after the new one is complete.

    Raises:
        OutputError: see `check_output`; or another process is writing the same folder.
    """
    target = check_output(folder, overwrite=overwrite)
    with workplace(target) as place:
        try:
            shutil.rmtree(place.folder, ignore_errors=True)
            place.folder.mkdir()
            yield place.folder
            place.place()
        finally:
            place.clear()


@contextmanager
def said_when_full(say: Callable[[str], OutputError]) -> Iterator[None]:
    """Turn the system's refusal to write more into a sentence.

    Args:
        say: the error, given the words of the system.

    Raises:
        OutputError: the disk, the quota or the largest size of a file is exhausted.
    """
    try:
        yield
    except Exception as error:
        reason = why_full(error)
        if reason is None:
            raise
        raise say(reason) from error


def why_full(error: BaseException) -> str | None:
    """In the words of the system, if this is its refusal to write more; None for any other error.

    Safetensors and tokenizers, written in Rust, raise errors of their own with the number in the text.
    """
    if isinstance(error, HfGegluError):
        return None
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def sync_tree(folder: Path) -> None:
    """Everything in a folder reaches the disk: a power cut leaves no complete-looking folder."""
    for path in folder.rglob("*"):
        if path.is_file() or path.is_dir():
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """A file, or the names in a folder, reach the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system can (Linux: renameat2); False where it cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
