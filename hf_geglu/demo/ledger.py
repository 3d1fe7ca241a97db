"""The ledger of the demo: five models on the same held-out tokens, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One model on the held-out text.

    Attributes:
        name: which model.
        nll: mean negative log-likelihood, nats per token.
        kl: KL(original || this model), nats per token, over the first held-out blocks.
    """

    name: str
    nll: float
    kl: float | None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(min(self.nll, 700.0))


@dataclass(frozen=True)
class Ledger:
    """All that a run of the demo measured.

    Attributes:
        model: what was converted.
        rows: original, naive, converted, trained, control: in that order.
        steps: of each training.
        train_tokens: that each training saw.
        held_out_tokens: behind each `nll`.
        kl_tokens: behind each `kl`.
        reload_difference: largest difference of logits after reloading in a clean process.
        reload_with: how the clean process loaded it.
        seconds: of the whole run.
    """

    model: str
    rows: tuple[Row, ...]
    steps: int
    train_tokens: int
    held_out_tokens: int
    kl_tokens: int
    reload_difference: float
    reload_with: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=f"{self.model}: {self.held_out_tokens:,} held-out tokens")
        table.add_column("model")
        for column in ("perplexity", "nll", "vs original", "KL to original"):
            table.add_column(column, justify="right")
        for cells in self.cells():
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        """For a README."""
        head = "| model | perplexity | nll (nats/token) | vs original | KL to original |\n|---|---|---|---|---|"
        return "\n".join([head, *(f"| {' | '.join(cells)} |" for cells in self.cells())])

    def cells(self) -> Iterable[tuple[str, ...]]:
        """Each row as text."""
        first = self.rows[0].nll
        for row in self.rows:
            kl = "" if row.kl is None else f"{row.kl:.5f}"
            yield row.name, f"{row.perplexity:.2f}", f"{row.nll:.4f}", f"{row.nll - first:+.4f}", kl
