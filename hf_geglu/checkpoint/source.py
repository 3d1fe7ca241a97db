"""Where a checkpoint comes from: a folder, or the Hub by way of its cache."""

from __future__ import annotations

import os
from pathlib import Path

from hf_geglu.errors import WeightsError
from hf_geglu.files.weights import WeightFiles, find_weights

_TEXTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "*.md", "LICEN[CS]E*", "NOTICE*", "*_Dense/*"]
_SAFETENSORS, _TORCH = ["model*.safetensors"], ["pytorch_model*.bin"]


def fetch(source: str | os.PathLike[str], *, revision: str | None = None) -> tuple[Path, WeightFiles]:
    """The folder of a checkpoint and its weights. A Hub id is downloaded into the Hub's cache, weights in one format.

    Raises:
        WeightsError: no weights that can be converted file by file; or the index is damaged.
        OSError: the repository cannot be had.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists():
            raise WeightsError(f"{folder.name} is a file; expected the folder of a checkpoint, or a Hub id")
        folder = _download(os.fspath(source), revision, [*_TEXTS, *_SAFETENSORS])
        if not any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
            folder = _download(os.fspath(source), revision, [*_TEXTS, *_TORCH])
    weights = find_weights(folder)
    if weights is None:
        seen = sorted(path.name for path in folder.iterdir())[:8]
        raise WeightsError(
            f"{folder.name} holds no weights that transformers would load; expected model.safetensors, "
            f"pytorch_model.bin or the index of either, found {', '.join(seen) or 'nothing'}"
        )
    return folder, weights


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise WeightsError(f"{repository} is neither a folder nor a Hub id") from error
