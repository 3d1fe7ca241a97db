"""Distances of two models over blocks of held-out tokens, with intervals; every start sees the same blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

Figures = dict[str, float]


def interval(values: Sequence[float]) -> Figures:
    """Mean, and half the width of its 95 % interval over blocks (normal)."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return {"mean": mean, "half": 1.96 * math.sqrt(variance / len(values))}


class Reference:
    """Log-probabilities of an original, (T - 1, V) a block, made again from its last hidden states whenever they are
    asked for: those of 36 blocks of SmolLM2 would fill 1.8 GB."""

    def __init__(self, model: Any, blocks_NT: torch.Tensor) -> None:
        body = model.get_submodule(model.base_model_prefix)
        self.head = model.get_output_embeddings()
        with torch.no_grad():
            self.states = [
                body(input_ids=block[None], use_cache=False).last_hidden_state[0, :-1] for block in blocks_NT
            ]

    def __iter__(self) -> Iterator[torch.Tensor]:
        for state in self.states:
            with torch.no_grad():
                yield torch.log_softmax(self.head(state).float(), dim=-1)


@torch.no_grad()
def log_probabilities(model: nn.Module, blocks_NT: torch.Tensor) -> Iterator[torch.Tensor]:
    """(T - 1, V) for each block."""
    for block in blocks_NT:
        logits: Any = model(input_ids=block[None], use_cache=False).logits[0, :-1]
        yield torch.log_softmax(logits.float(), dim=-1)


def distances(reference: Iterable[torch.Tensor], model: nn.Module, blocks_NT: torch.Tensor) -> dict[str, Figures]:
    """KL(original || model), change of the negative log-likelihood (nats a token) and top-1 agreement, over blocks.

    Args:
        reference: log-probabilities of the original on these blocks.
        model: what is measured.
        blocks_NT: token ids.
    """
    kl, delta, top = [], [], []
    for before, after, block in zip(reference, log_probabilities(model, blocks_NT), blocks_NT, strict=True):
        wide = before.float()
        kl.append((wide.exp() * (wide - after)).sum(dim=-1).mean().item())
        labels = block[1:, None]
        delta.append((wide.gather(1, labels) - after.gather(1, labels)).mean().item())
        top.append((wide.argmax(dim=-1) == after.argmax(dim=-1)).float().mean().item())
    return {"kl": interval(kl), "delta_nll": interval(delta), "top1": interval(top)}
