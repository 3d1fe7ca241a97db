"""`hf-geglu convert --calibrate`: in memory, or one layer at a time where the model does not fit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_geglu.errors import ConfigurationError

if TYPE_CHECKING:
    from hf_geglu.narrowing import Stage


TOKENS, NARROW_TOKENS, HEAL_TOKENS = 8_192, 80_000, 500_000
"""How much text is used: to fit numbers of single neurons, to solve for whole projections, to train a model."""


def convert_calibrated(
    model: str,
    output_dir: Path,
    *,
    calibrate: Sequence[str],
    tokens: int | None,
    memory: Literal["auto", "model", "layer"],
    verify: Literal["auto", "model", "sites", "none"],
    trust_remote_code: bool,
    width: str,
    narrow: Stage,
    max_kl: float | None,
    dtype: str,
    max_shard_size: str,
    overwrite: bool,
    revision: str | None,
    sites: Path | None,
    **settings: Any,
) -> None:
    """Load, calibrate, convert, verify and save with papers.

    Args:
        model: Hub id or folder.
        output_dir: a new or empty folder.
        calibrate: files, folders of them, datasets, or "builtin"; of each an equal share is taken.
        tokens: of the text to use, `TOKENS` by default; a quarter of them chooses between conversions, or measures.
        memory: how much of the model is in memory: all, or a layer; "auto" looks how much is free.
        verify: of a checkpoint that is converted layer by layer; a model in memory is always run.
        trust_remote_code: run the modelling code of the repository; layer by layer only.
        width: as in `convert`, in words.
        narrow: as in `convert`.
        max_kl: see `hf_geglu.convert`.
        dtype: only "auto": what was calibrated is what is saved.
        max_shard_size: of a weights file.
        overwrite: replace what is there.
        revision: of `model` on the Hub.
        sites: YAML file that names blocks.
        **settings: variant, layers and gelu, for `convert`.

    Raises:
        ConfigurationError: another dtype than the checkpoint's.
        HfGegluError: anything that loading, converting or saving raises.
    """
    from hf_geglu.calibration import CalibrationData
    from hf_geglu.calibration.progress import batches_bar
    from hf_geglu.cli.texts import open_model
    from hf_geglu.converting import convert
    from hf_geglu.hub import check_output, load_processor, save_folder
    from hf_geglu.sites import read_sites
    from hf_geglu.surgery import forget_original
    from hf_geglu.width import parse_width

    if dtype != "auto":
        raise ConfigurationError(
            f"--dtype {dtype} with --calibrate: what is calibrated is saved as it is; expected auto. Cast the result, "
            "or calibrate a checkpoint of that dtype"
        )
    if memory == "layer" or (memory == "auto" and width == "same" and _too_large(model, revision, trust_remote_code)):
        if width != "same":
            raise ConfigurationError("--memory layer with --width: fewer neurons are fitted to a model in memory")
        _layer_by_layer(
            model,
            output_dir,
            calibrate=calibrate,
            tokens=tokens or TOKENS,
            revision=revision,
            trust_remote_code=trust_remote_code,
            sites=None if sites is None else read_sites(sites),
            max_kl=max_kl,
            verify=verify,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            **settings,
        )
        return
    check_output(output_dir, overwrite=overwrite)
    loaded = open_model(model, revision=revision)
    tokenizer = load_processor(model, **({"revision": revision} if revision else {}))
    data = CalibrationData(
        batches=tuple(mixed_batches(calibrate, loaded, tokenizer, tokens=tokens or _tokens(width, narrow))),
        name=_names(calibrate),
    )
    # beside the target and of a fixed name, so that the same command finds it again
    kept = output_dir.resolve().parent / f".{output_dir.resolve().name}.calibration" if width == "same" else None
    with batches_bar("calibrating") as progress:
        report = convert(
            loaded,
            calibration=data,
            max_kl=max_kl,
            progress=progress,
            state=kept,
            width=parse_width(width),
            narrow=narrow,
            sites=None if sites is None else read_sites(sites),
            **settings,
        )
    print(report)
    forget_original(loaded)
    save_folder(
        loaded,
        output_dir,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        command=sys.argv,
        companions=model,
        revision=revision,
    )
    if kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
    print(f"saved in {output_dir}")


def _empty(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The model without weights."""
    from transformers import AutoConfig

    from hf_geglu.skeleton import architecture, skeleton

    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    kind = architecture(config)
    kwargs = {"trust_remote_code": True} if trust_remote_code and hasattr(kind, "from_config") else {}
    return skeleton(config, kind, **kwargs)


def _too_large(model: str, revision: str | None, trust_remote_code: bool) -> bool:
    import torch

    from hf_geglu.checkpoint.memory import free_memory, needed_to_run

    empty = _empty(model, revision, trust_remote_code)
    return needed_to_run(empty, empty.config.dtype or torch.float32) > free_memory()


def _layer_by_layer(
    model: str,
    output_dir: Path,
    *,
    calibrate: Sequence[str],
    tokens: int,
    revision: str | None,
    trust_remote_code: bool,
    **settings: Any,
) -> None:
    from hf_geglu.calibration import CalibrationData
    from hf_geglu.calibration.progress import batches_bar
    from hf_geglu.checkpoint import convert_checkpoint
    from hf_geglu.hub import load_processor

    tokenizer = load_processor(model, **({"revision": revision} if revision else {}))
    batches = mixed_batches(calibrate, _empty(model, revision, trust_remote_code), tokenizer, tokens=tokens)
    with batches_bar("calibrating, layer by layer") as calibrating:
        done = convert_checkpoint(
            model,
            output_dir,
            calibration=CalibrationData(batches=tuple(batches), name=_names(calibrate)),
            revision=revision,
            trust_remote_code=trust_remote_code,
            papers=True,
            command=sys.argv,
            calibration_progress=calibrating,
            **settings,
        )
    print(done)
    print(f"saved in {output_dir}")


def mixed_batches(texts: Sequence[str], model: Any, tokenizer: Any, *, tokens: int) -> list[dict[str, Any]]:
    """Batches of several texts, an equal share of each, in an order that is always the same; see `batches_of`."""
    import random

    from hf_geglu.cli.texts import batches_of

    share = -(-tokens // len(texts))
    batches = [batch for text in texts for batch in batches_of([text], model, tokenizer, tokens=share)]
    if len(texts) > 1:  # not in turn: every fourth batch is held out, and would be of one text
        random.Random(0).shuffle(batches)
    return batches


def _names(calibrate: Sequence[str]) -> str:
    return ", ".join(Path(name).name for name in calibrate)  # never a path of this machine


def _tokens(width: str, narrow: Stage) -> int:
    if width == "same":
        return TOKENS
    return HEAL_TOKENS if narrow == "heal" else NARROW_TOKENS
