"""The fits of a calibrated variant: the few numbers a neuron that its plan does not hold (and a correction of
low rank), beside its manifest.

With them a conversion is replayed bit for bit, without the data it was calibrated on. New weights of a whole block are
not kept: they are as large as the block that was saved.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_geglu.conversions import Coefficients
from hf_geglu.errors import ManifestError
from hf_geglu.hub.manifest import FOLDER
from hf_geglu.plan import Plan
from hf_geglu.surgery import Fits

FITS = f"{FOLDER}/fits.safetensors"


def write_fits(folder: Path, fits: Fits | None) -> None:
    """Write those that are small; no file where there are none."""
    tensors: dict[str, torch.Tensor] = {}
    for path, fit in (fits or {}).items():
        if isinstance(fit, Coefficients):
            tensors |= {f"{path}|{name}": tensor.cpu().clone() for name, tensor in fit.tensors().items()}
    if tensors:
        (folder / FOLDER).mkdir(exist_ok=True)
        save_file(tensors, folder / FITS)


def read_fits(folder: Path, plan: Plan | None) -> Fits | None:
    """What a plan was carried out with; None where it needs nothing.

    Raises:
        ManifestError: the plan was fitted, and the numbers are not here, or cannot be read.
    """
    fitted = [entry.site.up for entry in plan.converted if entry.fitted] if plan is not None else []
    if not fitted:
        return None
    held: dict[str, dict[str, torch.Tensor]] = {}
    if (folder / FITS).is_file():
        try:
            with safe_open(folder / FITS, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    path, _, name = key.rpartition("|")
                    held.setdefault(path, {})[name] = file.get_tensor(key)
            fits = {path: Coefficients.from_tensors(tensors) for path, tensors in held.items()}
        except (SafetensorError, TypeError) as error:
            raise ManifestError(f"{FITS} cannot be read ({error}); it is damaged. Download it again") from error
    else:
        fits = {}
    missing = [path for path in fitted if path not in fits]
    if missing:
        raise ManifestError(
            f"{len(missing)} blocks were fitted to data ({missing[0]} first), and {FITS} does not hold their numbers: "
            "new weights of a whole block are not kept a second time. The conversion cannot be replayed; calibrate "
            "again with the data that the manifest names"
        )
    return fits
