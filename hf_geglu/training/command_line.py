"""Command lines of the recipes: flags, a file, or both; the nearest name for an unknown flag, errors in one line."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_geglu.errors import ConfigurationError, HfGegluError
from hf_geglu.training.config_file import config_words
from hf_geglu.training.forecast import forecast_run
from hf_geglu.training.objectives.objective import Task
from hf_geglu.training.parser import Parser, fields_of, make_parser, names
from hf_geglu.training.run import finetune
from hf_geglu.training.settings.run import DataSettings, ModelSettings, OutputSettings, RunSettings, TrainSettings

NOT_NEEDED = {
    "--do_train": "a run always trains",
    "--do_eval": "a run always evaluates what is held out",
    "--eval_strategy": "say how often with --eval_steps",
    "--evaluation_strategy": "say how often with --eval_steps",
    "--save_strategy": "say how often with --save_steps",
    "--logging_strategy": "say how often with --logging_steps",
    "--with_tracking": "name trackers with --report_to",
}
"""Flags that belong to other scripts and whose absence needs a word."""


_GROUPS: tuple[type[Any], ...] = (ModelSettings, DataSettings, TrainSettings, OutputSettings)


def parse(
    argv: Sequence[str], task: Task = "clm", *, prog: str | None = None, description: str | None = None
) -> RunSettings:
    """Settings of a command line, and of the file that its --config names; what the command line says wins.

    Raises:
        ConfigurationError: an unknown flag, a value that cannot be, or settings that exclude each other.
        SystemExit: --help.
    """
    parser = make_parser(_GROUPS, task, prog=prog, description=_shown(description))
    known = {name[2:]: field.name for group in _GROUPS for field in fields_of(group, task) for name in names(field)}
    words = [_underscored(word) for word in argv]
    file = _config_of(words)
    if file is not None:
        words = [*config_words(file, known, task), *words]
    found, unknown = parser.parse_known_args(words)
    if unknown:
        raise ConfigurationError(_about_unknown(unknown[0], sorted(f"--{name}" for name in known), task))
    groups = [
        group(**{field.name: getattr(found, field.name) for field in fields_of(group, task)}) for group in _GROUPS
    ]
    return RunSettings(model=groups[0], data=groups[1], train=groups[2], output=groups[3])


def _config_of(words: Sequence[str]) -> str | None:
    """Read before all the rest: what it holds may be what the rest requires."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    file: str | None = first.parse_known_args(list(words))[0].config
    return file


def _shown(description: str | None) -> str | None:
    """Of a recipe's docstring what goes above the flags: what it is, and the first commands to paste."""
    if description is None:
        return None
    return "\n\n".join(description.strip().split("\n\n")[:2])


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _about_unknown(word: str, known: Sequence[str], task: Task) -> str:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"{word!r} belongs to no flag: expected --name value. Run with --help for all flags."
    if name in NOT_NEEDED:
        return f"unknown flag {name}: {NOT_NEEDED[name]}. Leave it out."
    owners = {
        other: sorted(field.metadata["tasks"])
        for group in _GROUPS
        for field in dataclasses.fields(group)
        if task not in (field.metadata.get("tasks") or (task,))
        for other in names(field)
    }
    if name in owners:
        return f"{name} is a flag of {', '.join(owners[name])}: the recipe {task} has none of it. Leave it out."
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown flag {name}: " + (
        f"did you mean {near[0]}?" if near else "expected one of those that --help lists."
    )


def main(
    task: Task, argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None
) -> int:
    """Run a recipe from its command line.

    Returns:
        0, or 2 after an error that was printed as one line on stderr, or 130 after an interruption.
    """
    first_process = os.environ.get("RANK", "0") == "0"
    try:
        words = sys.argv[1:] if argv is None else argv
        settings = parse(words, task, prog=prog, description=description)
        _be_quiet(first_process)
        if settings.output.plan:
            told = str(forecast_run(settings, task))
            if first_process:
                print(told)
            return 0
        result = finetune(settings, task, command=[*(prog or Path(sys.argv[0]).name).split(), *words])
    except HfGegluError as error:
        if first_process:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first_process:
            print("interrupted; go on from the newest checkpoint with --resume", file=sys.stderr)
        return 130
    if first_process:
        print(result.table())
        if result.samples:
            print(f"\n{result.told_samples()}\n")
        print(f"saved in {settings.output.output_dir}")
        if result.pushed:
            print(f"pushed, downloaded again and verified: {result.pushed}")
    return 0


def _be_quiet(first_process: bool) -> None:
    """Our notes on stderr; of the libraries only what went wrong, and no bars where nobody watches."""
    notes = logging.getLogger("hf_geglu")
    notes.setLevel(logging.INFO if first_process else logging.ERROR)
    if not notes.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        notes.addHandler(handler)
        notes.propagate = False
    if sys.stderr.isatty() and first_process:
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        import datasets
    except ImportError:
        return  # said with a way out when the dataset is opened
    datasets.disable_progress_bars()
