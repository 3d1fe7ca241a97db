"""Settings in a file: YAML, or JSON, which is YAML too. Keys are the names of the flags, flat or in the groups model,
data, train and output, as settings.json has them: so that file of a run can be given to the next."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_geglu.errors import ConfigurationError
from hf_geglu.training.parser import fields_of
from hf_geglu.training.settings.run import RunSettings

GROUPS = ("model", "data", "train", "output")
TASK = "task"


def replayable(settings: RunSettings, task: str) -> dict[str, Any]:
    """What settings.json holds. Paths below the current folder become relative, so that they still lead there."""
    groups = {name: getattr(settings, name) for name in GROUPS}
    return {
        TASK: task,
        **{
            name: {field.name: _relative(getattr(group, field.name)) for field in fields_of(type(group), task)}
            for name, group in groups.items()
        },
    }


def _relative(value: Any) -> Any:
    if isinstance(value, str) and os.path.isabs(value) and Path(value).is_relative_to(Path.cwd()):
        return str(Path(value).relative_to(Path.cwd()))
    if isinstance(value, dict):
        return {name: _relative(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_relative(item) for item in value]
    return value


def config_words(path: str, known: Mapping[str, str], task: str) -> list[str]:
    """The file as words of a command line; a null says nothing.

    Args:
        path: of the file.
        known: every name of a flag -> its first name, without dashes.
        task: of the recipe that reads it.

    Raises:
        ConfigurationError: it cannot be read, belongs to another task, has a key that no flag has, or one twice.
    """
    import yaml

    name = Path(path).name
    try:
        text = Path(path).read_text(encoding="utf-8")
        read, twice = yaml.safe_load(text), _twice(yaml.compose(text, yaml.SafeLoader))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config {name} cannot be read: expected a YAML file. Check the path.") from error
    except yaml.YAMLError as error:
        first = str(error).replace("\n", " ")
        raise ConfigurationError(
            f"--config {name} is no YAML: {first} Expected lines such as max_steps: 500."
        ) from error
    if not isinstance(read, dict):
        raise ConfigurationError(
            f"--config {name} holds a {type(read).__name__}: expected lines such as max_steps: 500."
        )
    of = read.pop(TASK, task)
    if of != task:
        raise ConfigurationError(
            f"--config {name} is of the recipe {of}: expected {task}. Run `hf-geglu finetune {of}`."
        )
    words: list[str] = []
    seen: dict[str, str] = {}
    for key, value in _flat(read):
        flag = str(key).lstrip("-").replace("-", "_")
        if flag not in known:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
            raise ConfigurationError(
                f"unknown key {key} in --config {name}: "
                + (f"did you mean {near[0]}?" if near else "expected the name of a flag, as --help lists them.")
            )
        before = seen.setdefault(known[flag], str(key))
        if before != key or key in twice:
            raise ConfigurationError(
                f"--config {name} says {key} twice{f', once as {before}' * (before != key)}: expected each setting "
                "once. Leave one out."
            )
        words += _words(known[flag], value)
    return words


def _twice(node: Any) -> set[str]:
    """Keys that a mapping has more than once: YAML itself would take the last."""
    if not isinstance(getattr(node, "value", None), list):
        return set()
    pairs = [pair for pair in node.value if isinstance(pair, tuple)]
    keys = [key.value for key, _ in pairs]
    return {key for key in keys if keys.count(key) > 1}.union(*(_twice(value) for _, value in pairs))


def _flat(read: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in read.items():
        if key in GROUPS and isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def _words(flag: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)] if value else []
    if isinstance(value, dict):
        return [f"--{flag}={json.dumps(value)}"]
    return [f"--{flag}={str(value).lower() if isinstance(value, bool) else value}"]
