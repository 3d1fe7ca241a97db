"""Examples of a table in memory: rows of tokens of unequal length, and numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length, 4 bytes a number.

    Attributes:
        values: of all rows, one after the other.
        starts: where each begins, and where the last one ends.
    """

    values: npt.NDArray[np.int32] = field(repr=False)
    starts: npt.NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Ragged:
        """From lists."""
        pieces = [np.asarray(row, dtype=np.int32) for row in rows]
        values = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
        return cls(values, np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.values[self.starts[index] : self.starts[index + 1]].astype(np.int64))


@dataclass
class Counts:
    """What is left out or cut while examples are made.

    Attributes:
        blank: rows without text.
        cut: texts that were too long.
        lost: tokens, or words, beyond the limit.
    """

    blank: int = 0
    cut: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Examples:
    """A table whose rows are examples; a torch Dataset as far as anyone asks.

    Attributes:
        rows: name -> rows of tokens.
        numbers: name -> one number a row, or a row of numbers; whole ones (int64) or fractions (float32).
    """

    rows: Mapping[str, Ragged]
    numbers: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        found = {name: rows[index] for name, rows in self.rows.items()}
        return found | {name: torch.tensor(numbers[index]) for name, numbers in self.numbers.items()}

    def largest_token(self) -> int:
        """The largest id in any row of tokens, labels aside."""
        values = [rows.values for name, rows in self.rows.items() if name != "labels" and len(rows.values)]
        return max((int(each.max()) for each in values), default=0)

    def sha256(self) -> str:
        """Of all rows (int32, little-endian, and their borders as int64) and numbers (int64 or float32), by name."""
        digest = hashlib.sha256()
        for name in sorted(self.rows):
            digest.update(self.rows[name].values.astype("<i4").tobytes())
            digest.update(self.rows[name].starts.astype("<i8").tobytes())
        for name in sorted(self.numbers):
            whole = self.numbers[name].dtype.kind == "i"
            digest.update(self.numbers[name].astype("<i8" if whole else "<f4").tobytes())
        return digest.hexdigest()
