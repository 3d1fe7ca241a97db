"""Command lines of the recipes: dashes or underscores, the nearest name for an unknown flag, errors in one line."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_geglu.errors import ConfigurationError, HfGegluError
from hf_geglu.training.objectives import Task
from hf_geglu.training.run import finetune
from hf_geglu.training.settings import DataSettings, ModelSettings, OutputSettings, RunSettings, TrainSettings

NOT_NEEDED = {
    "--do_train": "a run always trains",
    "--do_eval": "a run always evaluates what is held out",
    "--eval_strategy": "say how often with --eval_steps",
    "--evaluation_strategy": "say how often with --eval_steps",
    "--save_strategy": "say how often with --save_steps",
    "--logging_strategy": "say how often with --logging_steps",
    "--report_to": "the log is train_log.jsonl",
    "--with_tracking": "the log is train_log.jsonl",
    "--push_to_hub": "push the finished folder with `hf-geglu push`",
}
"""Flags that belong to other scripts and whose absence needs a word."""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Commands to paste stay as they are; every option shows its default."""


def parse(argv: Sequence[str], *, prog: str | None = None, description: str | None = None) -> RunSettings:
    """Settings of a command line.

    Raises:
        ConfigurationError: an unknown flag, a value that cannot be, or settings that exclude each other.
        SystemExit: --help.
    """
    from transformers import HfArgumentParser

    groups = (ModelSettings, DataSettings, TrainSettings, OutputSettings)
    parser: Any = HfArgumentParser(
        groups, prog=prog, description=description, formatter_class=_Help, allow_abbrev=False
    )
    parser.error = _refuse
    known = sorted(
        option for option in parser._option_string_actions if option.startswith("--") and "-" not in option[2:]
    )
    model, data, training, output, unknown = parser.parse_args_into_dataclasses(
        [_underscored(word) for word in argv], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ConfigurationError(_about_unknown(unknown[0], known))
    return RunSettings(model=model, data=data, train=training, output=output)


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _refuse(message: str) -> None:
    raise ConfigurationError(f"{message}. Run with --help for all flags.")


def _about_unknown(word: str, known: Sequence[str]) -> str:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"{word!r} belongs to no flag: expected --name value. Run with --help for all flags."
    if name in NOT_NEEDED:
        return f"unknown flag {name}: {NOT_NEEDED[name]}. Leave it out."
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
        settings = parse(words, prog=prog, description=description)
        _be_quiet(first_process)
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
        print(f"saved in {settings.output.output_dir}")
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
