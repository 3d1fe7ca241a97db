"""How long does finding sites take? Tiny models and GPT-2 small at full size, warm, median of several runs.

python -m benchmarks.find_sites            # writes benchmarks/results/find_sites.json
"""

from __future__ import annotations

import statistics
import time

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, PreTrainedModel

from benchmarks.records import write
from hf_geglu import find_sites

TARGETS = {"2 layers": 0.050, "GPT-2 small": 3.0}
RUNS = 15
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 1000,
}


def models() -> dict[str, PreTrainedModel]:
    """Random weights; finding does not read them."""
    torch.manual_seed(0)
    return {
        "BERT, 2 layers": BertModel(BertConfig(**SMALL)),
        "GPT-2, 2 layers": GPT2Model(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=1000)),
        "Llama, 2 layers": LlamaModel(LlamaConfig(**SMALL)),
        "GPT-2 small": GPT2Model(GPT2Config()),
    }


def main() -> None:
    rows = []
    every = models()
    for model in every.values():  # first calls import and compile regular expressions
        find_sites(model)
    times: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(RUNS):  # interleaved: a slow moment of the machine meets all of them
        for name, model in every.items():
            start = time.perf_counter()
            found = find_sites(model)
            times[name].append(time.perf_counter() - start)
            assert found.sites
    for name, seconds in times.items():
        target = next(limit for part, limit in TARGETS.items() if part in name)
        rows.append({"model": name, "median_s": statistics.median(seconds), "min_s": min(seconds), "target_s": target})
        print(f"{name:16} median {statistics.median(seconds) * 1e3:7.1f} ms   target {target * 1e3:.0f} ms")
    write("find_sites", {"runs": RUNS, "rows": rows})


if __name__ == "__main__":
    main()
