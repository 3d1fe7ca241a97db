"""Documents that share a block without seeing each other.

    B = rows of a batch, T = their length
    position_ids (B, T) count from 0 in every document; what fills a row up is told from it by its positions

Models differ in what makes them keep documents apart: some read it off the position ids (the masks of Transformers and
its variable-length flash attention), some want a 4-D mask, in one row or in several. An `Isolation` says which;
`leak.find_isolation` finds out for a model by running it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["positions", "mask", "additive", "flattened"]


@dataclass(frozen=True)
class Isolation:
    """How a model is told which tokens belong together.

    Attributes:
        form: "positions": position ids alone; "mask": and a boolean mask (B, 1, T, T); "additive": the same as
            0 and the lowest float; "flattened": position ids alone, all rows of a batch in one.
        offset: position of a first token, where a model does not count from 0 (RoBERTa).
        causal: whether a token sees those before it only.
    """

    form: Form
    offset: int = 0
    causal: bool = True

    def __str__(self) -> str:
        return {
            "positions": "position ids",
            "mask": "position ids and a mask",
            "additive": "position ids and an additive mask",
            "flattened": "position ids in one row",
        }[self.form]


def filled_up(positions: Tensor, length: int) -> Tensor:
    """Position ids of a row brought to `length`. What is added cannot be taken for the middle of a document: it is all
    1, or all 2 where 1 would go on with the last document."""
    value = 2 if len(positions) and int(positions[-1]) == 0 else 1
    return torch.cat([positions, positions.new_full((length - len(positions),), value)])


def is_token(position_ids: Tensor) -> Tensor:
    """Which places of (B, T) position ids are tokens of documents rather than filled up."""
    relative = position_ids - position_ids[:, :1]
    before = torch.nn.functional.pad(relative, (1, 0))[:, :-1]
    return (relative == 0) | (relative == before + 1)


def document_numbers(position_ids: Tensor) -> Tensor:
    """Number of the document of each place (B, T); each place that was filled up is one of its own."""
    before = torch.nn.functional.pad(position_ids, (1, 0), value=-2)[:, :-1]
    return (position_ids != before + 1).cumsum(-1)


def document_mask(position_ids: Tensor, *, causal: bool) -> Tensor:
    """(B, 1, T, T): true where the token of a row may see that of a column."""
    numbers = document_numbers(position_ids)
    mask = numbers[:, :, None] == numbers[:, None, :]
    return (mask.tril() if causal else mask)[:, None]


def isolated(
    ids: Sequence[Tensor], positions: Sequence[Tensor], labels: Sequence[Tensor], isolation: Isolation, fill: int
) -> dict[str, Tensor]:
    """The batch of these rows, its documents apart.

    Args:
        ids: tokens of each row.
        positions: their position ids, from 0 in each document.
        labels: aligned with the tokens.
        isolation: as the model wants it.
        fill: token that shorter rows are filled up with.
    """
    ignored = -100
    if isolation.form == "flattened":
        return {
            "input_ids": torch.cat(list(ids))[None],
            "labels": torch.cat(list(labels))[None],
            "position_ids": torch.cat(list(positions))[None] + isolation.offset,
        }
    pad = torch.nn.utils.rnn.pad_sequence
    length = max(len(row) for row in ids)
    position_ids = torch.stack([filled_up(row, length) for row in positions])
    batch = {
        "input_ids": pad(list(ids), batch_first=True, padding_value=fill),
        "labels": pad(list(labels), batch_first=True, padding_value=ignored),
        "position_ids": position_ids + isolation.offset,
    }
    if isolation.form != "positions":
        mask = document_mask(position_ids, causal=isolation.causal)
        if isolation.form == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        batch["attention_mask"] = mask
    return batch
