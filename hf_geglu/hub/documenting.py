"""Papers for a folder that `save_pretrained` made: its provenance is not believed but found, by converting the base."""

from __future__ import annotations

import os
from pathlib import Path

from hf_geglu.converting import convert
from hf_geglu.errors import ManifestError
from hf_geglu.fingerprint import fingerprint
from hf_geglu.hub.loading import load
from hf_geglu.hub.manifest import MANIFEST, Manifest
from hf_geglu.hub.papers import write_papers
from hf_geglu.modeling_geglu import CLASS_PREFIX, base_class
from hf_geglu.planning import make_plan
from hf_geglu.provenance import recall
from hf_geglu.selection import Layers
from hf_geglu.skeleton import architecture


def document_folder(
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    revision: str | None = None,
    variant: str = "geglu",
    layers: Layers = None,
) -> Manifest:
    """Write golden outputs, manifest and card of a variant that was saved without them.

    The base is converted again; only if that gives the architecture that is in the folder are the papers written.

    Args:
        folder: holds a variant.
        base: Hub id or folder of what it was converted from.
        revision: of the base on the Hub.
        variant: as in `convert`.
        layers: as in `convert`.

    Raises:
        ManifestError: there is a manifest already, or the folder is no such variant of that base.
        HfGegluError: what loading and converting raise.
    """
    from transformers import AutoConfig

    place = Path(folder)
    if not place.is_dir():
        raise ManifestError(f"{place.name} is no folder; expected one that holds a variant")
    if (place / MANIFEST).exists():
        raise ManifestError(f"{place.name} has a manifest already; check it with `hf-geglu verify`")
    saved = load(architecture(AutoConfig.from_pretrained(place)), place, dtype="auto")
    original = load(_base_class(type(saved)), base, dtype=saved.dtype, revision=revision or "main")
    convert(original, make_plan(original, variant, layers=layers), verify="model")
    if fingerprint(original).structure != fingerprint(saved).structure:  # other weights are training
        raise ManifestError(
            f"converting {Path(base).name} to {variant} does not give the blocks, tensor names and shapes that are in "
            f"{place.name}; say the right base, variant and layers"
        )
    provenance = recall(original)
    if provenance is None:
        raise ManifestError(f"{Path(base).name} is {variant} already, so {place.name} is no conversion of it")
    local = Path(base) if os.path.isdir(base) else None
    return write_papers(place, provenance, model=saved, base_folder=local)


def _base_class(saved: type) -> type:
    return base_class(saved.__name__) if saved.__name__.startswith(CLASS_PREFIX) else saved
