"""Do something to another package once somebody imports it, and wrap its functions so that it shows.

``when_imported`` puts one finder at the head of ``sys.meta_path``. It finds nothing itself: for the modules it has a
note on, it lets the other finders find them and runs the note after they were executed (importlib's documentation,
"Setting up an importer").
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_LOCK = threading.RLock()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that notes are waiting for, through the finders behind it."""

    def __init__(self) -> None:
        self.notes: dict[str, list[str]] = {}
        self.searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.notes or getattr(self.searching, "name", None) == fullname:
            return None
        self.searching.name = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching.name = None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.notes[fullname])
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, then the notes."""

    def __init__(self, loader: Any, notes: list[str]) -> None:
        self.loader = loader
        self.notes = notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_data, get_source...: what tools ask a module's loader for

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        for note in self.notes:
            _call(note, module)


_FINDER = _Finder()


def when_imported(module: str, function: str) -> None:
    """Call ``package.module:function`` with `module` once it is imported; now, if it is already. Idempotent."""
    with _LOCK:
        notes = _FINDER.notes.setdefault(module, [])
        if function in notes:
            return
        notes.append(function)
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)
    present = sys.modules.get(module)
    if present is not None and not getattr(present.__spec__, "_initializing", False):
        _call(function, present)


def _call(function: str, module: ModuleType) -> None:
    home, _, name = function.partition(":")
    getattr(importlib.import_module(home), name)(module)


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``make(original)``, once. A classmethod stays one: `original` then takes the class
    first.

    Nothing happens where the owner has no such function: another version of the package.
    """
    held = vars(owner).get(name)
    original = held.__func__ if isinstance(held, classmethod) else held
    if original is None or hasattr(original, "_hf_geglu_original"):
        return
    replacement: Any = functools.wraps(original)(make(original))
    replacement._hf_geglu_original = original
    setattr(owner, name, classmethod(replacement) if isinstance(held, classmethod) else replacement)
