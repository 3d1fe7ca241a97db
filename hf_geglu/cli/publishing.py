"""The commands for saved variants: verify, reproduce, document, push, shrink, restore."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hf_geglu.cli.options import Base, Folder, Layers, Output, Overwrite, Revision, Variant

if TYPE_CHECKING:
    from hf_geglu.hub.verifying import Verification

Source = Annotated[str, typer.Argument(metavar="DIR_OR_ID", help="A folder or a Hub id.", show_default=False)]


def verify(source: Source, revision: Revision = None, base: Base = None) -> None:
    """Check a variant against its manifest: files, weights, blocks, golden outputs. Exit code 1 if any differs."""
    from hf_geglu.hub.verifying import verify_variant

    _finish(verify_variant(source, revision=revision, base=base))


def reproduce(source: Source, base: Base = None, revision: Revision = None) -> None:
    """Convert the base again as the manifest says and compare bit for bit. Exit code 1 if anything differs."""
    from hf_geglu.hub.reproduce import reproduce_variant

    _finish(reproduce_variant(source, base=base, revision=revision))


def document(
    folder: Folder,
    base: Annotated[str, typer.Option(metavar="FOLDER_OR_ID", help="What it was converted from.", show_default=False)],
    revision: Revision = None,
    variant: Variant = "geglu",
    layers: Layers = None,
) -> None:
    """Write golden outputs, manifest and card for a folder that save_pretrained made; the base proves what it is."""
    from hf_geglu.hub.documenting import document_folder

    manifest = document_folder(folder, base=base, revision=revision, variant=variant, layers=layers)
    state = "trained since" if manifest.trained else "at step 0, bit for bit"
    print(f"{folder.name}: a variant of {manifest.provenance.base.name}, {state}")
    print("manifest, golden outputs and card written")


def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Visible to everybody. Default: private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print what would go up, send nothing.")] = False,
    license: Annotated[
        str | None, typer.Option(help="Of the base (apache-2.0...), where its card did not say.", show_default=False)
    ] = None,
    base: Base = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default=False)] = None,
) -> None:
    """Check a variant, upload it, download it into an empty cache, and check what came back."""
    from hf_geglu.hub.push import push as push_folder

    done = push_folder(folder, repo, private=not public, dry_run=dry_run, license=license, base=base, message=message)
    console = Console()
    console.print(done.table())
    if dry_run:
        console.print("checked; nothing was sent", highlight=False)
        return
    console.print(done.verification.table())
    console.print(f"pushed, downloaded again and verified: {done.url}", highlight=False)


def shrink(folder: Source, output_dir: Output, base: Base = None, overwrite: Overwrite = False) -> None:
    """Save a variant as its plan and the tensors that differ from step 0: small where little was trained."""
    from transformers import AutoConfig

    from hf_geglu.hub import load, load_processor
    from hf_geglu.hub.delta import save_delta
    from hf_geglu.skeleton import architecture

    model = load(architecture(AutoConfig.from_pretrained(folder)), folder, dtype="auto")
    processor = load_processor(folder)
    save_delta(model, output_dir, base=base, tokenizer=processor, command=sys.argv, overwrite=overwrite)
    size = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
    print(f"saved in {output_dir}: {size / 2**20:,.1f} MiB")


def restore(delta: Source, output_dir: Output, base: Base = None, overwrite: Overwrite = False) -> None:
    """Make the whole variant of a delta: base, converted, with the delta applied and adapters merged."""
    from hf_geglu.hub import check_output, load_processor, save_folder
    from hf_geglu.hub.delta import load_delta

    check_output(output_dir, overwrite=overwrite)
    model = load_delta(None, delta, base=base, merge=True)
    save_folder(model, output_dir, tokenizer=load_processor(delta), command=sys.argv, overwrite=overwrite)
    print(f"saved in {output_dir}")


def _finish(result: Verification) -> None:
    console = Console()
    console.print(result.table())
    if result.ok:
        console.print("nothing differs", highlight=False)
        return
    console.print(f"{len(result.differences)} checks differ", highlight=False)
    raise typer.Exit(1)


COMMANDS = (verify, reproduce, document, push, shrink, restore)
