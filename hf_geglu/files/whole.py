"""A safetensors file that is there completely, on the disk, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_geglu.files.folder import sync


def write_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors under another name and give the file its own when it has reached the disk."""
    draft = path.with_name(f"{path.name}.draft")
    held: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        held[name] = tensor.clone(memory_format=torch.contiguous_format) if place in seen else tensor.contiguous()
        seen.add(place)
    save_file(held, draft, metadata=metadata)
    sync(draft)
    draft.replace(path)
