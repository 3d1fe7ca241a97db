"""A dense GPT-2 of word pieces, trained here on real text, since no pretrained one was found in packages.

Trained once and kept in the cache.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import from_scratch
from benchmarks.corpora import corpus
from benchmarks.from_scratch import train, word_pieces
from hf_geglu.demo.wheels import cache_root

TRAINED_ON = ("prose", "library", "glosses", "computing")
VOCABULARY, WIDTH, LAYERS, HEADS = 4096, 256, 4, 4
BLOCK, BATCH, STEPS, RATE, WARMUP = 128, 32, 500, 2e-3, 40
NAME = f"gpt2-small-{WIDTH}x{LAYERS}-{STEPS}"


def trained(progress: Callable[[str], None] = print) -> tuple[GPT2LMHeadModel, Tokenizer]:
    """The model in evaluation mode and its tokenizer, out of the cache where it is there."""
    folder = cache_root() / NAME
    if not (folder / "tokenizer.json").is_file():
        _make(folder, progress)
    model = GPT2LMHeadModel.from_pretrained(folder)
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def blocks_of(texts: Sequence[str], tokenizer: Tokenizer, *, seed: int = 0) -> torch.Tensor:
    """(N, BLOCK) tokens of documents in random order; each ends with token 0."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    return from_scratch.blocks_of(order, tokenizer, BLOCK)


def _make(folder: Path, progress: Callable[[str], None]) -> None:
    texts = [document for domain in TRAINED_ON for document in corpus(domain).train]
    tokenizer = word_pieces(texts, VOCABULARY)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=BLOCK,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    blocks = blocks_of(texts, tokenizer)
    progress(f"{blocks.numel():,} tokens of text")
    train(model, blocks, steps=STEPS, batch=BATCH, rate=RATE, warmup=WARMUP, progress=progress)
    draft = folder.with_suffix(".draft")
    model.save_pretrained(draft)
    tokenizer.save(str(draft / "tokenizer.json"))
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained()
