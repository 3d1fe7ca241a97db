"""What names a machine goes before anything is written: folders of this checkout, of the environment, and temporary
ones."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_ANY = r"(?:/[\w.+@~-]+)*"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(rf"{_ANY}/(?:site|dist)-packages/"), ""),
    (re.compile(rf"{re.escape(str(ROOT))}/?"), ""),
    (re.compile(rf"{re.escape(tempfile.gettempdir())}/[\w.-]+(?:/[\w-]+)?|{_ANY}/sweep-\w+(?:/[\w-]+)?"), "/FOLDER"),
    (re.compile(rf"{re.escape(str(Path.home()))}(?=/)"), "~"),
)


def scrub(value: Any) -> Any:
    """The same JSON value with every text in it scrubbed."""
    if isinstance(value, str):
        for pattern, replacement in _RULES:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    return value
