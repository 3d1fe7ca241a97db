"""The cost of everything else: importing, finding, planning and converting."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

CLOCK = "import time; start = time.process_time(); {}; print(time.process_time() - start)"
LINES = {
    "torch and transformers": "import torch, transformers",
    "the Auto classes": "from transformers import AutoModelForCausalLM",
}
"""What a process may have imported before hf_geglu: little, or what loading any model imports."""


def import_seconds(rounds: int) -> dict[str, float]:
    """Median of the CPU seconds of `import hf_geglu` in fresh processes, after each of `LINES`."""
    found: dict[str, list[float]] = {name: [] for name in LINES}
    for _ in range(rounds):
        for name, line in LINES.items():
            code = f"{line}; {CLOCK.format('import hf_geglu')}"
            command = [sys.executable, "-W", "ignore", "-c", code]
            answer = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
            found[name].append(float(answer.stdout))
    return {f"after {name}": round(statistics.median(own), 4) for name, own in found.items()}


def conversion(*, hidden: int, width: int, layers: int, vocabulary: int, rounds: int) -> dict[str, Any]:
    """CPU time of finding, planning and converting a Llama-like model, over one pass that sums all its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import hf_geglu

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parts: dict[str, list[float]] = {}

    def timed(name: str, call: Any) -> Any:
        start = time.process_time()
        result = call()
        parts.setdefault(name, []).append(time.process_time() - start)
        return result

    plan = hf_geglu.make_plan(model)
    for _ in range(rounds):
        timed("read once", lambda: [float(p.sum(dtype=torch.float32)) for p in model.parameters()])
        timed("find_sites", lambda: hf_geglu.find_sites(model))
        timed("make_plan", lambda: hf_geglu.make_plan(model))
        timed("convert, blocks verified", lambda: hf_geglu.convert(model, plan, verify="sites"))
        timed("revert", lambda: hf_geglu.revert(model))
        timed("convert, model verified", lambda: hf_geglu.convert(model, plan, verify="model"))
        hf_geglu.revert(model)
    read = statistics.median(parts["read once"])
    return {
        "parameters": parameters,
        "over reading once": {name: round(statistics.median(own) / read, 3) for name, own in parts.items()},
    }


def measure(*, model: dict[str, int], rounds: int) -> dict[str, Any]:
    """Both."""
    return {"import_seconds": import_seconds(2 * rounds - 1), "conversion": conversion(**model, rounds=rounds)}
