"""convert_checkpoint: a folder of weights in, a folder of the variant's weights out, tensor by tensor."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from hf_geglu.calibration import CalibrationData
from hf_geglu.calibration import Progress as CalibrationProgress
from hf_geglu.checkpoint.blueprint import Wish, draw
from hf_geglu.checkpoint.calibrating import Result, calibrate_checkpoint, digest_of
from hf_geglu.checkpoint.carry import belongings
from hf_geglu.checkpoint.job import Job, fingerprint, left_to_tidy
from hf_geglu.checkpoint.layout import shards
from hf_geglu.checkpoint.proof import Verify
from hf_geglu.checkpoint.source import fetch
from hf_geglu.checkpoint.stored import open_checkpoint
from hf_geglu.checkpoint.work import Progress, Work, carry_out, documented
from hf_geglu.errors import HfGegluError, OutputError, PlanError
from hf_geglu.files.folder import check_output, said_when_full, workplace
from hf_geglu.plan import GeluForm, Plan
from hf_geglu.selection import Layers
from hf_geglu.sites import GivenSite
from hf_geglu.surgery import Fits
from hf_geglu.verify import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedCheckpoint:
    """What was done. Frozen; prints itself."""

    folder: Path
    plan: Plan
    report: Report
    tensors: int
    """How many were written."""
    changed: int
    """How many of them are not copies."""
    bytes: int
    resumed: int
    """Shards that an attempt before had finished."""
    dropped: tuple[str, ...]
    """Tensors of the source that the model class has no use for."""
    absent: tuple[str, ...]
    """Parameters that the source does not hold; whoever loads the variant gets them made up, as with the source."""
    left: tuple[str, ...]
    """Files of the source that were not carried over."""

    def __str__(self) -> str:
        lines = [
            str(self.report),
            f"  {self.tensors:,} tensors, {self.bytes / 1e6:,.1f} MB: {self.changed:,} changed, "
            f"{self.tensors - self.changed:,} copied"
            + (f"; {self.resumed} files were there from an attempt before" if self.resumed else ""),
        ]
        for what, names in (
            ("not used by this class, left out", self.dropped),
            ("not in the checkpoint, will be made up when loading", self.absent),
            ("files not carried over", self.left),
        ):
            if names:
                lines.append(f"  {what}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if names[6:] else ''}")
        return "\n".join(lines)


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    fits: Fits | None = None,
    calibration: CalibrationData | Iterable[Any] | None = None,
    max_kl: float | None = None,
    tokenizer: Any = None,
    variant: str = "geglu",
    layers: Layers = None,
    gelu: GeluForm = "owner",
    sites: Sequence[GivenSite] | None = None,
    dtype: str | torch.dtype = "auto",
    verify: Verify = "sites",
    model_class: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    papers: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
    calibration_progress: CalibrationProgress | None = None,
) -> ConvertedCheckpoint:
    """Convert a checkpoint that need not fit into memory.

    Tensors that do not change are copied as bytes, the others are computed in pieces by the functions that `convert`
    uses, so the result has the same bits as loading, converting and saving. Configs, tokenizer, chat template and
    licence go along. The target appears when it is complete. Killed, the same call goes on where it stopped.

    Args:
        source: folder with safetensors or torch .bin files (those are opened with ``weights_only``), or a Hub id.
        target: folder to write. Must not exist, or be empty, unless `overwrite`.
        plan: from `make_plan`; the arguments `variant`, `layers` and `gelu` make one otherwise.
        fits: the tensors that belong to a plan whose sites were fitted.
        calibration: data to fit every block's conversion to, see `hf_geglu.convert`. The model is run one layer at a
            time: memory is needed for one layer, its sums and one batch (`hf_geglu.calibration.layerwise`), and disk
            beside the target for what the layers return. The choice and the numbers are those of a calibration in
            memory up to rounding.
        max_kl: nats a token that the conversion may cost on the held-out quarter, see `hf_geglu.convert`.
        tokenizer: for calibration texts.
        variant: see `make_plan`.
        layers: see `make_plan`.
        gelu: see `make_plan`.
        sites: named by hand, for an architecture that the search does not understand; see `find_sites`.
        dtype: as in ``from_pretrained``: "auto" is the one that the config names.
        verify: "sites" checks every converted block of the written files in float64; "model" also runs the original and
            the variant, one after the other, and needs memory for one of them; "auto" does so where that much is free;
            "none" does neither.
        model_class: a model class or Auto class to open the checkpoint as; None for the one that its config names.
        max_shard_size: largest weights file, in bytes or as "5GB".
        overwrite: replace what `target` holds, once the new folder is complete.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the modelling code of the checkpoint.
        papers: write manifest and model card, too (see `hf_geglu.hub.papers`); this reads every file again, for its
            SHA-256. Where the whole model was run, golden outputs are among them.
        command: words of the command that made it, for the papers.
        progress: called with (bytes done, bytes in all).
        calibration_progress: called with (layers passed by a batch, of about how many).

    Returns:
        What was done, with the report of the verification.

    Raises:
        WeightsError: weights, index or config are damaged or do not belong together; NaN or infinity in what changes.
        PlanError: the plan does not fit, or this conversion cannot be done tensor by tensor; says what to do instead.
        VerificationError: the written files are not what the plan promised; `target` was not made.
        OutputError: `target` must not be written, or there is no room.
        HfGegluError: any other of the tree in `hf_geglu.errors`.
    """
    if verify not in get_args(Verify):
        raise PlanError(f"verify={verify!r}; expected one of {', '.join(get_args(Verify))}")
    if max_kl is not None and calibration is None:
        raise PlanError("max_kl is measured on calibration data; expected calibration=... beside it")
    if fits is not None and calibration is not None:
        raise PlanError("fits= and calibration= were both given; expected the fits that belong to the plan, or data")
    data = None if calibration is None else CalibrationData.of(calibration, tokenizer=tokenizer)
    place = Path(target)
    if not left_to_tidy(place):
        check_output(place, overwrite=overwrite)
    folder, weights = fetch(source, revision=revision)
    if folder.resolve() == place.resolve():
        raise OutputError("source and target are the same folder; choose another output folder")
    wish = Wish(
        plan=plan,
        variant=variant,
        layers=layers,
        gelu=gelu,
        sites=sites,
        dtype=dtype,
        model_class=model_class,
        trust_remote_code=trust_remote_code,
        fits=fits or {},
    )
    with said_when_full(_full(place)), open_checkpoint(weights) as stored, tempfile.TemporaryDirectory() as scratch:
        drawn = draw(folder, stored, wish, papers=_folder(scratch, "planned"))
        shards(drawn.outputs, max_shard_size)  # what is wrong with it is said before a long calibration
        with workplace(place) as here:
            try:
                found: Result | None = None
                if data is not None:
                    found = calibrate_checkpoint(
                        drawn,
                        data,
                        sources=weights.paths,
                        sites=sites,
                        max_kl=max_kl,
                        folder=here.root / "calibration",
                        progress=calibration_progress,
                    )
                    # the settings are in the plan now
                    wish = replace(wish, plan=found.plan, fits=found.fits, variant="geglu", layers=None, gelu="owner")
                    drawn = draw(folder, stored, replace(wish, sites=None), papers=_folder(scratch, "calibrated"))
                code = drawn.plan.tier == "native" and trust_remote_code
                work = Work(
                    folder=folder,
                    papers=Path(scratch) / ("planned" if found is None else "calibrated"),
                    drawn=drawn,
                    found=found,
                    shards=shards(drawn.outputs, max_shard_size),
                    files=belongings(folder, (*weights.names, *_indices(folder)), code=code),
                    verify=verify,
                    document=documented(command, place.resolve().name, max_shard_size) if papers else None,
                )
            except OutputError:  # no room: what was found so far is kept
                if data is None:
                    here.clear()
                raise
            except HfGegluError:
                here.clear()
                raise
            settings = {
                "plan": drawn.plan.to_dict(),
                "fits": digest_of(drawn.fits),
                "torch": torch.__version__,
                "files": work.files.carried,
            }
            mark = fingerprint(work.shards, weights.paths, settings)
            job = Job(here, mark, work.shards)
            try:
                with said_when_full(_full(place)):
                    report, resumed = carry_out(work, job, overwrite, progress)
            except OutputError:
                if len(job.pending()) == len(job.shards):
                    here.clear()
                raise
            except HfGegluError:
                here.clear()
                raise
            here.clear()
    return ConvertedCheckpoint(
        folder=place,
        plan=drawn.plan,
        report=report,
        tensors=len(drawn.outputs),
        changed=sum(not output.copied for output in drawn.outputs),
        bytes=sum(shard.nbytes for shard in work.shards),
        resumed=resumed,
        dropped=drawn.dropped,
        absent=drawn.absent,
        left=work.files.left,
    )


def _folder(scratch: str, name: str) -> Path:
    path = Path(scratch) / name
    path.mkdir()
    return path


def _indices(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.index.json")]


def _full(place: Path) -> Callable[[str], OutputError]:
    """The error of a folder that there is no room for, given the words of the system."""
    return lambda reason: OutputError(
        f"no room to write {place.name} ({reason}). Make room, or choose another place, and run the same "
        "command again: it goes on where it stopped"
    )
