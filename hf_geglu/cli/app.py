"""The commands of `hf-geglu`. Each is a thin shell around one function of the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from hf_geglu.cli import collapsing, identifying, inspecting, publishing
from hf_geglu.cli.options import Gelu, Layers, Model, Output, Overwrite, Revision, Sites, Trust, Variant, WidthText
from hf_geglu.errors import ConfigurationError, HfGegluError

app = typer.Typer(
    name="hf-geglu",
    help="Turn the feed-forward blocks of a pretrained Hugging Face model into GeGLU blocks without breaking it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def plan(
    model: Model,
    variant: Variant = "geglu",
    layers: Layers = None,
    gelu: Gelu = "owner",
    width: WidthText = "same",
    sites: Sites = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a conversion would do. Reads the config only; touches nothing."""
    from transformers import AutoConfig

    from hf_geglu.planning import make_plan
    from hf_geglu.sites import find_sites, read_sites
    from hf_geglu.skeleton import architecture, skeleton
    from hf_geglu.width import parse_width

    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    kind = architecture(config)
    kwargs = {"trust_remote_code": True} if trust_remote_code and hasattr(kind, "from_config") else {}
    twin = skeleton(config, kind, **kwargs)
    found = find_sites(twin, sites=None if sites is None else read_sites(sites))
    decided = make_plan(twin, variant, parse_width(width), layers, gelu=gelu, found=found)
    print(decided.to_json() if json else decided)


@app.command()
def convert(
    model: Model,
    output_dir: Output,
    variant: Variant = "geglu",
    layers: Layers = None,
    gelu: Gelu = "owner",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: as the checkpoint was saved.")] = "auto",
    verify: Annotated[
        Literal["auto", "model", "sites", "none"],
        typer.Option(
            help="sites: every converted block of the written files, in float64. model: run the whole model before and "
            "after, too, and keep golden outputs; needs memory for it. auto: model where that much memory is free."
        ),
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
    sites: Sites = None,
    overwrite: Overwrite = False,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to fit every block's conversion to: a file, a folder of them, a dataset, or builtin; an equal "
            "share of each where it is said several times. Runs the model, and chooses block by block on a quarter "
            "held out.",
            show_default=False,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How much of it, in tokens; 32768 of several kinds of text carry over better to others. Default: "
            "8192; with --width 80,000, with --heal 500,000.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        Literal["auto", "model", "layer"],
        typer.Option(
            help="With --calibrate. model: all of it is loaded. layer: one layer at a time, for models larger than "
            "memory; the same result up to rounding. auto: layer where too little memory is free."
        ),
    ] = "auto",
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="With --calibrate: nats a token that the conversion may cost; blocks that cost most are left as they "
            "are. Default: no bound.",
            show_default=False,
        ),
    ] = None,
    width: WidthText = "same",
    stage: Annotated[
        Literal["closed", "local", "heal"],
        typer.Option(
            help="How far to go with --width. closed: neurons are chosen and the down projections solved for. "
            "local: every block is trained by itself, too. heal: so is the whole model, on the original's outputs."
        ),
    ] = "closed",
    heal: Annotated[bool, typer.Option("--heal", help="The same as --stage heal.")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Convert a checkpoint file by file, verify it, and write the variant with tokenizer, manifest and card.

    The model need not fit into memory (but for --width). Interrupted, the same command goes on where it stopped.
    """
    if width == "same" and (heal or stage != "closed"):
        raise ConfigurationError("--heal and --stage repair what fewer neurons lose; expected --width beside them")
    if calibrate:
        from hf_geglu.cli.calibrating import convert_calibrated

        convert_calibrated(
            model,
            output_dir,
            calibrate=calibrate,
            tokens=calibration_tokens,
            memory=memory,
            verify=verify,
            trust_remote_code=trust_remote_code,
            max_kl=max_kl,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            revision=revision,
            sites=sites,
            variant=variant,
            layers=layers,
            gelu=gelu,
            width=width,
            narrow="heal" if heal else stage,
        )
        return
    if width != "same":
        raise ConfigurationError(
            f"--width {width} without --calibrate: fewer neurons are fitted to text. Say --calibrate FILE"
        )
    if max_kl is not None:
        raise ConfigurationError("--max-kl without --calibrate: expected text to measure on. Say --calibrate FILE")
    from hf_geglu.checkpoint import bytes_bar, convert_checkpoint
    from hf_geglu.sites import read_sites

    with bytes_bar("converting") as progress:
        done = convert_checkpoint(
            model,
            output_dir,
            variant=variant,
            layers=layers,
            gelu=gelu,
            sites=None if sites is None else read_sites(sites),
            dtype=dtype,
            verify=verify,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            revision=revision,
            trust_remote_code=trust_remote_code,
            papers=True,
            command=sys.argv,
            progress=progress,
        )
    print(done)
    print(f"saved in {output_dir}")


for _command in (identifying.identify, inspecting.inspect, collapsing.collapse, *publishing.COMMANDS):
    app.command()(_command)


FinetuneTask = Literal[
    "clm", "mlm", "seq2seq", "sft", "text_classification", "token_classification", "image_classification"
]
"""Those of `training.objectives.Task`, which is not imported before it is needed."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def finetune(
    context: typer.Context,
    task: Annotated[FinetuneTask, typer.Argument(help="What is predicted; docs/finetuning.md has each.")],
) -> None:
    """Fine-tune a model, converted or not. All flags: `hf-geglu finetune clm --help`."""
    from hf_geglu.training.command_line import main as run

    raise typer.Exit(run(task, context.args, prog=f"hf-geglu finetune {task}"))


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A causal or masked language model: Hub id or folder. Default: SmolLM2-135M from PyPI."),
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Where the variant, the picture and the ledger go.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each of the two runs.")] = 12,
    overwrite: Overwrite = False,
) -> None:
    """Convert, verify, fine-tune and reload a real model on real text, and print the numbers side by side."""
    from hf_geglu.demo.run import run_demo

    run_demo(model, output_dir, steps=steps, overwrite=overwrite, console=Console(), command=sys.argv)


def main() -> None:
    """Entry point: errors of ours and of what we load become one line, exit code 2."""
    try:
        app()
    except (HfGegluError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
