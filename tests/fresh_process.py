"""Load a saved variant in a process of its own and compare its outputs with those of the model that was saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_geglu.distance import outputs_of
from hf_geglu.inputs import synthetic_inputs
from hf_geglu.modes import evaluating

_READ = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from safetensors.torch import load_file
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # as in conftest.py: another number of threads sums in another order
jobs = json.loads(sys.argv[1])
if any(job["how"] == "plugin" for job in jobs):
    import hf_geglu
results = []


def inside(value, name):
    for part in name.split(" "):  # outputs of parts: "text_model_output last_hidden_state", "logits 0"
        value = value[part if hasattr(value, "keys") else int(part)]
    return value


for job in jobs:
    tensors = load_file(job["expected"])
    kwargs = {"dtype": "auto"} | ({"trust_remote_code": True} if job["how"] == "remote" else {})
    model, info = getattr(transformers, job["auto"]).from_pretrained(job["folder"], output_loading_info=True, **kwargs)
    inputs = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("in.")}
    with torch.no_grad():
        outputs = model(**inputs)
    results.append({
        "class": type(model).__name__,
        "difference": max(
            (inside(outputs, name[4:]) - tensor).abs().max().item()
            for name, tensor in tensors.items() if name.startswith("out.")
        ),
        "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
    })
if any(job["how"] != "plugin" for job in jobs):
    assert "hf_geglu" not in sys.modules
print(json.dumps(results))
"""


def expected_outputs(model: torch.nn.Module, path: Path) -> None:
    """Inputs and outputs of the model, for the other process."""
    inputs = synthetic_inputs(model)
    assert inputs is not None
    with evaluating(model), torch.no_grad():
        outputs = outputs_of(model, inputs)
    tensors = {f"in.{name}": tensor for name, tensor in inputs.items()}
    save_file(tensors | {f"out.{name}": tensor.contiguous() for name, tensor in outputs.items()}, path)


def read_in_fresh_process(jobs: list[dict[str, str]]) -> list[dict[str, object]]:
    """Each job: how ("plugin", "remote" or "plain"), auto (class), folder, expected. One process serves all of them, so
    plugin jobs must not be mixed with others."""
    assert len({job["how"] == "plugin" for job in jobs}) == 1
    result = subprocess.run(
        [sys.executable, "-I", "-c", _READ, json.dumps(jobs)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found: list[dict[str, object]] = json.loads(result.stdout.splitlines()[-1])
    return found
