"""Memory of calibrating and converting a checkpoint: one layer at a time, and in memory. Are the files the same?

    python -m benchmarks.calibrate_layerwise    # writes benchmarks/results/calibrate_layerwise.json

A Llama-like model in float32 with made-up weights, 512 tokens. Each side runs in a process of its own; its peak is
counted from what the process holds once everything is imported. Needs 4 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.records import write

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 2048}

RUN = """
import gc, json, sys, time
from pathlib import Path
import torch, transformers
import hf_geglu
from hf_geglu.calibration import CalibrationData
transformers.logging.disable_progress_bar()
side, source, warm, target = sys.argv[1], *map(Path, sys.argv[2:])

def data(tokens):
    ids = torch.randint(3, 250, (8, tokens), generator=torch.Generator().manual_seed(0))
    return CalibrationData(batches=tuple({"input_ids": part} for part in ids.split(1)))

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

def run(folder, tokens):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = status("VmRSS"), time.process_time()
    out = target / folder.name
    if side == "layer by layer":
        hf_geglu.convert_checkpoint(folder, out, calibration=data(tokens), max_shard_size="500MB")
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        hf_geglu.convert(model, calibration=data(tokens), verify="sites")
        hf_geglu.forget_original(model)
        model.save_pretrained(out, max_shard_size="500MB")
        del model
    return {"peak": status("VmHWM") - before, "cpu_seconds": round(time.process_time() - begin, 1)}

run(warm, 8)
print(json.dumps(run(source, 64)))
"""


def make(folder: Path, layers: int) -> dict[str, int]:
    """Weights drawn so that activations bend; the sizes of the model and of a layer in bytes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=False, **SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data.mul_(2.0)
    model.save_pretrained(folder, max_shard_size="500MB")
    return {
        "model": sum(parameter.nbytes for parameter in model.parameters()),
        "layer": sum(parameter.nbytes for parameter in model.model.layers[0].parameters()),
    }


def run(side: str, root: Path) -> dict[str, Any]:
    """Peak above the start, CPU time, and what was written."""
    target = root / side.replace(" ", "-")
    words = [side, str(root / "source"), str(root / "warm"), str(target)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    files = sorted((target / "source").glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
    return {**json.loads(done.stdout.splitlines()[-1]), "sha256": digest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".", help="where 4 GB of temporary files go [default: .]")
    parser.add_argument("--layers", type=int, default=16, help="of the model [default: 16]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        sizes = make(root / "source", args.layers)
        make(root / "warm", 1)
        sides = {side: run(side, root) for side in ("layer by layer", "in memory")}
    same = len({found.pop("sha256") for found in sides.values()}) == 1
    record = {"layers": args.layers, **SIZES, "tokens": 512, "bytes": sizes, "sides": sides, "same_files": same}
    print(json.dumps(record, indent=2))
    write("calibrate_layerwise", record)


if __name__ == "__main__":
    main()
