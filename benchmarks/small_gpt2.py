"""A dense GPT-2 of word pieces, trained here on real text, since no pretrained one was found in packages.

Trained once and kept in the cache.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.corpora import corpus
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
    ids = itertools.chain.from_iterable([*one.ids, 0] for one in tokenizer.encode_batch(order))
    tokens = torch.tensor(list(ids))
    return tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)


def _make(folder: Path, progress: Callable[[str], None]) -> None:
    texts = [document for domain in TRAINED_ON for document in corpus(domain).train]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False)
    )
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
    train(model, blocks, progress)
    draft = folder.with_suffix(".draft")
    model.save_pretrained(draft)
    tokenizer.save(str(draft / "tokenizer.json"))
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)


def train(model: Any, blocks_NT: torch.Tensor, progress: Callable[[str], None]) -> None:
    """In place; products in bfloat16."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat(
        [torch.randperm(len(blocks_NT), generator=generator) for _ in range(1 + STEPS * BATCH // len(blocks_NT))]
    )
    model.train()
    losses: list[float] = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, 0.525 + 0.475 * math.cos(math.pi * step / STEPS))
        batch = blocks_NT[order[step * BATCH : (step + 1) * BATCH]]
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            progress(f"step {step + 1} of {STEPS}: {sum(losses[-50:]) / 50:.3f} nats a token")


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained()
