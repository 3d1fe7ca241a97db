"""What does a conversion cost at step 0, on real weights and held-out text?

SmolLM2-135M (SwiGLU): naive swap and ours. MiniLM (dense GELU): ours. Text: documentation of Python's standard library.

    python -m benchmarks.quality               # writes benchmarks/results/quality.json
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_geglu
from benchmarks.records import write
from hf_geglu.demo.naive import naive_swap
from hf_geglu.demo.text import stdlib_corpus
from hf_geglu.demo.weights import minilm_folder, smollm2_folder
from hf_geglu.training import blocks_from_texts

BLOCK, BATCH = 256, 2


def smollm2(tokens: int) -> list[dict[str, Any]]:
    folder = smollm2_folder(progress=print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(folder)
    blocks, _ = blocks_from_texts(stdlib_corpus().held_out, tokenizer, block_size=BLOCK)
    ids = torch.stack([torch.as_tensor(blocks[n]["input_ids"]) for n in range(min(len(blocks), tokens // BLOCK))])
    batches = [{"input_ids": part} for part in ids.split(BATCH)]
    plan = hf_geglu.make_plan(original)
    converted = AutoModelForCausalLM.from_pretrained(folder)
    hf_geglu.convert(converted, plan)
    rows = []
    for name, model in (("naive swap", naive_swap(original, plan)), ("hf_geglu", converted)):
        result = hf_geglu.compare(original, model, batches)
        rows.append(
            {
                "model": "SmolLM2-135M",
                "start": name,
                "kl": result.kl,
                "delta_nll": result.delta_nll,
                "tokens": result.tokens,
            }
        )
        print(
            f"SmolLM2-135M  {name:12} KL {result.kl:.5f}  delta nll {result.delta_nll:+.5f}  ({result.tokens} tokens)"
        )
    print("targets: KL <= 0.006, delta nll <= 0.01")
    return rows


def minilm() -> dict[str, Any]:
    folder = minilm_folder(progress=print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    texts = list(stdlib_corpus().held_out[:32])
    inputs = dict(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))
    (result,) = hf_geglu.convert(model, inputs=inputs).comparisons
    print(f"all-MiniLM-L6-v2  float32: largest difference {result.max_abs:.3g}; target 1e-6")
    return {"model": "all-MiniLM-L6-v2", "dtype": result.dtype, "max_abs": result.max_abs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens for SmolLM2 [default: 8192]")
    rows = [*smollm2(parser.parse_args().tokens), minilm()]
    write("quality", {"block": BLOCK, "rows": rows})


if __name__ == "__main__":
    main()
