"""Calibrates a checkpoint layer by layer, and keeps the result until the conversion is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from hf_geglu.calibration import CalibrationData, Progress
from hf_geglu.calibration.layerwise import calibrate_layerwise
from hf_geglu.calibration.shelf import Shelf
from hf_geglu.checkpoint.blueprint import Blueprint
from hf_geglu.checkpoint.reading import Reader
from hf_geglu.checkpoint.rules import compute_buffers
from hf_geglu.conversions import Coefficients
from hf_geglu.errors import PlanError
from hf_geglu.plan import Plan
from hf_geglu.sites import GivenSite, find_sites
from hf_geglu.skeleton import skeleton
from hf_geglu.surgery import Fits

_RESULT, _FIT = "result", "fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a calibration decided."""

    plan: Plan
    fits: Fits
    held_out: str | None
    """What the whole conversion costs on the held-out data, in words."""
    notes: tuple[str, ...]


def calibrate_checkpoint(
    drawn: Blueprint,
    data: CalibrationData,
    *,
    sources: Sequence[Path],
    sites: Sequence[GivenSite] | None,
    max_kl: float | None,
    folder: Path,
    progress: Progress | None,
) -> Result:
    """Fit and choose, as `hf_geglu.calibration.calibrate` does in memory.

    Args:
        drawn: of an open checkpoint, without fits.
        data: see there.
        sources: the files of the weights.
        sites: named by hand, as the plan was made with.
        max_kl: see there.
        folder: where intermediate results are kept; those of another calibration are removed.
        progress: see `calibrate_layerwise`.

    Raises:
        PlanError: the plan is calibrated already, or makes blocks narrower.
        HfGegluError: see `calibrate_layerwise`.
    """
    if drawn.plan.calibration is not None:
        raise PlanError("the plan is calibrated already; hand in its fits=, or calibration= with a plan without any")
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    key = {
        "sources": files,
        "dtype": str(drawn.dtype),
        "plan": drawn.plan.to_dict(),
        "data": data.fingerprint,
        "name": data.name,
        "max_kl": max_kl,
        "versions": [torch.__version__, transformers.__version__],
    }
    shelf = Shelf.anew(folder, key)
    kept = shelf.read_lines(_RESULT)
    if kept is None:
        model = skeleton(drawn.base.config, type(drawn.base), buffers=True)
        compute_buffers(model)
        made = calibrate_layerwise(
            model,
            drawn.plan,
            data,
            Reader(drawn),
            found=find_sites(drawn.base, sites=sites),
            shelf=shelf,
            max_kl=max_kl,
            progress=progress,
        )
        lines = {path: {_FIT: fit} for path, fit in made.fits.items() if isinstance(fit, Coefficients)}
        held_out = None if made.held_out is None else str(made.held_out)
        shelf.write_lines(_RESULT, lines, [made.plan.to_json(), held_out, list(made.notes)])
        kept = shelf.read_lines(_RESULT)
        assert kept is not None
    shelf.keep_only(_RESULT)
    lines, (plan, held_out, notes) = kept
    fits = {path: methods[_FIT] for path, methods in lines.items()}
    return Result(plan=Plan.from_json(plan), fits=fits, held_out=held_out, notes=tuple(notes))


def digest_of(fits: Fits) -> list[str]:
    """What tells two sets of fits apart; plain JSON."""
    import hashlib

    found = []
    for path in sorted(fits):
        fit = fits[path]
        digest = hashlib.sha256(path.encode())
        for name, tensor in sorted(fit.tensors().items()) if isinstance(fit, Coefficients) else ():
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found.append(digest.hexdigest())
    return found
