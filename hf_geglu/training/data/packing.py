"""From documents to blocks of tokens: whole documents side by side, end to end, or one block a document. Nothing is
dropped without being counted.

    [bos] document [eos] [bos] document [eos] ...        cut every block_size tokens (causal)
    [cls] document [sep] document [sep] ... [sep]        each block between cls and sep (masked)

End to end ("wrapped"), attention reaches over the end of a document into the one before it, as in the pretraining of
many models; the end-of-text token between them is what tells them apart. Whole documents side by side (`bestfit`) are
kept apart where the model can do that (`isolation`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.objectives.objective import LanguageTask


@dataclass(frozen=True)
class Packing:
    """How documents become blocks.

    Attributes:
        block_size: length of a block, in tokens.
        before, after: tokens around each document.
        head, tail: tokens around each block; they count towards its size.
        one_each: a block for each document, cut at block_size, instead of packing.
        around_pieces: a document that is cut into pieces has `before` and `after` around each of them.
    """

    block_size: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    one_each: bool = False
    around_pieces: bool = False

    @property
    def room(self) -> int:
        """Tokens of documents that one block takes."""
        return self.block_size - len(self.head) - len(self.tail)

    def pieces(self, document: Sequence[int]) -> Iterator[list[int]]:
        """A document, given without special tokens, in pieces that each fit a block."""
        if not self.around_pieces:
            whole = [*self.before, *document, *self.after]
            for begin in range(0, len(whole), self.block_size):
                yield whole[begin : begin + self.block_size]
            return
        step = self.block_size - len(self.before) - len(self.after)
        for begin in range(0, len(document), step):
            yield [*self.before, *document[begin : begin + step], *self.after]


@dataclass
class Tally:
    """Counts what goes in, what comes out and what is left over."""

    documents: int = 0
    lines: int = 0
    empty: int = 0
    tokens: int = 0
    blocks: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    tail_tokens: int = 0
    tail_kept: bool = False
    cut: int = 0
    filled: int = 0
    room: int = 0
    unanswered: int = 0
    unanswered_turns: int = 0
    predicted: int = 0

    def line(self, what: str) -> str:
        """One line for people."""
        rows = f"{self.lines:,} lines of running text" if self.lines else f"{self.documents:,} documents"
        parts = [f"{rows}, {self.tokens:,} tokens, {self.blocks:,} blocks"]
        if self.predicted:
            parts[0] += f", {self.predicted:,} tokens of answers"
        if self.room:
            parts[0] += f" that are {self.filled / self.room:.1%} full"
        if self.cut:
            parts.append(f"{self.cut:,} documents longer than a block cut into pieces, none dropped")
        if self.unanswered:
            parts.append(f"{self.unanswered:,} whose answer lies beyond the limit left out")
        if self.unanswered_turns:
            parts.append(f"{self.unanswered_turns:,} earlier answers not trained on: the chat template rewrites them")
        if self.empty and not self.lines:
            parts.append(f"{self.empty:,} empty documents skipped")
        if self.truncated_documents:
            parts.append(f"{self.truncated_documents:,} documents cut short, {self.truncated_tokens:,} tokens dropped")
        if self.tail_tokens:
            parts.append(
                f"the last block is shorter ({self.tail_tokens:,} tokens)"
                if self.tail_kept
                else f"{self.tail_tokens:,} tokens at the end that fill no block dropped"
            )
        return f"{what}: " + "; ".join(parts)


def packing_for(
    task: LanguageTask,
    tokenizer: Any,
    *,
    block_size: int,
    one_each: bool = False,
    joined: bool = False,
    side_by_side: bool = False,
) -> Packing:
    """The packing of a task with the special tokens of this tokenizer.

    Args:
        task: causal or masked.
        tokenizer: of Transformers.
        block_size: in tokens, special tokens included.
        one_each: a block for each document.
        joined: the rows are one running text, so nothing goes between them.
        side_by_side: documents share blocks whole, each with its own special tokens.

    Raises:
        ConfigurationError: a block that has no room for text.
    """
    if task == "mlm":
        head = _present(tokenizer.cls_token_id)
        tail = _present(tokenizer.sep_token_id)
        if side_by_side:
            return _with_room(Packing(block_size, before=head, after=tail, around_pieces=True))
        packing = Packing(block_size, after=() if joined or one_each else tail, head=head, tail=tail, one_each=one_each)
    else:
        # A model that was trained with a token at the start of a document has a tokenizer that puts it there.
        starts = tokenizer("a", verbose=False)["input_ids"]
        bos = _present(tokenizer.bos_token_id)
        begins = bool(bos) and list(starts[:1]) == list(bos)
        end = _present(tokenizer.eos_token_id) or _present(tokenizer.sep_token_id)
        packing = Packing(
            block_size,
            before=bos if begins and not joined else (),
            after=() if joined else end,
            head=bos if begins and joined else (),
            one_each=one_each,
        )
    return _with_room(packing)


def _with_room(packing: Packing) -> Packing:
    special = len(packing.head) + len(packing.tail)
    if packing.around_pieces:
        special += len(packing.before) + len(packing.after)
    if packing.block_size - special < 1:
        raise ConfigurationError(
            f"block_size={packing.block_size} with {special} special tokens in each: expected room for text. Raise "
            "--block_size."
        )
    return packing


def _present(token_id: int | None) -> tuple[int, ...]:
    return () if token_id is None else (int(token_id),)


def pack(
    documents: Iterable[Sequence[int]], packing: Packing, tally: Tally, *, keep_tail: bool = False
) -> Iterator[list[int]]:
    """Blocks of `documents`, which come without special tokens. All but a kept tail are `block_size` long, unless
    `one_each`.

    Args:
        documents: token ids of each document.
        packing: how.
        tally: counts as the blocks are taken.
        keep_tail: give out the rest at the end as a shorter block, instead of dropping it.
    """
    buffer: list[int] = []
    for document in documents:
        tally.documents += 1
        if not len(document):
            tally.empty += 1
            continue
        whole = [*packing.before, *document, *packing.after]
        tally.tokens += len(whole)
        if packing.one_each:
            if len(whole) > packing.room:
                tally.truncated_documents += 1
                tally.truncated_tokens += len(whole) - packing.room
            tally.blocks += 1
            yield [*packing.head, *whole[: packing.room], *packing.tail]
            continue
        buffer += whole
        begin = 0
        while len(buffer) - begin >= packing.room:
            tally.blocks += 1
            yield [*packing.head, *buffer[begin : begin + packing.room], *packing.tail]
            begin += packing.room
        del buffer[:begin]
    tally.tail_tokens, tally.tail_kept = len(buffer), keep_tail
    if buffer and keep_tail:
        tally.blocks += 1
        yield [*packing.head, *buffer, *packing.tail]


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of tokens in memory, 4 bytes a token. A torch Dataset as far as anyone asks.

    Attributes:
        tokens: of all blocks, one after the other.
        starts: where each block begins, and where the last one ends.
        labels: aligned with the tokens, -100 where nothing is predicted; None: every token is.
        documents: where each document begins, in order, if blocks hold several that are to be kept apart.
    """

    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64] = field(repr=False)
    labels: npt.NDArray[np.int32] | None = field(default=None, repr=False)
    documents: npt.NDArray[np.int64] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, blocks: Iterable[Sequence[int]]) -> TokenBlocks:
        """From lists of token ids, each at most 2**31 - 1."""
        pieces = [np.asarray(block, dtype=np.int32) for block in blocks]
        starts = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
        return cls(np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        begin, end = int(self.starts[index]), int(self.starts[index + 1])
        example = {"input_ids": torch.from_numpy(self.tokens[begin:end].astype(np.int64))}
        if self.labels is not None:
            example["labels"] = torch.from_numpy(self.labels[begin:end].astype(np.int64))
        if self.documents is not None:
            first, last = np.searchsorted(self.documents, (begin, end))
            begins = self.documents[first:last] - begin
            lengths = np.diff(begins, append=end - begin)
            positions = np.arange(end - begin, dtype=np.int64) - np.repeat(begins, lengths)
            example["position_ids"] = torch.from_numpy(positions)
        return example

    def largest_token(self) -> int:
        """The largest id."""
        return int(self.tokens.max()) if len(self.tokens) else 0

    def sha256(self) -> str:
        """Of tokens and labels (int32, little-endian) and of the borders of blocks and documents (int64)."""
        digest = hashlib.sha256(self.tokens.astype("<i4").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i4").tobytes())
        if self.documents is not None:
            digest.update(self.documents.astype("<i8").tobytes())
        return digest.hexdigest()


def tokenise(texts: Iterable[str | None], tokenizer: Any, *, batch: int = 256) -> Iterator[list[int]]:
    """Token ids of each text, without special tokens; nothing of one that is empty or blank."""
    texts = iter(texts)
    while chunk := list(islice(texts, batch)):
        words = [text if text and not text.isspace() else "" for text in chunk]
        yield from tokenizer(words, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def blocks_from_texts(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    block_size: int,
    task: LanguageTask = "clm",
    one_each: bool = False,
    keep_tail: bool = False,
) -> tuple[TokenBlocks, Tally]:
    """Tokenise and pack documents that are in memory.

    Raises:
        DataError: less text than one block takes.
    """
    tally = Tally()
    packing = packing_for(task, tokenizer, block_size=block_size, one_each=one_each)
    blocks = TokenBlocks.of(pack(tokenise(texts, tokenizer), packing, tally, keep_tail=keep_tail))
    require_blocks(tally, packing)
    return blocks, tally


def require_blocks(tally: Tally, packing: Packing) -> None:
    """Refuse text that fills no block.

    Raises:
        DataError: less text than one block takes.
    """
    if tally.blocks == 0:
        raise DataError(
            f"{tally.documents:,} documents with {tally.tokens:,} tokens in all: expected at least {packing.room:,}, "
            "one block. "
            + ("Give text." if tally.tokens < 8 else f"Give more text, or --block_size {max(tally.tokens // 8, 4)}.")
        )
