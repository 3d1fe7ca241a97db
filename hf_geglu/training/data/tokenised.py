"""Tokens of rows, made once: kept as safetensors in the cache of `datasets`, under a key of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_geglu.training.data.bestfit import Documents
from hf_geglu.training.data.sources import Rows

logger = logging.getLogger(__name__)

FORMAT = 1
Told = dict[str, int]
"""What was counted while the documents were made."""


def tokens_of(
    rows: Rows, tokenizer: Any, make: Callable[[], tuple[Documents, Told]], *, depends_on: Any, use_cache: bool
) -> tuple[Documents, Told]:
    """What `make` makes, or made earlier of the same rows with the same tokenizer.

    Args:
        rows: a `datasets.Dataset`; it knows a fingerprint of what is in it.
        tokenizer: of Transformers.
        make: tokenises.
        depends_on: whatever else the result depends on, as plain data.
        use_cache: read and write the cache.
    """
    path = _place(rows, tokenizer, depends_on) if use_cache else None
    if path is None:
        return make()
    found = _read(path)
    if found is None:
        found = make()
        _write(path, *found)
    return found


def _place(rows: Rows, tokenizer: Any, depends_on: Any) -> Path | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    fingerprint = getattr(rows, "_fingerprint", None)
    if backend is None or fingerprint is None:
        return None  # nothing says what a tokenizer in Python would do
    import datasets

    key = json.dumps(
        [FORMAT, fingerprint, backend.to_str(), type(tokenizer).__name__, tokenizer.chat_template, depends_on],
        sort_keys=True,
        default=str,
    )
    name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:40]
    return Path(datasets.config.HF_DATASETS_CACHE) / "hf_geglu" / f"{name}.safetensors"


def _read(path: Path) -> tuple[Documents, Told] | None:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["told"])
            tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 - no mapping
        return Documents(tensors["tokens"], tensors["starts"], tensors.get("labels")), told
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # not there, or damaged: it is made again


def _write(path: Path, documents: Documents, told: Told) -> None:
    tensors = {"tokens": torch.from_numpy(documents.tokens), "starts": torch.from_numpy(documents.starts)}
    if documents.labels is not None:
        tensors["labels"] = torch.from_numpy(documents.labels)
    draft = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, metadata={"told": json.dumps(told)})
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:  # a full disk must not end a run that can do without
        draft.unlink(missing_ok=True)
        logger.info("tokens are not kept for the next run: %s", error.__class__.__name__)
