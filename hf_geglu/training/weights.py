"""The weights of a checkpoint: a model as `save_pretrained` writes it, and back into the live one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_geglu.errors import TrainingError


def save_weights(model: nn.Module, folder: Path) -> None:
    """The model as `save_pretrained` writes it; one that is no model of Transformers as model.safetensors."""
    saver: Any = model
    if hasattr(saver, "save_pretrained"):
        saver.save_pretrained(folder)
        return
    seen: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if seen.setdefault(tensor.data_ptr(), name) == name or tensor.numel() == 0:  # tied weights are saved once
            tensors[name] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a checkpoint into the live model.

    Most architectures are saved under the names they have in memory. Some are renamed or split when they are saved
    (experts in Transformers 5): those are read by `from_pretrained`, which knows how.

    Raises:
        TrainingError: the checkpoint is not one of this model.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
    own = model.state_dict()
    shared = tensors.keys() & own.keys()
    at = {own[name].data_ptr() for name in shared}
    absent = [name for name in own if name not in tensors and own[name].data_ptr() not in at]
    if absent or len(shared) < len(tensors):
        tensors = _load_renamed_weights(model, folder)
    different = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    if different:
        raise _other_model(folder, f"{min(different)} has another shape")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _load_renamed_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    kind: Any = type(model)
    config: Any = getattr(model, "config", None)
    described = folder / "config.json"
    saved_type = json.loads(described.read_text(encoding="utf-8")).get("model_type") if described.exists() else None
    if saved_type is None or saved_type != getattr(config, "model_type", None):
        raise _other_model(folder, "the names of the weights differ")
    try:
        loaded, info = kind.from_pretrained(folder, dtype=next(model.parameters()).dtype, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise _other_model(folder, str(error).split("\n")[0]) from error
    # from_pretrained makes up what it does not find, and only logs it.
    made_up = [*info["missing_keys"], *info["mismatched_keys"]]
    if made_up or loaded.state_dict().keys() != model.state_dict().keys():
        raise _other_model(folder, f"{len(made_up)} weights are missing or have another shape")
    tensors: dict[str, Tensor] = loaded.state_dict()
    return tensors


def _other_model(folder: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"{folder.name} does not fit the model: {reason}. Expected a checkpoint of this very model. Give the model, "
        "--convert, --variant and --layers that the checkpoint was made with."
    )
