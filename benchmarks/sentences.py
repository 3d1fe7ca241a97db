"""Sentences of several domains, and batches of them for a sentence encoder."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

LONGEST = 96
"""Tokens of a sentence that count; sentences of up to 60 words hardly have more."""


def sentences(texts: Iterable[str]) -> list[str]:
    """The sentences of some documents, 5 to 60 words of mostly letters, each once."""
    found: dict[str, None] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?])[\"')]*\s+(?=[\"'(A-Z])", " ".join(paragraph.split())):
                letters = sum(character.isalpha() or character == " " for character in sentence)
                if 5 <= len(sentence.split()) <= 60 and letters >= 0.85 * len(sentence):
                    found[sentence] = None
    return list(found)


def mixture(domains: Mapping[str, Sequence[str]], *, words: int, seed: int) -> list[str]:
    """As many words from each domain, or all it has, shuffled."""
    draw = random.Random(seed)
    chosen: list[str] = []
    for name in domains:
        pool = list(domains[name])
        draw.shuffle(pool)
        count = 0
        for sentence in pool:
            if count >= words / len(domains):
                break
            chosen.append(sentence)
            count += len(sentence.split())
    draw.shuffle(chosen)
    return chosen


def batches(texts: Sequence[str], tokenizer: Any, *, tokens: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of sentences of like length, of about `tokens` each, in random order."""
    encoded = tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda number: len(encoded[number]))
    found = [_batch([encoded[number] for number in group]) for group in _groups(order, encoded, tokens)]
    random.Random(seed).shuffle(found)
    return found


def in_order(texts: Sequence[str], tokenizer: Any, *, size: int = 100) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of sentences in the order given."""
    for start in range(0, len(texts), size):
        yield _batch(tokenizer(list(texts[start : start + size]), truncation=True, max_length=LONGEST)["input_ids"])


def _groups(order: Sequence[int], encoded: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    for number in order:
        if group and (len(group) + 1) * len(encoded[number]) > tokens:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _batch(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, given in enumerate(rows):
        ids[row, : len(given)] = torch.tensor(given)
        mask[row, : len(given)] = 1
    return {"input_ids": ids, "attention_mask": mask}
