"""Fast and lean? Ratios to plain Transformers and to the bare matrix products.

python -m benchmarks.speed            # all of it: results/speed.json and docs/performance.md; about 12 minutes
python -m benchmarks.speed --quick    # small shapes, a few rounds, nothing is written: does it run?
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from benchmarks.records import RESULTS, write
from benchmarks.speed import block, step
from benchmarks.speed.process import measured
from benchmarks.speed.render import render

SMOLLM2, GPT2 = {"hidden": 576, "width": 1536}, {"hidden": 768, "width": 3072}
ERF, TANH = "gelu", "gelu_pytorch_tanh"
BLOCKS: list[dict[str, Any]] = [
    {**GPT2, "tokens": 1024, "dtype": "float32", "activation": ERF},
    {**GPT2, "tokens": 128, "dtype": "bfloat16", "activation": ERF},
    {**GPT2, "tokens": 1024, "dtype": "bfloat16", "activation": ERF},
    {**GPT2, "tokens": 1024, "dtype": "bfloat16", "activation": TANH},
    {**SMOLLM2, "tokens": 2048, "dtype": "bfloat16", "activation": ERF},
]
GPU_BLOCKS: list[dict[str, Any]] = [
    {"hidden": 4096, "width": 11008, "tokens": 8192, "dtype": "bfloat16", "activation": TANH},
    {"hidden": 768, "width": 3072, "tokens": 8192, "dtype": "bfloat16", "activation": TANH},
]
PEAK: dict[str, Any] = {**GPT2, "tokens": 8192, "dtype": "bfloat16", "activation": ERF}
STEPS: list[dict[str, Any]] = [
    {"shape": {"model": "SmolLM2-135M"}, "batch": (1, 1024)},
    {"shape": {"model": "GPT-2 small"}, "batch": (1, 1024)},
]
DECODE: list[dict[str, Any]] = [
    {**shape, "dtype": dtype, "activation": ERF, "tokens": [1, 2, 4, 8, 64]}
    for shape in (SMOLLM2, GPT2, {"hidden": 2048, "width": 5632})
    for dtype in ("bfloat16", "float32")
]
GENERATE: dict[str, Any] = {"shape": {"model": "SmolLM2-135M"}, "prompt": 32, "new": 24, "batch": 1}
MODEL = {"hidden": 2048, "width": 8192, "layers": 16, "vocabulary": 32000}
"""A Llama of 1.1 billion parameters."""

PARTS = ["block", "step", "decode", "rest"]

QUICK_BLOCK: dict[str, Any] = {"hidden": 32, "width": 96, "tokens": 64, "dtype": "bfloat16", "activation": ERF}
QUICK_STEP: dict[str, Any] = {
    "shape": {"model": "SmolLM2-135M", "layers": 2, "vocabulary": 1024},
    "batch": (1, 64),
}
QUICK_DECODE: dict[str, Any] = {
    **{"hidden": 32, "width": 96, "dtype": "float32", "activation": ERF, "tokens": [1, 8]},
    "row": 2**20,
}
QUICK_MODEL = {"hidden": 64, "width": 160, "layers": 2, "vocabulary": 128}


def run(*, quick: bool, only: list[str], say: Any = print) -> dict[str, Any]:
    """All measurements as one record."""
    result: dict[str, Any] = {"quick": quick}
    gpu = torch.cuda.is_available()
    blocks, steps = ([QUICK_BLOCK], [QUICK_STEP]) if quick else (BLOCKS, STEPS)
    seconds = 0.0 if quick else 6.0
    where = [("cpu", 1)] if quick else [("cpu", 1), ("cpu", 2)] + [("cuda", 1)] * gpu
    if "block" in only:
        result["blocks"] = []
        for device, threads in where:
            for case in GPU_BLOCKS if device == "cuda" else blocks:
                say(f"block  {device}, {threads} threads  {case}")
                found = measured("block", threads=threads, **case, seconds=seconds, device=device)
                result["blocks"].append({"device": device, "threads": threads, **case, **found})
        result["unit"] = []
        for device, threads in where:
            for case in (GPU_BLOCKS if device == "cuda" else blocks)[-2:]:
                case = {name: value for name, value in case.items() if name != "hidden"}
                say(f"unit  {device}, {threads} threads  {case}")
                found = measured("unit", threads=threads, **case, seconds=seconds / 3.0, device=device)
                result["unit"].append({"device": device, "threads": threads, **case, **found})
        peak = QUICK_BLOCK if quick else PEAK
        say(f"block  peaks  {peak}")
        names = [block.EAGER, "torch.compile", "ours, lean", "ours, tiled"]
        result["peak units"] = {
            **peak,
            "sides": {side: measured("peak", threads=1, of="block", side=side, **peak) for side in names},
        }
    if "step" in only:
        result["steps"] = []
        for case in steps:
            say(f"step  peaks  {case}")
            peaks = {side: measured("peak", threads=1, of="step", side=side, **case) for side in step.SIDES}
            for device, threads in where:
                say(f"step  {device}, {threads} threads  {case}")
                found = measured("step", threads=threads, **case, seconds=2.0 * seconds, device=device)
                over = {side: round(peak / peaks[step.EAGER], 4) for side, peak in peaks.items()}
                row = {"device": device, "threads": threads, **case, **found}
                result["steps"].append({**row, "peak over eager": over} if device == "cpu" else row)
    if "decode" in only:
        result["decode"] = []
        for case in [QUICK_DECODE] if quick else DECODE:
            say(f"decode  {case}")
            found = measured("decode", threads=1, **case, seconds=seconds / 8.0)
            result["decode"].append({**case, **found})
        result["generate"] = []
        for dtype in ["float32"] if quick else ["bfloat16", "float32"]:
            case = {**GENERATE, "shape": QUICK_STEP["shape"], "new": 3} if quick else GENERATE
            say(f"generate  {dtype}  {case}")
            found = measured("generate", threads=1, **case, dtype=dtype, seconds=2.0 * seconds)
            result["generate"].append({**case, "dtype": dtype, **found})
    if "rest" in only:
        say("rest")
        result["rest"] = measured("rest", threads=1, model=QUICK_MODEL if quick else MODEL, rounds=1 if quick else 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes; prints, writes nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    begin = time.perf_counter()
    result = run(quick=args.quick, only=args.only)
    print(json.dumps(result, indent=1))
    print(f"{time.perf_counter() - begin:.0f} s")
    if not args.quick:
        earlier = RESULTS / "speed.json"
        kept = (
            json.loads(earlier.read_text(encoding="utf-8")) if earlier.exists() and len(args.only) < len(PARTS) else {}
        )
        write("speed", {**kept, **result})
        render(json.loads(earlier.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
