"""The reading side: loads a saved variant in a process that never built it, and compares outputs.

Knows torch, transformers and safetensors. A "plugin" job imports hf_geglu; a "remote" or "plain" job asserts that
nobody did.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from benchmarks.sweep.forking import Job, Keep
from benchmarks.sweep.outputs import distance, run


def read(job: Job, keep: Keep) -> Job:
    """Load one folder in one way.

    Args:
        job: `way` (plugin, remote or plain), `folder`, `auto` (name of the Auto class, or None), `module` and `class`
            of the unconverted model.
        keep: see `forking`.

    Returns:
        class, difference (None where the model was not run before saving), weights (how many tensors of the state
        differ), missing and unexpected keys, or error.
    """
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    with tempfile.TemporaryDirectory() as modules:
        os.environ["HF_MODULES_CACHE"] = modules
        try:
            model, info = _load(job, folder, modules)
            return _compared(model, info, folder) | _innocence(job["way"])
        except Exception as error:  # whatever loading meets is this row's result
            return {"error": f"{type(error).__name__}: {error}"[:600]}


def _load(job: Job, folder: Path, modules: str) -> tuple[Any, dict[str, Any]]:
    keys: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
    if job["way"] == "remote":
        from transformers import dynamic_module_utils
        from transformers.utils import hub

        hub.HF_MODULES_CACHE = dynamic_module_utils.HF_MODULES_CACHE = modules  # read when transformers was imported
        keys["trust_remote_code"] = True
    if job["way"] == "plugin":
        import hf_geglu
    if job["auto"]:
        loader = getattr(transformers, job["auto"])
    elif job["way"] == "plugin":
        loader = hf_geglu.modeling_geglu.variant_model_class(*_base(job))
    else:
        loader = _base(job)[0]
    loaded: tuple[Any, dict[str, Any]] = loader.from_pretrained(folder, **keys)
    return loaded


def _base(job: Job) -> tuple[Any, Any]:
    cls = getattr(importlib.import_module(job["module"]), job["class"])
    return cls, cls.config_class


def _compared(model: Any, info: dict[str, Any], folder: Path) -> Job:
    expected = load_file(folder / "expected" / "state.safetensors")
    state = model.state_dict()
    different = sorted({*expected} ^ {*state}) + [
        name
        for name, tensor in expected.items()
        if name in state and not torch.equal(state[name].to(tensor.dtype).contiguous(), tensor)
    ]
    difference = None
    path = folder / "expected" / "run.safetensors"
    if path.exists():
        tensors = load_file(path)
        inputs = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("in.")}
        inputs |= json.loads((folder / "expected" / "flags.json").read_text(encoding="utf-8"))
        outputs = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("out.")}
        difference = distance(outputs, run(model, inputs))[0]
    return {
        "class": type(model).__name__,
        "difference": difference,
        "weights": different[:5],
        "missing": sorted(info["missing_keys"])[:5],
        "unexpected": sorted(info["unexpected_keys"])[:5],
        "mismatched": sorted(str(key) for key in info["mismatched_keys"])[:5],
    }


def _innocence(way: str) -> Job:
    knew = "hf_geglu" in sys.modules
    return {"error": "hf_geglu was imported where it must not be"} if knew and way != "plugin" else {}
