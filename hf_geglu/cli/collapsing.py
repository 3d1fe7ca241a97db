"""`hf-geglu collapse`: a variant in, a model whose idle GeGLU blocks are dense again out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_geglu.cli.options import Layers, Overwrite, Revision, Tokens


def collapse(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A variant: folder or Hub id.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A new or empty folder.", show_default=False)],
    tolerance: Annotated[
        float,
        typer.Option(help="How far a neuron's value may move, as a share of it, and still count as constant. 0: not."),
    ] = 0.0,
    layers: Layers = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text that a tolerance is measured on, as in `inspect`.", show_default=False),
    ] = None,
    tokens: Tokens = 8192,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would collapse; write nothing.")] = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> None:
    """Make blocks dense again whose value branch has learned nothing, verify, and write the smaller model.

    Exit code 1 where nothing can collapse; TARGET is then not written.
    """
    from hf_geglu.cli.texts import batches_of, open_model
    from hf_geglu.collapsing import collapse as collapse_model
    from hf_geglu.hub import check_output, load_processor, save_folder

    if not dry_run:
        check_output(target, overwrite=overwrite)
    model = open_model(source, revision=revision)
    processor = load_processor(source, revision=revision or "main")
    batches = batches_of(data, model, processor, tokens=tokens) if data else None
    report = collapse_model(model, tolerance=tolerance, layers=layers, inputs=batches)
    print(report)
    if not report.plan.sites:
        raise typer.Exit(1)
    if dry_run:
        return
    save_folder(model, target, tokenizer=processor, command=sys.argv, overwrite=overwrite, companions=source)
    print(f"saved in {target}")
