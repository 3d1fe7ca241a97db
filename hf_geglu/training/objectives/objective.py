"""What is predicted: how examples become a batch whose labels stand beside the logits that predict them.

    B = blocks of a batch, T = tokens of the longest of them, C = classes
    batch = {"input_ids": (B, T), "labels": (B, T)[, "attention_mask": (B, T)]}, labels -100 where nothing is predicted

Labels are aligned here, once: position t of the logits is scored against position t of the labels, for every
objective. So the loop sums the loss and counts the labels without knowing which objective it trains: a classifier has
logits (B, C) and labels (B,), and what it is weighted by are examples. Labels that are fractions say another loss: (B,)
the squared error of a regression, (B, C) the cross entropy of C answers of yes or no; a NaN predicts nothing there.

This file has the two objectives that need nothing but tokens; those of the other tasks are in `tasks`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from hf_geglu.errors import ConfigurationError
from hf_geglu.training.objectives.isolation import Isolation, is_token, isolated
from hf_geglu.training.objectives.metrics import Metric

IGNORED = -100
"""Label of a position at which nothing is predicted: the `ignore_index` of torch and transformers."""

LanguageTask = Literal["clm", "mlm"]
Task = Literal["clm", "mlm", "seq2seq", "sft", "text_classification", "token_classification", "image_classification"]
Example: TypeAlias = Mapping[str, Any] | Sequence[int] | Tensor
Batch: TypeAlias = dict[str, Tensor]


class Objective(Protocol):
    """Makes batches. The result may depend on nothing but the arguments."""

    @property
    def metric(self) -> Metric | None:
        """What an evaluation counts besides the loss; None: nothing."""

    def batch(self, examples: Sequence[Example], *, positions: Sequence[int], seed: int) -> Batch:
        """The batch of these examples, which are the `positions`-th of the run with this seed."""


def token_count(batch: Mapping[str, Tensor]) -> int:
    """Tokens that a batch sends through the model, without those that fill it up; pictures count as one."""
    if "input_ids" not in batch:
        return len(batch["labels"])
    mask = batch.get("attention_mask")
    if "position_ids" in batch:
        count = int(is_token(batch["position_ids"]).sum())
    else:
        count = batch["input_ids"].numel() if mask is None else int(mask.sum())
    return count + (int((batch["labels"] != IGNORED).sum()) if "decoder_input_ids" in batch else 0)


def predicted(labels: Tensor) -> Tensor:
    """Where something is predicted."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def unpredicted(labels: Tensor) -> Tensor:
    """Labels of that shape and type with nothing to predict."""
    return torch.full_like(labels, torch.nan if labels.is_floating_point() else IGNORED)


def columns(example: Example) -> tuple[Tensor, Tensor, Tensor | None]:
    """input_ids, attention_mask and labels (if the example brings its own) as 1-d tensors."""
    if not isinstance(example, Mapping):
        example = {"input_ids": example}
    ids = torch.as_tensor(example["input_ids"], dtype=torch.long)
    mask = example.get("attention_mask")
    labels = example.get("labels")
    return (
        ids,
        torch.ones_like(ids) if mask is None else torch.as_tensor(mask, dtype=torch.long),
        None if labels is None else torch.as_tensor(labels, dtype=torch.long),
    )


def document_positions(example: Example) -> Tensor | None:
    """Position ids, from 0 in each document of the block, of an example that says where its documents begin."""
    found = example.get("position_ids") if isinstance(example, Mapping) else None
    return None if found is None else torch.as_tensor(found, dtype=torch.long)


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """Rows of unequal length as one tensor, filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def stacked(
    ids: list[Tensor],
    masks: list[Tensor],
    labels: list[Tensor],
    pad_token_id: int,
    positions: Sequence[Tensor | None] = (),
    isolation: Isolation | None = None,
) -> Batch:
    """Pad on the right. The attention mask is left out where it would be all ones: attention is faster without it.

    Args:
        ids: tokens of each row.
        masks: 1 for each token that counts.
        labels: aligned with the tokens, or one of each row.
        pad_token_id: what shorter rows are filled up with.
        positions: position ids of rows that hold several documents.
        isolation: how the model keeps them apart; None: it does not.
    """
    if isolation is not None and any(each is not None for each in positions):
        every = [torch.arange(len(row)) if own is None else own for row, own in zip(ids, positions, strict=True)]
        return isolated(ids, every, labels, isolation, pad_token_id)
    batch = {"input_ids": padded(ids, pad_token_id), "labels": padded(labels, IGNORED)}
    mask = padded(masks, 0)
    if not bool(mask.all()):
        batch["attention_mask"] = mask
    return batch


@dataclass(frozen=True)
class CausalLM:
    """Predict each token from those before it.

    Attributes:
        pad_token_id: what shorter blocks are filled up with (masked out of attention and labels).
        isolation: how documents that share a block are kept apart.
        metric: none; logits of a vocabulary are better not held for one.
    """

    pad_token_id: int = 0
    isolation: Isolation | None = None
    metric: Metric | None = None

    def batch(self, examples: Sequence[Example], *, positions: Sequence[int] = (), seed: int = 0) -> Batch:
        """Labels are the tokens one place to the left; the last position of a block or document predicts nothing."""
        ids, masks, labels, documents = [], [], [], []
        for example in examples:
            row, mask, own = columns(example)
            wanted = (row if own is None else own).masked_fill(mask == 0, IGNORED)
            found = document_positions(example)
            if found is not None:
                wanted = wanted.masked_fill(found == 0, IGNORED)
            ids.append(row)
            masks.append(mask)
            labels.append(torch.cat([wanted[1:], wanted.new_full((1,), IGNORED)]))
            documents.append(found)
        return stacked(ids, masks, labels, self.pad_token_id, documents, self.isolation)


@dataclass(frozen=True)
class MaskedLM:
    """Predict tokens hidden at random: 80 % become the mask token, 10 % another token, 10 % stay (Devlin 2018,
    arXiv:1810.04805).

    The masks of an example depend on the seed and on its position in the run only. They are therefore the same
    however the run is cut into batches, forwards and processes, and after a resume. Every example has at least one
    hidden token.
    """

    mask_token_id: int
    vocab_size: int
    special_ids: frozenset[int] = frozenset()
    probability: float = 0.15
    pad_token_id: int = 0
    isolation: Isolation | None = None
    metric: Metric | None = None

    def batch(self, examples: Sequence[Example], *, positions: Sequence[int], seed: int) -> Batch:
        """Labels are the hidden tokens; an example that brings its own labels is taken as it is."""
        ids, masks, labels, documents = [], [], [], []
        for example, position in zip(examples, positions, strict=True):
            row, mask, own = columns(example)
            if own is None:
                row, own = self._hide(row, mask, position=position, seed=seed)
            ids.append(row)
            masks.append(mask)
            labels.append(own)
            documents.append(document_positions(example))
        return stacked(ids, masks, labels, self.pad_token_id, documents, self.isolation)

    def _hide(self, ids: Tensor, mask: Tensor, *, position: int, seed: int) -> tuple[Tensor, Tensor]:
        # Hashing seed and position decorrelates neighbouring generators, which seed + position would not.
        generator = torch.Generator().manual_seed(random.Random(f"{seed}:{position}").getrandbits(63))
        special = torch.tensor(sorted(self.special_ids), dtype=torch.long)
        may_hide = (mask == 1) & ~torch.isin(ids, special)
        score = torch.rand(ids.shape, generator=generator).masked_fill(~may_hide, 2.0)
        hidden = score < self.probability
        if bool(may_hide.any()) and not bool(hidden.any()):
            hidden = torch.zeros_like(hidden)
            hidden[score.argmin()] = True
        fate = torch.rand(ids.shape, generator=generator)
        other = torch.randint(self.vocab_size, ids.shape, generator=generator)
        seen = torch.where(hidden & (fate < 0.8), torch.full_like(ids, self.mask_token_id), ids)
        seen = torch.where(hidden & (fate >= 0.9), other, seen)
        return seen, ids.masked_fill(~hidden, IGNORED)


def objective_for(task: LanguageTask, tokenizer: Any, *, mlm_probability: float = 0.15) -> CausalLM | MaskedLM:
    """The objective of a language modelling task with the ids of this tokenizer.

    Raises:
        ConfigurationError: a masked objective with a tokenizer that has no mask token.
    """
    pad = tokenizer.pad_token_id
    pad = 0 if pad is None else int(pad)
    if task == "clm":
        return CausalLM(pad_token_id=pad)
    if tokenizer.mask_token_id is None:
        raise ConfigurationError(
            f"{type(tokenizer).__name__} has no mask token: expected the tokenizer of a masked language model, such "
            "as BERT. For a causal model use finetune_clm."
        )
    return MaskedLM(
        mask_token_id=int(tokenizer.mask_token_id),
        vocab_size=len(tokenizer),
        special_ids=frozenset(int(i) for i in tokenizer.all_special_ids),
        probability=mlm_probability,
        pad_token_id=pad,
    )
