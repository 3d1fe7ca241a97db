"""The random generators of a process: seeded, saved and put back, without a pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def seed_generators(seed: int) -> None:
    """Seed what dropout and remote code may draw from. Processes differ, so that their dropout does."""
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed % 2**32)


def save_generators(path: Path) -> None:
    """The states of the random generators of torch, numpy and Python of this process."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    words: dict[str, str] = {"python": json.dumps(random.getstate())}
    try:
        import numpy
    except ImportError:
        pass
    else:
        words["numpy"] = json.dumps(numpy.random.get_state(), default=lambda array: array.tolist())
    save_file(tensors, path, metadata=words)


def load_generators(path: Path) -> None:
    """Put back what `save_generators` wrote, as far as this machine has such generators."""
    with safe_open(path, framework="pt") as file:
        words = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, state, gauss = json.loads(words["python"])
    random.setstate((version, tuple(state), gauss))
    if "numpy" in words:
        import numpy

        numpy.random.set_state(tuple(json.loads(words["numpy"])))
