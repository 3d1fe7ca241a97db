"""Converting a checkpoint of about 3 GB file by file, against copying it and against loading and saving it.

    python -m benchmarks.convert_checkpoint [--rounds 5]    # writes benchmarks/results/convert_checkpoint.json

Retarget: a Llama-like model in bfloat16 (SwiGLU -> GeGLU; two thirds of an FFN's weights change). Expand: a GPT-2-like
model in float32 (its output is larger). Every side runs in a process of its own, one after the other, round by round;
times are of the work itself (imports do not count, the modelling file neither), taken after the disk has caught up.
Needs 15 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.records import write
from hf_geglu.skeleton import skeleton

SHARDS = 4
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GPT2 = {"n_embd": 1280, "n_layer": 36, "n_head": 20, "dtype": "float32"}
MODELS = {"retarget": (LlamaForCausalLM, LlamaConfig(**LLAMA)), "expand": (GPT2LMHeadModel, GPT2Config(**GPT2))}

YARDSTICKS = {"retarget": ("cp -r", "copy", "source"), "expand": ("writing the output", "write", "output")}
"""What a conversion is compared with: as it is, and until the bytes are on the disk, as those of a conversion are."""

RUN = """
import os, sys, time
kind, source, target = sys.argv[1:]
import torch
if kind in ("convert", "load and save"):
    import json, transformers
    with open(os.path.join(source, "config.json")) as file:
        getattr(transformers, json.load(file)["architectures"][0])  # imports the modelling file, which both sides need
    transformers.logging.set_verbosity_error()
if kind == "import torch":
    seconds = 0.0
elif kind == "convert":
    from hf_geglu.checkpoint import convert_checkpoint
    start = time.perf_counter()
    convert_checkpoint(source, target, max_shard_size="1GB")
elif kind == "load and save":
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(target, max_shard_size="1GB")
elif kind.startswith("write"):
    block = memoryview(os.urandom(1 << 24))
    start = time.perf_counter()
    os.mkdir(target)
    for name in sorted(os.listdir(source)):
        left = os.path.getsize(os.path.join(source, name))
        with open(os.path.join(target, name), "wb", buffering=0) as file:
            while left:
                left -= file.write(block[:left])
elif kind.startswith("copy"):
    import subprocess
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
if kind.endswith("synced"):
    for name in os.listdir(target):
        handle = os.open(os.path.join(target, name), os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
if kind != "import torch":
    seconds = time.perf_counter() - start
# ru_maxrss would be the largest of this process and of the one that started it
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) * 1024)
"""


def make(folder: Path, model_class: Any, config: Any) -> None:
    """Random weights, in shards of equal size."""
    model: Any = skeleton(config, model_class)
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not config.tie_word_embeddings
    }
    total = sum(tensor.nbytes for tensor in state.values())
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    index = {}
    for name, tensor in state.items():
        if size > total / SHARDS:
            _save(folder, shards.pop(), index)
            shards.append({})
            size = 0
        shards[-1][name] = torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=0.02, generator=generator)
        size += tensor.nbytes
    _save(folder, shards.pop(), index)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _save(folder: Path, tensors: dict[str, torch.Tensor], index: dict[str, str]) -> None:
    name = f"model-{len(set(index.values())) + 1:05}-of-{SHARDS:05}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    index.update(dict.fromkeys(tensors, name))


def run(kind: str, source: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak memory in bytes; the target is removed again."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, kind, str(source), str(target)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    seconds, peak = result.stdout.split()[-2:]
    return float(seconds), int(peak)


def measure(conversion: str, root: Path, rounds: int) -> dict[str, Any]:
    source, output, target = root / "source", root / "output", root / "target"
    source.mkdir()
    make(source, *MODELS[conversion])
    run("convert", source, output)  # warm, and what `write` and `copy` of the output take their sizes from
    yardstick, same, given = YARDSTICKS[conversion]
    reference = source if given == "source" else output
    sides = {
        "convert": ("convert", source),
        yardstick: (same, reference),
        f"{yardstick}, synced": (f"{same}, synced", reference),
        "from_pretrained + save_pretrained": ("load and save", source),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides.items())
        for name, (kind, where) in order[number % len(order) :] + order[: number % len(order)]:
            found[name].append(run(kind, where, target))
            shutil.rmtree(target)
            print(f"{conversion} {number + 1}/{rounds}  {name:34} {found[name][-1][0]:6.2f} s", flush=True)
    seconds = {name: statistics.median(time for time, _ in runs) for name, runs in found.items()}
    largest = max(
        tensor.nbytes for tensor in skeleton(MODELS[conversion][1], MODELS[conversion][0]).state_dict().values()
    )
    sizes = {
        name: sum(path.stat().st_size for path in folder.iterdir())
        for name, folder in (("source", source), ("output", output))
    }
    for folder in (source, output):
        shutil.rmtree(folder)
    return {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "all": {name: [round(time, 2) for time, _ in runs] for name, runs in found.items()},
        "bytes": sizes,
        "largest_tensor": largest,
        "peak": {
            name: max(peak for _, peak in found[name]) for name in ("convert", "from_pretrained + save_pretrained")
        },
        "convert over": {
            name: round(statistics.median(a / b for (a, _), (b, _) in zip(found["convert"], runs, strict=True)), 2)
            for name, runs in found.items()
            if name != "convert"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".", help="where 15 GB of temporary files go [default: .]")
    parser.add_argument("--rounds", type=int, default=5, help="[default: 5]")
    parser.add_argument("--only", choices=sorted(MODELS), help="one of the two; nothing is recorded")
    args = parser.parse_args()
    result: dict[str, Any] = {"rounds": args.rounds}
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        result["import torch"] = run("import torch", Path(root), Path(root) / "none")[1]
        for conversion in [args.only] if args.only else sorted(MODELS, reverse=True):
            result[conversion] = measure(conversion, Path(root), args.rounds)
            report(conversion, result[conversion], result["import torch"])
    if not args.only:
        write("convert_checkpoint", result)


def report(conversion: str, found: dict[str, Any], base: int) -> None:
    yardstick = YARDSTICKS[conversion][0]
    over = found["convert over"]
    allowed = base + 2 * found["largest_tensor"]
    print(f"{conversion}: {found['bytes']['source'] / 1e9:.2f} GB -> {found['bytes']['output'] / 1e9:.2f} GB")
    print(f"  over {yardstick}: {over[yardstick]:.2f}, synced {over[f'{yardstick}, synced']:.2f}   target 1.2")
    print(
        f"  from_pretrained + save_pretrained over it: {1 / over['from_pretrained + save_pretrained']:.2f}   target 3"
    )
    print(f"  peak {found['peak']['convert'] / 2**20:.0f} MiB   target {allowed / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
