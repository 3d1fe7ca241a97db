"""A conversion that can be killed: what is finished is found again, what is half done is not trusted.

.NAME.partial/         the workplace beside the target (see `folder`)
  job.json             which conversion this is, and whether it was about to get its name
  folder/              what will be the target; a shard is there under its own name once it is whole and on the disk
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_geglu.checkpoint.layout import Shard
from hf_geglu.errors import OutputError
from hf_geglu.files.folder import Workplace

_STATE = "job.json"


def fingerprint(shards: Sequence[Shard], sources: Iterable[Path], settings: dict[str, Any]) -> str:
    """Tells two conversions apart: what is written, from which files, with which plan and versions."""
    digest = hashlib.sha256()
    for path in sources:
        found = path.stat()
        digest.update(json.dumps([path.name, found.st_size, found.st_mtime_ns]).encode())
    for shard in shards:
        digest.update(shard.name.encode() + shard.head)
        for output in shard.outputs:
            digest.update(
                json.dumps([output.source.file, output.source.name, str(output.cast), output.copied]).encode()
            )
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion in its workplace."""

    place: Workplace
    fingerprint: str
    shards: tuple[Shard, ...]

    def begin(self) -> bool:
        """Take up what an attempt before has left if it is the same conversion, else start anew.

        Returns:
            True where the attempt before had come to its end and only lacked the tidying up.
        """
        state = _read(self.place.root / _STATE)
        if state.get("fingerprint") == self.fingerprint:
            if state.get("placing") and self._complete(self.place.target):
                return True
            if self.place.folder.is_dir() and not self.place.folder.is_symlink():
                return False
        shutil.rmtree(self.place.folder, ignore_errors=True)
        self.place.folder.mkdir()
        self._note(placing=False)
        return False

    def pending(self) -> list[Shard]:
        """The shards that are still to be written."""
        return [shard for shard in self.shards if not _whole(self.place.folder / shard.name, shard)]

    def check_room(self, shards: Iterable[Shard]) -> None:
        """Raises OutputError where the disk cannot hold these shards."""
        needed = sum(shard.nbytes for shard in shards)
        free = shutil.disk_usage(self.place.root).free
        if needed > free:
            raise OutputError(
                f"no room beside {self.place.target.name}: {needed:,} bytes are needed, {free:,} are free. Make "
                "room, or choose another place"
            )

    def sweep(self, files: Iterable[str]) -> None:
        """Remove what is in the folder besides the shards and `files`: drafts of an attempt before."""
        expected = {*(shard.name for shard in self.shards), *files}
        for path in sorted(self.place.folder.rglob("*"), reverse=True):
            if not path.is_dir() and path.relative_to(self.place.folder).as_posix() not in expected:
                path.unlink()

    def finish(self) -> None:
        """Give the folder its name."""
        self._note(placing=True)
        self.place.place()

    def _complete(self, folder: Path) -> bool:
        return (folder / "config.json").is_file() and all(_whole(folder / shard.name, shard) for shard in self.shards)

    def _note(self, *, placing: bool) -> None:
        draft = self.place.root / f"{_STATE}.draft"
        draft.write_text(json.dumps({"fingerprint": self.fingerprint, "placing": placing}), encoding="utf-8")
        draft.replace(self.place.root / _STATE)


def _whole(path: Path, shard: Shard) -> bool:
    """A file gets a shard's name when it is whole; its length and head are looked at all the same."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.pread(handle, len(shard.head), 0) == shard.head
    finally:
        os.close(handle)


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def left_to_tidy(target: Path) -> bool:
    """Whether an attempt before was killed when it was about to give the folder its name, or just had."""
    target = target.resolve()
    return bool(_read(target.parent / f".{target.name}.partial" / _STATE).get("placing"))
