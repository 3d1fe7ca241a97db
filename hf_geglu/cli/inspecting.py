"""`hf-geglu inspect`: what the gates of a model do, for the terminal, as a picture, as JSON."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from hf_geglu.cli.options import Layers, Model, Revision, Tokens


def inspect(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to run: files (csv, tsv, json, jsonl, txt, parquet), a folder, a dataset by name, or 'builtin' "
            "(the documentation of Python's library). Without it only the weights are looked at.",
            show_default=False,
        ),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option("--before", "--base", help="The model from before a fine-tuning.", show_default=False),
    ] = None,
    tokens: Tokens = 8192,
    layers: Layers = None,
    plot: Annotated[
        Path | None, typer.Option(help="Where the picture goes: PLOT.png and PLOT.svg.", show_default=False)
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the report there, with a number a neuron.", show_default=False)
    ] = None,
    revision: Revision = None,
) -> None:
    """Show what the gates of a model do: closed, dead and duplicate ones, and what the value branches have learned."""
    from hf_geglu.cli.texts import batches_of, open_model
    from hf_geglu.errors import ConfigurationError
    from hf_geglu.hub import load_processor
    from hf_geglu.inspecting import inspect_gates
    from hf_geglu.inspecting.picture import draw
    from hf_geglu.inspecting.table import tables

    if plot is not None and not data:
        raise ConfigurationError("--plot without --data: the plots show what gates do on text. Add --data builtin")
    console = Console()
    opened = open_model(model, revision=revision)
    earlier = None if before is None else open_model(before)
    batches = []
    if data:
        processor = load_processor(model, revision=revision or "main")
        batches = batches_of(data, opened, processor, tokens=tokens)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("listening", total=None, visible=bool(batches))
        report = inspect_gates(
            opened,
            batches,
            before=earlier,
            layers=layers,
            name=Path(model).name,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for part in tables(report):
        console.print(part)
    if json is not None:
        json.write_text(json_module.dumps(report.to_dict(neurons=True)) + "\n", encoding="utf-8")
        console.print(f"written: {json}", highlight=False)
    if plot is not None:
        for path in draw(report, plot, title=report.name):
            console.print(f"drawn: {path}", highlight=False)
