"""Golden outputs: what a variant answers to a fixed small input, saved beside its weights, so that whoever loads it can
see that it is still the same network.

The file is a few KB. Of large outputs a fixed selection is kept (evenly spaced along each dimension, as its metadata
says), and the SHA-256 of the whole output, which tells "the same bits" from "the same up to rounding".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_geglu.distance import cast, outputs_of
from hf_geglu.errors import ManifestError
from hf_geglu.inputs import synthetic_inputs
from hf_geglu.modes import evaluating
from hf_geglu.verify import EXACT_NOISE

SEED = 0
KEPT = (2, 16, 16, 16)
"""How much of each dimension but the last one is kept."""
KEPT_LAST = 64
"""How much of the last one (vocabulary, hidden size): 2 x 16 x 64 floats are 8 KB."""
STORED_INPUT = 4096
"""Inputs up to this many elements are stored; larger ones (pictures) are drawn again from the seed."""
LOW_PRECISION_NOISE = 16
"""Rounding steps of a 16-bit dtype, relative to the largest output, that another machine may be off by. Such a type
cannot tell more; the SHA-256 of the weights can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenCheck:
    """How a model's outputs compare with the golden ones."""

    output: str
    identical: bool
    """The same bits, all of them."""
    max_abs: float
    """Largest difference of what was kept; infinite where shapes differ."""
    allowed: float
    """What another machine's rounding explains."""

    @property
    def ok(self) -> bool:
        """Whether this is the same network."""
        return self.identical or self.max_abs <= self.allowed


def write_golden(model: nn.Module, path: Path) -> str | None:
    """Run the model on synthetic inputs and keep inputs and outputs.

    Args:
        model: in memory as a whole, on one device.
        path: of the file; its folder is made.

    Returns:
        None, or why there are no golden outputs: no inputs that the config suggests can be run, the model is offloaded
        or distributed, or its outputs cannot be kept.
    """
    try:
        if any(parameter.is_meta or hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            return "the model was offloaded or distributed when it was saved"
        inputs = synthetic_inputs(model, seed=SEED)
        if inputs is None:
            return "nothing that its config and its forward say of its inputs can be run"
        with evaluating(model), torch.no_grad():
            outputs = outputs_of(model, inputs)
    except Exception as error:  # whatever a model has against made-up inputs must not cost its owner the save
        return f"its forward failed on synthetic inputs: {type(error).__name__}"
    tensors: dict[str, torch.Tensor] = {}
    flags = {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)}
    about: dict[str, Any] = {"schema": 1, "seed": SEED, "inputs": {}, "flags": flags, "outputs": {}}
    for name, value in inputs.items():
        if name in flags:
            continue
        stored = value.numel() <= STORED_INPUT
        if stored:
            tensors[f"in.{name}"] = value.cpu().contiguous()
        about["inputs"][name] = {"stored": stored, "sha256": _digest(value), "shape": list(value.shape)}
    for name, value in outputs.items():
        kept = _kept(value)
        tensors[f"out.{name}"] = kept
        finite = value[torch.isfinite(value)].double().abs()
        about["outputs"][name] = {
            "sha256": _digest(value),
            "shape": list(value.shape),
            "kept": "all" if kept.shape == value.shape else f"{list(kept.shape)}, evenly spaced in each dimension",
            "largest": finite.max().item() if finite.numel() else 0.0,
        }
    parameter = next(model.parameters())
    about |= {"dtype": str(parameter.dtype).removeprefix("torch."), "device": parameter.device.type}
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"golden": json.dumps(about)})
    return None


def check_golden(model: nn.Module, path: Path) -> tuple[GoldenCheck, ...]:
    """Run the model on the golden inputs and compare, output by output.

    Raises:
        ManifestError: the file is damaged, or its inputs cannot be made again.
    """
    tensors, about = _read(path)
    inputs = _inputs(model, tensors, about)
    with evaluating(model), torch.no_grad():
        outputs = outputs_of(model, cast(inputs | about["flags"], model))
    checks = []
    for name, told in about["outputs"].items():
        golden, value = tensors[f"out.{name}"], outputs.get(name)
        steps = LOW_PRECISION_NOISE if torch.finfo(golden.dtype).bits <= 16 else EXACT_NOISE
        allowed = steps * torch.finfo(golden.dtype).eps * told["largest"]
        if value is None or list(value.shape) != told["shape"]:
            checks.append(GoldenCheck(output=name, identical=False, max_abs=float("inf"), allowed=allowed))
            continue
        identical = value.dtype == golden.dtype and _digest(value) == told["sha256"]
        distance = 0.0 if identical else _distance(golden, _kept(value))
        checks.append(GoldenCheck(output=name, identical=identical, max_abs=distance, allowed=allowed))
    return tuple(checks)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["golden"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        about.setdefault("flags", {})
        needed = {f"out.{name}" for name in about["outputs"]} | {
            f"in.{name}" for name, told in about["inputs"].items() if told["stored"]
        }
        if about["schema"] > 1 or not needed <= tensors.keys():
            raise KeyError(f"schema {about['schema']}, tensors {sorted(tensors)}")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{path.name} cannot be read ({error}); download it again") from error
    return tensors, about


def _inputs(model: nn.Module, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    stored = {name: tensors[f"in.{name}"] for name, told in about["inputs"].items() if told["stored"]}
    if len(stored) == len(about["inputs"]):
        return stored
    drawn = synthetic_inputs(model, seed=about["seed"]) or {}
    inputs = {name: stored.get(name, drawn.get(name)) for name in about["inputs"]}
    made = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    wrong = [
        name for name, told in about["inputs"].items() if name not in made or _digest(made[name]) != told["sha256"]
    ]
    if wrong:
        raise ManifestError(
            f"the golden inputs {', '.join(wrong)} cannot be made again: this torch ({torch.__version__}) draws other "
            "random numbers, or the config was changed; compare with the torch version that the manifest names"
        )
    return made


def _kept(value: torch.Tensor) -> torch.Tensor:
    for axis, size in enumerate(value.shape):
        limit = KEPT_LAST if axis == value.dim() - 1 else KEPT[min(axis, len(KEPT) - 1)]
        if size > limit:
            index = torch.arange(limit, device=value.device) * size // limit
            value = value.index_select(axis, index)
    return value.detach().cpu().contiguous()


def _distance(golden: torch.Tensor, value: torch.Tensor) -> float:
    """Largest difference; masked logits are -inf in both, and equal."""
    a, b = golden.double(), value.double()
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    return float(difference.max()) if difference.numel() else 0.0


def _digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
