"""Checkpoints for tests: what is in a folder, the same conversion in memory, and folders edited on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import hf_geglu

SHARD = "15KB"


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_memory(source: Path, target: Path, model_class: Any, *, dtype: Any = "auto", **settings: Any) -> None:
    """Load, convert, save."""
    model = model_class.from_pretrained(source, dtype=dtype)
    hf_geglu.convert(model, verify="sites", **settings)
    model.save_pretrained(target, max_shard_size=SHARD)


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace a folder's weights by one file of what `edit` makes of them."""
    tensors = weights_in(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    edited = {name: tensor.contiguous() for name, tensor in edit(tensors).items()}
    save_file(edited, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
