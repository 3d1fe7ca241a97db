"""Real English text that every Python brings along: the documentation inside its standard library.

    docstrings of modules, classes and functions    read from the sources with `ast`; nothing is imported or run
    pydoc topics                                    the chapters of the language reference that `help()` shows

About 1.3 million characters, a third of a million tokens. The same Python gives the same documents in the same order;
another version, or a distribution that leaves parts of the library out, gives others. Licence: PSF-2.0.

Held-out text measures something only if it was not trained on. So a paragraph that occurs twice (aliases of topics, the
Python twins of C modules, copied methods) is kept once, and whole modules and whole topics go to one side or the other.
"""

from __future__ import annotations

import ast
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_geglu.errors import DataError

# Not documentation of the library, or lists of names and characters rather than prose.
_LEFT_OUT = {"__pycache__", "dist-packages", "site-packages", "lib-dynload", "test", "tests", "idle_test"}
_LEFT_OUT |= {"encodings", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
_SHORTEST_DOCUMENT = 300  # characters: about a paragraph. Below, nearly all are one-liners such as "Return the name."
_SHORTEST_PARAGRAPH = 60  # characters: shorter ones ("Example:") repeat by chance and give nothing away
_LEAST_PROSE = 0.7  # share of letters and spaces; tables, grammars and sessions are below


@dataclass(frozen=True)
class Document:
    """A piece of text.

    Attributes:
        group: the module or topic it is from; documents of one group stay on one side of a split.
        text: at least a paragraph.
    """

    group: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text to measure on. No module, topic or paragraph is in both."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def stdlib_corpus(*, held_out: float = 0.2, seed: int = 0) -> Corpus:
    """The documentation of the standard library, split and shuffled.

    Args:
        held_out: share of the characters to hold out.
        seed: of the split and of the order.

    Raises:
        DataError: this Python comes without the sources of its library.
    """
    return split(stdlib_documents(), held_out=held_out, seed=seed)


def stdlib_documents() -> list[Document]:
    """The documents of the standard library in a fixed order, each paragraph once.

    Raises:
        DataError: this Python comes without the sources of its library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = list(without_repeats([*_topics(), *_docstrings(library)]))
    if not documents:
        raise DataError(
            "no documentation found in the standard library of this Python, whose sources are not installed; expected "
            ".py files. Use a Python with sources, or give a text of your own."
        )
    return documents


def split(documents: Iterable[Document], *, held_out: float, seed: int) -> Corpus:
    """Deal groups out to the two sides, then shuffle each side.

    Args:
        documents: in an order that is always the same.
        held_out: share of the characters to hold out, between 0 and 1; a little more comes out, as groups are whole.
        seed: same seed, same documents: same corpus.
    """
    groups: dict[str, list[str]] = {}
    for document in documents:
        groups.setdefault(document.group, []).append(document.text)
    names = sorted(groups)
    total = sum(len(text) for texts in groups.values() for text in texts)
    draw = random.Random(seed)
    draw.shuffle(names)
    held: list[str] = []
    rest: list[str] = []
    length = 0
    for name in names:
        side = held if length < held_out * total else rest
        side += groups[name]
        length += sum(map(len, groups[name])) if side is held else 0
    draw.shuffle(held)
    draw.shuffle(rest)
    return Corpus(train=tuple(rest), held_out=tuple(held))


def as_dataset(texts: Sequence[str]) -> Any:
    """A `datasets.Dataset` with the one column `text`."""
    from datasets import Dataset

    return Dataset.from_dict({"text": list(texts)})


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop each paragraph that occurred before, then each document that is left too short or holds too little prose."""
    seen: set[str] = set()
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document.text):
            key = paragraph_key(paragraph)
            if len(key) < _SHORTEST_PARAGRAPH or key not in seen:
                kept.append(paragraph.rstrip())
            seen.add(key)
        text = "\n\n".join(kept).strip()
        if len(text) >= _SHORTEST_DOCUMENT and _prose(text) >= _LEAST_PROSE:
            yield Document(document.group, text)


def paragraph_key(paragraph: str) -> str:
    """What two paragraphs share that differ only in case, indentation or line breaks."""
    return " ".join(paragraph.lower().split())


def _prose(text: str) -> float:
    return sum(character.isalpha() or character == " " for character in text) / len(text)


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics  # one dictionary of strings
    except ImportError:  # some distributions leave it out; the docstrings are enough
        return
    for name, text in sorted(topics.items()):
        yield Document(f"topic {name}", text.expandtabs())


def _docstrings(library: Path) -> Iterator[Document]:
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder) / file
                first = path.relative_to(library).parts[0].removesuffix(".py")
                # _pydecimal documents what decimal does, _strptime what strptime does
                group = re.sub(r"^_(py(?=\w{2}))?", "", first)
                for text in _docstrings_of(path.read_bytes()):
                    yield Document(group, text.expandtabs())


def _docstrings_of(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of the library's own sources, when they are parsed
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates and samples of broken code
            return
    pending: list[ast.stmt | ast.Module] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST_DOCUMENT:
                yield text
            if not isinstance(node, (ast.Module, ast.ClassDef)):
                continue  # functions inside functions hardly ever have any
        for body in ("orelse", "finalbody", "body"):
            pending += reversed(getattr(node, body, ()))
