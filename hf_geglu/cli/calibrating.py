"""`hf-geglu convert --calibrate`: in memory, since a calibration runs the model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        calibrate: files, a folder of them, a dataset, or "builtin".
        tokens: of the text to use, `TOKENS` by default; a quarter of them chooses between conversions, or measures.
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
    from hf_geglu.cli.texts import batches_of, open_model
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
    check_output(output_dir, overwrite=overwrite)
    loaded = open_model(model, revision=revision)
    tokenizer = load_processor(model, **({"revision": revision} if revision else {}))
    names = ", ".join(Path(name).name for name in calibrate)  # never a path of this machine
    data = CalibrationData(
        batches=tuple(batches_of(calibrate, loaded, tokenizer, tokens=tokens or _tokens(width, narrow))), name=names
    )
    with batches_bar("calibrating") as progress:
        report = convert(
            loaded,
            calibration=data,
            max_kl=max_kl,
            progress=progress,
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
    print(f"saved in {output_dir}")


def _tokens(width: str, narrow: Stage) -> int:
    if width == "same":
        return TOKENS
    return HEAL_TOKENS if narrow == "heal" else NARROW_TOKENS
