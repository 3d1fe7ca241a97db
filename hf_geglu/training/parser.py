"""From settings classes to a command line: one line of help a flag, dashes or underscores.

--name UNIT    what it does [default; off: value]
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from hf_geglu.errors import ConfigurationError

WIDTH = 120
COLUMN = 42
"""Where the text of help begins: the longest flag with its unit takes 40."""


class Parser(argparse.ArgumentParser):
    """Raises instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Of argparse.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(f"{message}. Run with --help for all flags.")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=COLUMN, width=WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        unit = {"BOOL": "", None: ""}.get(action.metavar, f" {action.metavar}")  # type: ignore[arg-type]
        return action.option_strings[0] + unit + " ..." * (action.nargs == "+")


def make_parser(groups: Sequence[type[Any]], task: str, *, prog: str | None, description: str | None) -> Parser:
    """A parser with the flags of these classes that the task has.

    Args:
        groups: settings classes; each is a section of the help.
        task: of the recipe.
        prog, description: as argparse knows them.
    """
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--config FILE] --name value ...",
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with these names as keys; flags win over it")
    for group in groups:
        section = parser.add_argument_group(str(group._argument_group_name))
        hints = get_type_hints(group)
        for field in fields_of(group, task):
            section.add_argument(*names(field), **_options(field, hints[field.name]))
    return parser


def fields_of(group: type[Any], task: str) -> Iterator[dataclasses.Field[Any]]:
    """The fields of a settings class that the task has."""
    for field in dataclasses.fields(group):
        if task in (field.metadata.get("tasks") or (task,)):
            yield field


def names(field: dataclasses.Field[Any]) -> list[str]:
    """All names of a flag with two dashes, the field's own first."""
    return [f"--{name}" for name in (field.name, *field.metadata.get("aliases", ()))]


def _options(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    told = field.metadata
    required = field.default is dataclasses.MISSING
    kind = _without_none(hint)[0]
    options: dict[str, Any] = {"dest": field.name, "help": _text(field, hint).replace("%", "%%")}
    options |= {"required": True} if required else {"default": field.default}
    unit = told.get("metavar") or (told.get("unit") or "").upper()
    if kind is bool:
        return options | {"type": _truth, "nargs": "?", "const": True, "metavar": "BOOL"}
    if get_origin(kind) is Literal:
        return options | {"choices": list(get_args(kind)), "metavar": unit or "WORD"}
    if get_origin(kind) is list:
        return options | {"nargs": "+", "metavar": unit or "X"}
    options |= {"type": kind, "metavar": unit or {int: "N", float: "X"}.get(kind, "X")}
    return options | {name: told[name] for name in ("nargs", "const") if name in told}


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds[0], len(kinds) < len(get_args(hint))
    return hint, False


def _text(field: dataclasses.Field[Any], hint: Any) -> str:
    told = field.metadata
    kind, _ = _without_none(hint)
    text = str(told["help"])
    if get_origin(kind) is Literal and any(str(choice) not in text for choice in get_args(kind)):
        text += ": " + ", ".join(map(str, get_args(kind)))
    notes = [*_default(field, kind)]
    off = told.get("off")
    if off is not None:
        notes = [f"{off} = off"] if notes == [off] else [*notes, f"off: {off}"]
    text += f" [{'; '.join(notes)}]" if notes else ""
    aliases = [f"--{name}" for name in told.get("aliases", ())]
    more = f" (also {', '.join(aliases)})"
    return text + more if aliases and len(text + more) < WIDTH - COLUMN else text


def _default(field: dataclasses.Field[Any], kind: Any) -> list[str]:
    value = field.default
    if value is dataclasses.MISSING:
        return ["required"]
    if value is None or value is False or value == "":
        return []
    if value is True:
        return ["true"]
    return [f"{value:g}" if isinstance(value, float) else str(value)]


def _truth(word: str) -> bool:
    if word.lower() in ("true", "yes", "1", "on"):
        return True
    if word.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
