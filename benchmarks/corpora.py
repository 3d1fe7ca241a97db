"""Real English text of several domains, out of packages that anybody can download, to calibrate and to measure on.

    library    documentation inside Python's standard library (`hf_geglu.demo.text`): technical, short paragraphs
    prose      the Debian package `anarchism`: 10 MB of essays
    manuals    the Debian packages developers-reference, maint-guide and debian-faq: instructions
    glosses    the Debian package wordnet-base: definitions of English words, and examples of their use
    computing  the Debian package dict-foldoc: entries of a dictionary of computing

A .deb is an `ar` archive whose member data.tar.xz holds the files. It is downloaded once and checked by its SHA-256;
nothing in it is installed or run.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import islice
from typing import Literal

from hf_geglu.demo.text import Corpus, Document, split, stdlib_documents, without_repeats
from hf_geglu.demo.wheels import cache_root

POOL = "https://deb.debian.org/debian/pool/main/"


@dataclass(frozen=True)
class Package:
    """A .deb of the Debian archive, and which of its files are text."""

    path: str
    """Below the pool."""
    sha256: str
    files: str
    """Regular expression that a whole member name must match; each such file is one group of documents."""
    form: Literal["pages", "glosses", "entries"] = "pages"
    """HTML; WordNet's data files, a line a meaning; a dictionary of dictd, gzipped. The last two are cut into
    groups."""


PACKAGES = {
    "prose": (
        Package(
            "a/anarchism/anarchism_15.3-3_all.deb",
            "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
            r".*/anarchism/html/(sec|append)\w+\.html",
        ),
    ),
    "manuals": (
        Package(
            "d/developers-reference/developers-reference_12.18_all.deb",
            "0dba82f6fa16e373f2a84ad07e7971aa9264ad2e7d2ae46b37edbc9c5fd57e2e",
            r"\./usr/share/developers-reference/(?!developers-reference|genindex|search)[\w-]+\.html",
        ),
        Package(
            "m/maint-guide/maint-guide_1.2.53_all.deb",
            "762c8a400a36668d2eb814a3ba356b06488fd889dfce478eb11d5cfb189a47b5",
            r".*/html/\w+\.en\.html",
        ),
        Package(
            "d/debian-faq/debian-faq_11.1_all.deb",
            "427426e0cfa6888622fc1d72631071cb4b5a1f86ccde722e7820bcef284de5d0",
            r".*/FAQ/(?!index)[\w-]+\.en\.html",
        ),
    ),
    "glosses": (
        Package(
            "w/wordnet/wordnet-base_3.0-37_all.deb",
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            r".*/wordnet/data\.\w+",
            "glosses",
        ),
    ),
    "computing": (
        Package(
            "d/dict-foldoc/dict-foldoc_20230119-1_all.deb",
            "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
            r".*/foldoc\.dict\.dz",
            "entries",
        ),
    ),
}


def corpus(domain: str, *, held_out: float = 0.2, seed: int = 0) -> Corpus:
    """Text of one domain, split by whole files and shuffled; the same arguments give the same text.

    Args:
        domain: "library", or one of `PACKAGES`.
        held_out: share of the characters to hold out.
        seed: of the split and of the order.
    """
    return split(documents(domain), held_out=held_out, seed=seed)


def documents(domain: str) -> list[Document]:
    """The documents of a domain in a fixed order, each paragraph once."""
    if domain == "library":
        return stdlib_documents()
    found = [document for package in PACKAGES[domain] for document in _documents(package)]
    return list(without_repeats(found))


def _documents(package: Package) -> Iterator[Document]:
    with tarfile.open(fileobj=io.BytesIO(_member(_download(package), "data.tar.xz"))) as archive:
        for member in sorted(archive, key=lambda member: member.name):
            file = archive.extractfile(member) if re.fullmatch(package.files, member.name) else None
            if file is not None and package.form == "pages":
                reader = _Paragraphs()
                reader.feed(file.read().decode("utf-8", errors="replace"))
                for section in reader.sections():
                    yield Document(member.name, section)
            elif file is not None:
                read = _glosses if package.form == "glosses" else _entries
                for number, paragraphs in enumerate(batched(read(file.read()), 100)):
                    yield Document(f"{member.name} {number}", "\n\n".join(paragraphs))


def _glosses(content: bytes) -> Iterator[str]:
    """Behind the bar of each line: a definition, then examples in quotes."""
    for line in content.decode("utf-8", errors="replace").splitlines():
        gloss = line.partition("|")[2].strip()
        for sentence in (gloss.partition(";")[0], *re.findall(r'"([^"]+)"', gloss)):
            if sentence:
                yield f"{sentence[0].upper()}{sentence[1:].rstrip('.')}."


def _entries(content: bytes) -> Iterator[str]:
    """Paragraphs; braces mark what other entries explain."""
    text = re.sub(r"[{}]", "", gzip.decompress(content).decode("utf-8", errors="replace"))
    for paragraph in re.split(r"\n\s*\n", text):
        yield " ".join(paragraph.split())


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """So many at a time (itertools has it from Python 3.12 on)."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def _download(package: Package) -> bytes:
    name = package.path.rpartition("/")[2]
    kept = cache_root() / "debian" / name
    content = kept.read_bytes() if kept.is_file() else b""
    if hashlib.sha256(content).hexdigest() != package.sha256:
        with urllib.request.urlopen(POOL + package.path, timeout=60) as answer:
            content = answer.read()
        found = hashlib.sha256(content).hexdigest()
        if found != package.sha256:
            raise OSError(f"{name} has sha256 {found}, expected {package.sha256}; nothing was kept")
        kept.parent.mkdir(parents=True, exist_ok=True)
        draft = kept.with_suffix(".draft")
        draft.write_bytes(content)
        draft.replace(kept)
    return content


def _member(archive: bytes, name: str) -> bytes:
    """A file of an `ar` archive: 8 bytes, then members of a 60-byte head (16 of name, 10 of size at 48) and content."""
    at = 8
    while at < len(archive):
        head = archive[at : at + 60]
        size = int(head[48:58])
        if head[:16].decode("ascii").strip().rstrip("/") == name:
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise OSError(f"the package holds no {name}")


class _Paragraphs(HTMLParser):
    """The running text of a page: headings start a section, paragraphs and items of lists are kept."""

    _KEPT, _HEADINGS = ("p", "li", "dd", "blockquote"), ("h1", "h2", "h3", "h4")

    def __init__(self) -> None:
        super().__init__()
        self._sections: list[list[str]] = [[]]
        self._open: list[str] | None = None
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style", "pre", "table", "nav"):
            self._skipped += 1
        elif tag in self._KEPT or tag in self._HEADINGS:
            self._close()
            if tag in self._HEADINGS:
                self._sections.append([])
            else:
                self._open = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "pre", "table", "nav"):
            self._skipped = max(0, self._skipped - 1)
        elif tag in self._KEPT:
            self._close()

    def handle_data(self, data: str) -> None:
        if self._open is not None and not self._skipped:
            self._open.append(data)

    def sections(self) -> list[str]:
        """Text under one heading each, paragraphs apart by an empty line."""
        self._close()
        return ["\n\n".join(section) for section in self._sections if section]

    def _close(self) -> None:
        text = " ".join("".join(self._open or []).split())
        if len(text) >= 60:  # shorter ones are labels and links
            self._sections[-1].append(text)
        self._open = None
