"""Small language models trained from scratch on real text: word pieces, and one training loop for all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FINAL = 0.05
"""Share of the learning rate that is left at the end."""


def word_pieces(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer made of these texts; token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<end>"], show_progress=False)
    )
    return tokenizer


def blocks_of(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> torch.Tensor:
    """(N, length) tokens of documents, one after the other; each ends with token 0."""
    encoded = tokenizer.encode_batch(list(texts))
    tokens = torch.tensor(list(itertools.chain.from_iterable([*one.ids, 0] for one in encoded)))
    return tokens[: len(tokens) // length * length].view(-1, length)


def train(
    model: Any,
    blocks_NT: torch.Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    warmup: int,
    final: float = FINAL,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Train in place, products in bfloat16.

    Args:
        model: a causal language model of transformers.
        blocks_NT: tokens; every pass over them is in another order.
        steps: of AdamW.
        batch: blocks a step.
        rate: highest learning rate.
        warmup: steps up to it; then along a cosine.
        final: share of it that is left at the end.
        seed: of the order.
        progress: takes a line from time to time.

    Returns:
        The loss of every step, nats a token.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    passes = 1 + steps * batch // len(blocks_NT)
    order = torch.cat([torch.randperm(len(blocks_NT), generator=generator) for _ in range(passes)])
    losses: list[float] = []
    model.train()
    for step in range(steps):
        cosine = (1 + final) / 2 + (1 - final) / 2 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, cosine)
        given = blocks_NT[order[step * batch : (step + 1) * batch]]
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = model(input_ids=given, labels=given).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            progress(f"step {step + 1} of {steps}: {sum(losses[-50:]) / 50:.3f} nats a token")
    return losses
