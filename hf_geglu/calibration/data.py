"""The data of a calibration: a fixed list of batches with a fingerprint, from whatever was handed in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from hf_geglu.errors import DataError
from hf_geglu.inputs import Inputs

TOKENS, BLOCK_SIZE, BATCH_SIZE = 8192, 256, 4
HELD_OUT = 4
"""Every fourth batch, or row, chooses between fits instead of making them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationData:
    """Batches in a fixed order: the keyword arguments of one forward each, first dimension B.

    Attributes:
        batches: token ids (B, T) with their mask as a rule; anything that the model takes.
        name: of the data, as a reader knows it.
    """

    batches: tuple[Inputs, ...]
    name: str | None = None

    @classmethod
    def of(
        cls,
        data: CalibrationData | Iterable[Any],
        *,
        tokenizer: Any = None,
        tokens: int | None = TOKENS,
        block_size: int = BLOCK_SIZE,
        batch_size: int = BATCH_SIZE,
        name: str | None = None,
    ) -> CalibrationData:
        """From batches, blocks of tokens, or texts.

        Args:
            data: batches (mappings with an ``input_ids`` of two dimensions, or any model's inputs); blocks (mappings
                with ``input_ids`` of one dimension, such as those of hf_geglu.training); texts, or rows with a `text`
                column (a `datasets` corpus).
            tokenizer: for texts. One with a class token gets one text a row; another one gets running text with its
                end token between the texts.
            tokens: how many to take at most; None for all there are.
            block_size: tokens a row.
            batch_size: rows a forward, of blocks and texts.
            name: for the record; by default what a `datasets` corpus says of itself.

        Raises:
            DataError: nothing is there, or it is none of these.
        """
        if isinstance(data, CalibrationData):
            return data
        if isinstance(data, str):
            raise DataError(
                "the calibration data are one string; expected texts, blocks or batches: give a list of them"
            )
        name = name or _name_of(data)
        if isinstance(data, Mapping):
            data = [data]
        rows = iter(data)
        first = next(rows, None)
        if first is None:
            raise DataError("the calibration data are empty; expected at least one text, block or batch")
        rows = chain([first], rows)
        if isinstance(first, str) or (isinstance(first, Mapping) and isinstance(first.get("text"), str)):
            if tokenizer is None:
                raise DataError("the calibration data are texts; expected a tokenizer beside them: tokenizer=...")
            texts = (row if isinstance(row, str) else row["text"] for row in rows)
            batches = _grouped(_blocks(texts, tokenizer, block_size), batch_size)
        elif isinstance(first, Mapping) and "input_ids" in first and torch.as_tensor(first["input_ids"]).dim() == 1:
            batches = _grouped((torch.as_tensor(row["input_ids"]) for row in rows), batch_size)
        elif isinstance(first, Mapping):
            batches = iter(rows)
        else:
            raise DataError(
                f"the calibration data hold {type(first).__name__}; expected texts, mappings with input_ids, or the "
                "keyword arguments of forwards"
            )
        return cls(batches=tuple(_limited(batches, tokens)), name=name)

    @property
    def tokens(self) -> int:
        """That the model sees: padding left out; of inputs without tokens, rows."""
        return sum(_tokens(batch) for batch in self.batches)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all inputs in order."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for key in sorted(batch):
                value = batch[key]
                digest.update(key.encode())
                if isinstance(value, torch.Tensor):
                    digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
                else:
                    digest.update(repr(value).encode())
        return digest.hexdigest()

    def split(self) -> tuple[CalibrationData, CalibrationData]:
        """What fits are made on, and what chooses between them: every `HELD_OUT`-th batch, or row of an only batch.

        Raises:
            DataError: one row only.
        """
        batches = self.batches
        if len(batches) < HELD_OUT:
            batches = tuple(row for batch in batches for row in _rows(batch))
        if len(batches) < 2:
            raise DataError("the calibration data are one row; expected several, of which some choose between fits")
        step = min(HELD_OUT, len(batches))
        held = batches[step - 1 :: step]
        rest = tuple(batch for number, batch in enumerate(batches) if (number + 1) % step)
        return replace(self, batches=rest), replace(self, batches=held)


def _name_of(data: Any) -> str | None:
    info = getattr(data, "info", None)
    name = getattr(info, "dataset_name", None)
    return name if isinstance(name, str) else None


def _tokens(batch: Inputs) -> int:
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return int(mask.sum())
    ids = batch.get("input_ids")
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    return len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))


def _rows(batch: Inputs) -> Iterator[Inputs]:
    count = len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
    for row in range(count):
        yield {
            key: value[row : row + 1] if isinstance(value, torch.Tensor) and len(value) == count else value
            for key, value in batch.items()
        }


def _limited(batches: Iterable[Inputs], tokens: int | None) -> Iterator[Inputs]:
    seen = 0
    for batch in batches:
        if not isinstance(batch, Mapping) or not any(isinstance(value, torch.Tensor) for value in batch.values()):
            raise DataError(f"a batch is {type(batch).__name__}; expected a mapping of names to tensors")
        yield batch
        seen += _tokens(batch)
        if tokens is not None and seen >= tokens:
            return


def _blocks(texts: Iterable[str], tokenizer: Any, block_size: int) -> Iterator[torch.Tensor]:
    """Token ids (T,) of at most `block_size`."""
    if getattr(tokenizer, "cls_token_id", None) is not None:
        for text in texts:
            if text.strip():
                ids = tokenizer(text, truncation=True, max_length=block_size, verbose=False)["input_ids"]
                yield torch.as_tensor(ids)
        return
    end = getattr(tokenizer, "eos_token_id", None)
    buffer: list[int] = []
    for text in texts:
        if text.strip():
            buffer += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            buffer += [] if end is None else [end]
        while len(buffer) >= block_size:
            yield torch.as_tensor(buffer[:block_size])
            del buffer[:block_size]
    if len(buffer) > 1:
        yield torch.as_tensor(buffer)


def _grouped(blocks: Iterable[torch.Tensor], batch_size: int) -> Iterator[Inputs]:
    """Batches of blocks, padded to the longest; a mask where there is padding."""
    group: list[torch.Tensor] = []
    for block in blocks:
        group.append(block.long())
        if len(group) == batch_size:
            yield _padded(group)
            group = []
    if group:
        yield _padded(group)


def _padded(blocks: Sequence[torch.Tensor]) -> Inputs:
    ids_BT = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)
    lengths_B = torch.tensor([len(block) for block in blocks])
    mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    return {"input_ids": ids_BT} if mask_BT.all() else {"input_ids": ids_BT, "attention_mask": mask_BT.long()}
