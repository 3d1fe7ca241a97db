"""`hf-geglu identify`: what the units of a model or of a piece of code are."""

from __future__ import annotations

import json as json_format
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_geglu.cli.options import Revision, Trust

if TYPE_CHECKING:
    from hf_geglu.identifying import Identity, Unknown
    from hf_geglu.identifying.audit import Finding


def identify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_FILE",
            help="A Hub id or a folder (its config is read, no weights), FILE.py[:NAME], or package.module:NAME. Code "
            "is run only where it is named so.",
            show_default=False,
        ),
    ],
    expect: Annotated[
        str | None,
        typer.Option(help="geglu, geglu_tanh, swiglu...: fail unless every unit is that variant.", show_default=False),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say by behaviour what the feed-forward units are, and whether the config is true.

    Exit code 0: every unit is understood, and the config does what it says. 1: something is unknown, or the config is
    not followed, or a unit is not what --expect names. 2: there is nothing to look at.
    """
    from hf_geglu.identifying import Identity
    from hf_geglu.identifying.loading import names_code
    from hf_geglu.variants import get_variant

    if expect is not None:
        get_variant(expect)
    answers, findings = _of_code(target) if names_code(target) else _of_model(target, revision, trust_remote_code)
    if json:
        shown = {
            "units": [{"name": name, **answer.to_dict()} for name, answer in answers],
            "config": [{"lies": one.lies, **one.to_dict()} for one in findings],
        }
        print(json_format.dumps(shown, indent=2, default=str))
    else:
        _print(answers, findings)
    understood = answers and all(isinstance(answer, Identity) for _, answer in answers)
    expected = expect is None or all(getattr(answer, "variant", None) == expect for _, answer in answers)
    raise typer.Exit(0 if understood and expected and not any(one.lies for one in findings) else 1)


def _of_code(target: str) -> tuple[list[tuple[str, Identity | Unknown]], tuple[Finding, ...]]:
    from hf_geglu.identifying import identify as ask
    from hf_geglu.identifying.loading import load_units

    answers: list[tuple[str, Identity | Unknown]] = []
    for name, unit in load_units(target).items():
        answer = ask(unit)
        answers += [(name, one) for one in (answer if isinstance(answer, tuple) else (answer,))]
    return answers, ()


def _of_model(
    target: str, revision: str | None, trust_remote_code: bool
) -> tuple[list[tuple[str, Identity | Unknown]], tuple[Finding, ...]]:
    from transformers import AutoConfig

    from hf_geglu.identifying import identify as ask
    from hf_geglu.identifying.audit import audit
    from hf_geglu.skeleton import architecture, skeleton

    config = AutoConfig.from_pretrained(target, revision=revision, trust_remote_code=trust_remote_code)
    kind = architecture(config)
    kwargs = {"trust_remote_code": True} if trust_remote_code and hasattr(kind, "from_config") else {}
    model = skeleton(config, kind, **kwargs)
    answer = ask(model)
    answers = answer if isinstance(answer, tuple) else (answer,)
    return [(one.path, one) for one in answers], audit(config, lambda one: skeleton(one, kind, **kwargs))


def _print(answers: list[tuple[str, Identity | Unknown]], findings: tuple[Finding, ...]) -> None:
    """Equal units share a row."""
    console = Console()
    groups: Counter[tuple[Any, ...]] = Counter()
    firsts: dict[tuple[Any, ...], tuple[str, Identity | Unknown]] = {}
    for name, answer in answers:
        key = (answer.class_name, str(answer), *(getattr(answer, part, None) for part in _BIASES))
        groups[key] += 1
        firsts.setdefault(key, (name, answer))
    for key, count in groups.items():
        name, answer = firsts[key]
        title = answer.class_name or "function"
        title += f" at {name}" if name not in ("", title) else ""
        lines = [title + (f" and {count - 1} more" if count > 1 else ""), f"    {answer}"]
        lines += [f"    {projections}"] if (projections := _projections(answer, name)) else []
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    if not answers:
        print("no feed-forward block was found")
    for finding in findings:
        console.print(str(finding), markup=False, style="bold red" if finding.lies else None, soft_wrap=True)


_BIASES = ("gate_bias", "value_bias", "down_bias")


def _projections(answer: Identity | Unknown, name: str) -> str:
    """Which projections there are, and which of them have a bias."""
    said = []
    for part in ("gate", "value", "down"):
        path = getattr(answer, part, None)
        if path is not None and not (part == "value" and path == getattr(answer, "gate", None)):
            bias = {True: " (bias)", False: " (no bias)", None: ""}[getattr(answer, f"{part}_bias", None)]
            said.append(f"{part} {path.removeprefix(f'{name}.')}{bias}")
    return ", ".join(said)
