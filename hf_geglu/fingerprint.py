"""Which weights are these? A short, cheap, deterministic answer: to refuse an adapter on another base or a delta on
another checkpoint, and to tell whether a replayed conversion arrived where the first one did.

Three digests, from what may change without harm to what may not:

* `structure`: names and shapes of the tensors, and what the FFN blocks compute (config). A variant and its
  unconverted base differ here, in any dtype, and also when bitsandbytes has quantised both.
* `values`: sampled values, rounded to bfloat16: the same for one checkpoint loaded in float32 or in bfloat16.
* `exact`: the same samples bit for bit, with their dtype.

Sampled, not hashed in full: `SAMPLES` elements a tensor cost milliseconds where 14 GB of SHA-256 cost 6 to 35 s, and
training, merging and converting move nearly every element. A forger is not who this is for; the SHA-256 of every
weights file is in the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hf_geglu.errors import WeightsError
from hf_geglu.modeling_geglu import TRIPWIRE

SAMPLES = 4096
"""Elements that are looked at in each tensor; smaller tensors are read whole."""

_STRIDE = 2654435761
"""Knuth's multiplicative hash (a prime near 2^32 / golden ratio): positions i * _STRIDE mod n are spread over rows and
columns alike, and the same on every machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Of a model without its head, where `base_model_prefix` tells the two apart: a classifier and a language model on
    the same base have the same one."""

    structure: str
    values: str | None
    """None where the values cannot be read: quantised, offloaded or distributed."""
    exact: str | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Read what `to_dict` wrote.

        Raises:
            WeightsError: it is something else.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise WeightsError(
                f"this is no fingerprint ({error}); expected the entries structure, values and exact"
            ) from error

    def difference(self, other: Fingerprint, *, bitwise: bool = False) -> str:
        """What tells `other` from this one, as a clause for an error message; empty where nothing does.

        Args:
            other: what is held against this one.
            bitwise: the dtype and every sampled bit count too.
        """
        if self.structure != other.structure:
            return "its FFN blocks, tensor names or shapes are others (an unconverted base, or another conversion)"
        if self.values is not None and other.values is not None and self.values != other.values:
            return "it has the same architecture but other weights"
        if bitwise and self.exact != other.exact:
            return "it has the same weights in another dtype or rounding"
        return ""


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of a model as it is now. Changes nothing.

    Adapters that PEFT has put around modules are looked through: a model with a LoRA has the fingerprint of its base
    until the adapter is merged. Poolers are left out, since transformers makes up those that a checkpoint lacks.

    Args:
        model: a transformers model, converted or not, or one wrapped by PEFT; any other module too.
    """
    model = _unwrapped(model)
    body, prefix = _body(model)
    structure = hashlib.sha256(json.dumps(_computes(getattr(model, "config", None), prefix), sort_keys=True).encode())
    values, exact = hashlib.sha256(), hashlib.sha256()
    readable = True
    for name, tensor, shape in sorted(_tensors(body), key=lambda entry: entry[0]):
        structure.update(f"{name} {shape}\n".encode())
        readable = readable and _readable(tensor)
        if not readable:
            continue
        taken = _sample(tensor)
        exact.update(f"{name} {tensor.dtype}\n".encode() + _bytes(taken))
        values.update(name.encode() + _bytes(taken.to(torch.bfloat16) if taken.is_floating_point() else taken))
    return Fingerprint(
        structure=structure.hexdigest(),
        values=values.hexdigest() if readable else None,
        exact=exact.hexdigest() if readable else None,
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    get_base_model = getattr(model, "get_base_model", None)  # PeftModel
    found = get_base_model() if callable(get_base_model) else model
    assert isinstance(found, nn.Module)
    return found


def _body(model: nn.Module) -> tuple[nn.Module, str]:
    """The model without its head, and what a head's names have before it."""
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    return (body if isinstance(body, nn.Module) else model), prefix


def _tensors(body: nn.Module) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...]]]:
    """(name, tensor, shape) of parameters and saved buffers, by the names that they have without adapters."""
    wrapped = {name for name, module in body.named_modules() if _is_adapter(module)}
    for path, module in body.named_modules():
        inside = [name for name in wrapped if path == name or path.startswith(f"{name}.")]
        if "pooler" in path or any(not _is_base_part(path, name) for name in inside):
            continue
        plain = path
        for name in sorted(inside, key=len, reverse=True):
            part = path[len(name) + 1 :].split(".", 1)
            plain = ".".join([name, *part[1:]])
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield f"{plain}.{key}".strip("."), tensor, _shape(module, key, tensor)


def _is_adapter(module: nn.Module) -> bool:
    """PEFT's tuner layers and its trainable copies of whole modules."""
    children = module._modules
    return ("base_layer" in children and hasattr(module, "adapter_layer_names")) or (
        "original_module" in children and "modules_to_save" in children
    )


def _is_base_part(path: str, wrapper: str) -> bool:
    return path[len(wrapper) + 1 :].split(".", 1)[0] in ("base_layer", "original_module")


def _shape(module: nn.Module, key: str, tensor: torch.Tensor) -> tuple[int, ...]:
    """As it would be unquantised: 4-bit weights are packed into bytes."""
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if key == "weight" and isinstance(d_in, int) and isinstance(d_out, int):
        return d_out, d_in
    return tuple(tensor.shape)


def _readable(tensor: torch.Tensor) -> bool:
    """Quantised and distributed tensors are subclasses; offloaded ones are on the meta device."""
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and not tensor.is_meta


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    count = flat.numel()
    if count > SAMPLES:
        flat = flat[(torch.arange(SAMPLES) * _STRIDE % count).to(flat.device)]
    return flat.cpu()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _computes(config: Any, prefix: str) -> Any:
    """What the config says of the FFN blocks: the activations it names, and a portable variant's sites."""
    if config is None:
        return {}
    names = {key: "geglu" if value == TRIPWIRE else value for key, value in _activations(config, "")}
    geglu = getattr(config, "geglu", None) or {}
    sites = [
        {key: value.removeprefix(f"{prefix}.") if isinstance(value, str) else value for key, value in site.items()}
        for site in geglu.get("sites", ())
    ]
    return {"activations": names, "base": geglu.get("config", {}), "sites": sites}


def _activations(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    from transformers import PretrainedConfig

    for key, value in sorted(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            yield from _activations(value, f"{prefix}{key}.")
        elif isinstance(value, str) and ("act" in key or value.startswith("gated-")):
            yield prefix + key, value
