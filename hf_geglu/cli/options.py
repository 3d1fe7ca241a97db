"""The arguments and flags that several commands share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id or a folder.", show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that holds a variant.", show_default=False)]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="A new or empty folder.", show_default=False)]
Base = Annotated[
    str | None,
    typer.Option(metavar="FOLDER_OR_ID", help="The base, where the Hub is not to be asked.", show_default=False),
]
Variant = Annotated[str, typer.Option(help="geglu, geglu_tanh, swiglu, reglu, bilinear or glu.")]
Layers = Annotated[
    str | None,
    typer.Option(help="Which layers: '0-5', '3,7,-1', or a glob on the path. Default: all.", show_default=False),
]
Gelu = Annotated[
    Literal["owner", "named"],
    typer.Option(help="owner: a block keeps its own form of GELU (erf or tanh). named: exactly the variant's form."),
]
Sites = Annotated[
    Path | None,
    typer.Option(
        "--sites",
        help="YAML file that names the FFN blocks, for a model the search does not understand: a list such as "
        "'- {up: layers.*.w1, down: layers.*.w2}', with 'gate:' where that is a projection of its own.",
        show_default=False,
    ),
]
WidthText = Annotated[
    str,
    typer.Option(
        "--width",
        help="same; matched (the parameters of a dense block, at two thirds of its neurons); a share such as 0.75; or "
        "a number of neurons. Fewer than there are is lossy, and takes --calibrate.",
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="How many tokens of the text.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the modelling code of the repository.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]
