"""What a variant is read from: its folder or repository, and the base that it was made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_geglu.errors import HfGegluError, ManifestError
from hf_geglu.fingerprint import fingerprint
from hf_geglu.hub.loading import load
from hf_geglu.hub.manifest import Manifest


def fetch_folder(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None, cache: Path | None = None
) -> Path:
    """A local folder as it is, or a snapshot of a Hub repository.

    Raises:
        ManifestError: neither is there.
    """
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, token=token, cache_dir=cache))
    except (OSError, ValueError) as error:  # HFValidationError is the second
        reason = str(error).strip().split("\n")[0]
        raise ManifestError(
            f"{Path(source).name if Path(source).is_absolute() else source} is neither a folder nor a repository that "
            f"can be read from the Hub ({reason}); check the name, the network and your login"
        ) from error


def load_base(
    manifest: Manifest,
    base: str | os.PathLike[str] | None,
    *,
    auto_class: Any = None,
    token: str | None = None,
    **kwargs: Any,
) -> Any:
    """The base of a variant in the dtype it was converted in, without regard to whether it is the right one.

    Raises:
        ManifestError: the manifest names no base on the Hub and none was given, or it cannot be loaded.
    """
    told, plan = manifest.provenance.base, manifest.provenance.plan
    assert plan is not None
    where = base if base is not None else told.id
    if where is None:
        raise ManifestError(
            f"the base {told.name!r} was a local folder, so it cannot be fetched; say where it is: --base FOLDER"
        )
    model_class = auto_class or getattr(transformers, plan.model_class, None)
    if model_class is None:
        raise ManifestError(
            f"transformers {transformers.__version__} has no {plan.model_class}; install "
            f"{manifest.versions.get('transformers', 'the version that the manifest names')}"
        )
    source: dict[str, Any] = {"token": token}
    if base is None and told.commit is not None:
        source["revision"] = told.commit
    try:
        if hasattr(transformers.AutoConfig.from_pretrained(where, **source), "geglu"):
            raise ManifestError(f"{Path(where).name} is a GeGLU variant itself; expected the base {told.name!r}")
        return load(model_class, where, **{"dtype": getattr(torch, plan.dtype), **source, **kwargs})
    except HfGegluError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # not there, or of another architecture
        reason = str(error).strip().split("\n")[0]
        raise ManifestError(f"the base {told.name!r} cannot be loaded: {reason} Name another place: --base") from error


def check_base(model: Any, manifest: Manifest) -> str:
    """What tells `model` from the base that was converted; empty where nothing does."""
    expected = manifest.provenance.base.fingerprint
    return "" if expected is None else expected.difference(fingerprint(model), bitwise=True)
