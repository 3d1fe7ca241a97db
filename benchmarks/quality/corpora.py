"""The text that quality is measured on: two domains, one of which the calibrations here never see.

library     documentation of Python's standard library (hf_geglu.demo.text); calibration takes its training side
prose       An Anarchist FAQ, 10 MB of prose, as Debian packages it (`anarchism`)
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

from filelock import FileLock

from hf_geglu.demo.text import stdlib_corpus
from hf_geglu.demo.wheels import cache_root
from hf_geglu.errors import DataError
from hf_geglu.files import whole_folder

PACKAGE, SHA256 = "anarchism=15.3-3", "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948"
SHORTEST = 60
"""Characters of the shortest paragraph that is prose rather than a heading."""


def library(side: str) -> tuple[str, ...]:
    """Documents of the standard library, "train" or "held_out"."""
    corpus = stdlib_corpus()
    return corpus.train if side == "train" else corpus.held_out


def prose(seed: int = 0) -> tuple[str, ...]:
    """Documents of the Debian package in a fixed order."""
    documents = [_paragraphs(path) for path in sorted(_folder().rglob("*.html"))]
    texts = ["\n\n".join(found) for found in documents if len(found) > 5]
    random.Random(seed).shuffle(texts)
    return tuple(texts)


def sentences(texts: tuple[str, ...], count: int, seed: int = 0) -> list[str]:
    """Single paragraphs of at most 400 characters, drawn from many documents."""
    found = [part.strip() for text in texts for part in text.split("\n\n") if SHORTEST <= len(part.strip()) <= 400]
    random.Random(seed).shuffle(found)
    return found[:count]


def _folder() -> Path:
    """The unpacked package, downloaded with apt once and checked."""
    shelf = cache_root() / "corpora"
    folder = shelf / PACKAGE.replace("=", "-")
    if folder.is_dir():
        return folder
    shelf.mkdir(parents=True, exist_ok=True)
    with FileLock(shelf / ".lock"), tempfile.TemporaryDirectory() as scratch:
        if folder.is_dir():
            return folder
        try:
            command = ["apt-get", "download", "--quiet", PACKAGE]
            subprocess.run(command, cwd=scratch, check=True, capture_output=True)
            (package,) = Path(scratch).glob("*.deb")
            digest = hashlib.sha256(package.read_bytes()).hexdigest()
            if digest != SHA256:
                raise DataError(f"{package.name} has sha256 {digest}, expected {SHA256}; nothing was unpacked")
            with whole_folder(folder) as target:
                subprocess.run(["dpkg", "-x", str(package), str(target)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"the Debian package {PACKAGE} could not be had ({error}); expected apt-get and dpkg, and a mirror"
            ) from error
    return folder


class _Paragraphs(HTMLParser):
    """The text of block elements."""

    blocks = frozenset({"p", "li", "blockquote", "td", "h1", "h2", "h3", "h4"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.current: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """A block begins, and ends the one before."""
        if tag in self.blocks:
            self.flush()
            self.current = []

    def handle_endtag(self, tag: str) -> None:
        """A block ends."""
        if tag in self.blocks:
            self.flush()

    def handle_data(self, data: str) -> None:
        """Text within it."""
        if self.current is not None:
            self.current.append(data)

    def flush(self) -> None:
        """Keep what is long enough."""
        text = " ".join("".join(self.current or ()).split())
        if len(text) >= SHORTEST:
            self.found.append(text)
        self.current = None


def _paragraphs(path: Path) -> list[str]:
    parser = _Paragraphs()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.flush()
    return parser.found
