"""The weights of a checkpoint: a model as `save_pretrained` writes it, and back into the live one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_geglu.errors import TrainingError
from hf_geglu.training.processes.sharded_model import plain_class
from hf_geglu.training.processes.sharding import is_shared, share
from hf_geglu.training.processes.tensor_file import FilesTogether, Source, part, stored_tensors


def write_weights(model: nn.Module, files: FilesTogether) -> None:
    """The model as `save_pretrained` writes it; one that is no model of Transformers as model.safetensors.

    The weights of a model that is shared out are gathered and written one by one, under the names they have in memory.
    """
    saver: Any = model
    shared = any(is_shared(parameter) for parameter in model.parameters())
    known = hasattr(saver, "save_pretrained")
    if known and not shared:
        files.alone(saver.save_pretrained, files.folder)
        return
    if known:  # config, generation config, code
        files.alone(saver.save_pretrained, files.folder, state_dict={})
    again = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in again}  # tied: saved once
    files.tensors("model", tensors)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a checkpoint into the live model; of a sharded one, the share of this process.

    Most architectures are saved under the names they have in memory. Some are renamed or split when they are saved
    (experts in Transformers 5): those are read by `from_pretrained`, which knows how.

    Raises:
        TrainingError: the checkpoint is not one of this model.
    """
    with stored_tensors(*sorted(folder.glob("model*.safetensors"))) as stored:
        tensors: Mapping[str, Source] = stored
        own = model.state_dict()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        known = tensors.keys() & own.keys()
        at = {id(parameters[name]) for name in known & parameters.keys()}
        absent = [name for name in own.keys() - known if id(parameters.get(name)) not in at]
        if absent or len(known) < len(tensors):
            tensors = _load_renamed_weights(model, folder)
        different = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
        if different:
            raise _other_model(folder, f"{min(different)} has another shape")
        with torch.no_grad():
            for name, tensor in tensors.items():
                share(own[name]).copy_(part(tensor, own[name]))


def _load_renamed_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    kind: Any = plain_class(model)
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
