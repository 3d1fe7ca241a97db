"""A field of a settings class and what the command line says about it."""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_geglu.errors import ConfigurationError


def flag(
    default: Any,
    text: str,
    *,
    unit: str | None = None,
    off: str | None = None,
    aliases: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """A dataclass field with what its line of help says.

    Args:
        default: its value where nobody says anything.
        text: one line, at most 70 characters.
        unit: of the value.
        off: the value that switches it off.
        aliases: further names of the flag, without dashes.
        tasks: the recipes that have it; by default all.
        **more: `const`, `nargs` and `metavar`, as argparse knows them.
    """
    told = {"help": text, "unit": unit, "off": off, "aliases": aliases, "tasks": tasks, **more}
    return dataclasses.field(default=default, metadata=told)


def require(holds: bool, given: str, expected: str, then: str) -> None:
    """Raise if it does not hold.

    Raises:
        ConfigurationError: with these three parts.
    """
    if not holds:
        raise ConfigurationError(f"{given}: expected {expected}. {then}")
