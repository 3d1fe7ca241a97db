"""Whole documents into blocks, as few as can be: best-fit decreasing (Ding et al. 2024, arXiv:2404.10830, section 3).

No document is cut unless it is longer than a block, and none is dropped: a longer one becomes several pieces. What is
left of a block is filled up when a batch is made.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_geglu.training.data.packing import Packing, Tally, TokenBlocks

STREAM_BUFFER = 1024
"""Documents of a stream that are fitted together."""


@dataclass(frozen=True)
class Documents:
    """Tokens of many documents, special tokens included; 4 bytes a token.

    Attributes:
        tokens: of all of them, one after the other.
        starts: where each begins, and where the last one ends.
        labels: aligned with the tokens, where not every token is predicted.
    """

    tokens: npt.NDArray[np.int32] = field(repr=False)
    starts: npt.NDArray[np.int64] = field(repr=False)
    labels: npt.NDArray[np.int32] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, documents: Iterable[Sequence[int]], labels: Iterable[Sequence[int]] | None = None) -> Documents:
        """From lists of token ids, and of labels of the same lengths."""
        pieces = [np.asarray(document, dtype=np.int32) for document in documents]
        return cls(
            _joined(pieces),
            np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64),
            None if labels is None else _joined([np.asarray(row, dtype=np.int32) for row in labels]),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def blocks(self) -> TokenBlocks:
        """One block a document."""
        return TokenBlocks(self.tokens, self.starts, self.labels)


def best_fit(lengths: npt.NDArray[np.int64], room: int) -> list[list[int]]:
    """Numbers of the documents of each block: the longest first, each into the block that it leaves least room in.

    Args:
        lengths: of the documents, each at most `room`.
        room: of a block.
    """
    blocks: list[list[int]] = []
    spaces: dict[int, list[int]] = {}  # room left -> blocks with that much
    known: list[int] = []  # its keys in order
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        place = bisect_left(known, length)
        if place == len(known):
            block, left = len(blocks), room
            blocks.append([])
        else:
            left = known[place]
            block = spaces[left].pop()
            if not spaces[left]:
                del spaces[left], known[place]
        blocks[block].append(number)
        left -= length
        if left:
            if left not in spaces:
                insort(known, left)
                spaces[left] = []
            spaces[left].append(block)
    return blocks


def fitted(documents: Documents, packing: Packing, tally: Tally) -> TokenBlocks:
    """All documents in blocks of at most `packing.block_size`; each remembers where its documents begin."""
    lengths = np.diff(documents.starts)
    blocks = best_fit(lengths, packing.block_size)
    order = np.asarray([number for block in blocks for number in block], dtype=np.int64)
    sizes = [int(lengths[block].sum()) for block in blocks]
    begins = np.cumsum([0, *lengths[order]], dtype=np.int64)

    def arranged(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return _joined([values[documents.starts[i] : documents.starts[i + 1]] for i in order])

    tally.blocks += len(blocks)
    tally.filled += sum(sizes)
    tally.room += len(blocks) * packing.block_size
    return TokenBlocks(
        arranged(documents.tokens),
        np.cumsum([0, *sizes], dtype=np.int64),
        None if documents.labels is None else arranged(documents.labels),
        begins[:-1],
    )


def fitted_stream(
    documents: Iterator[Sequence[int]] | Iterator[tuple[Sequence[int], Sequence[int]]], packing: Packing, tally: Tally
) -> Iterator[dict[str, Any]]:
    """Blocks of a stream, `STREAM_BUFFER` documents at a time, as examples."""
    while chunk := list(islice(documents, STREAM_BUFFER)):
        if isinstance(chunk[0], tuple):
            rows, labels = zip(*chunk, strict=True)
            together = Documents.of(rows, labels)
        else:
            together = Documents.of(chunk)  # type: ignore[arg-type]
        fit = fitted(together, packing, tally)
        yield from (fit[i] for i in range(len(fit)))


def _joined(pieces: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
