"""Text as blocks of tokens, for causal and masked language models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_geglu.errors import DataError
from hf_geglu.training.data.batches import Blocks, MapBlocks
from hf_geglu.training.data.bestfit import Documents, fitted, fitted_stream
from hf_geglu.training.data.packing import Packing, Tally, TokenBlocks, pack, packing_for, require_blocks, tokenise
from hf_geglu.training.data.rows import row_sets
from hf_geglu.training.data.sources import Rows
from hf_geglu.training.data.tokenised import tokens_of
from hf_geglu.training.objectives.objective import Example, LanguageTask
from hf_geglu.training.settings.data import DataSettings


@dataclass(frozen=True)
class Corpus:
    """Examples to train and evaluate on.

    Attributes:
        train: blocks of tokens, or whatever the task's examples are; a stream of them with --streaming.
        validation: the same; None without an evaluation.
        lines: for people: what was read, what was dropped.
        column: where the text was.
        revision: commit of the dataset's repository on the Hub; None for local files, or where `datasets` does not say.
        side_by_side: blocks hold several whole documents, which are to be kept apart.
    """

    train: Blocks
    validation: MapBlocks | None
    lines: tuple[str, ...]
    column: str
    revision: str | None = None
    side_by_side: bool = False


def find_text_column(columns: Mapping[str, str], wanted: str | None = None) -> str:
    """The column with the text, given all columns and their types.

    Args:
        columns: name -> type as `datasets` writes it, such as "string" or "int64".
        wanted: the one that the user named.

    Raises:
        DataError: it is not there, holds no text, or there are several to choose from.
    """
    exist = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"
    texts = text_columns(columns)
    if wanted is not None:
        if wanted not in columns:
            raise DataError(
                f"--text_column {wanted}: expected one of the columns that exist: {exist}. Name one of them."
            )
        if wanted not in texts:
            raise DataError(f"--text_column {wanted} holds {columns[wanted]}: expected text. The columns: {exist}.")
        return wanted
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        return texts[0]
    if not texts:
        raise DataError(f"a dataset without text: expected a column of strings. The columns that exist: {exist}.")
    raise DataError(
        f"{len(texts)} columns hold text and none is called text: expected to know which. Say --text_column "
        f"{' or --text_column '.join(texts)}."
    )


def text_columns(columns: Mapping[str, str]) -> list[str]:
    """The columns that hold strings."""
    return [name for name, kind in columns.items() if kind in ("string", "large_string", "string_view")]


def load_corpus(data: DataSettings, tokenizer: Any, *, task: LanguageTask, block_size: int, seed: int) -> Corpus:
    """Read, split, tokenise and pack.

    Raises:
        DataError: no such data, no text in it, or less than one block of it.
        ConfigurationError: `datasets` is not installed.
    """
    sets = row_sets(
        data, lambda columns: {find_text_column(columns, data.text_column): "text"}, inputs=("text",), seed=seed
    )
    packs = data.packs(default=True)
    joined = sets.joined and packs
    fits = packs and not joined and data.packing_strategy == "bfd"
    packing = packing_for(task, tokenizer, block_size=block_size, one_each=not packs, joined=joined, side_by_side=fits)
    maker = _BlockMaker(tokenizer, packing, joined=joined, fits=fits, use_cache=data.use_cache)
    lines = list(sets.lines)
    held: TokenBlocks | None = None
    if sets.validation is not None:
        tally = Tally()
        held = maker.blocks(sets.validation, tally, keep_tail=True, streaming=data.streaming)
        if not len(held):
            raise DataError(
                f"a validation set of {tally.documents} rows without text: expected some. Give --validation_file, or "
                "--validation_split_percentage 0 for no evaluation."
            )
        lines.append(tally.line("validation"))
    else:
        lines.append("validation: none, so there is no evaluation")
    column = next(iter(sets.columns))
    if data.streaming:
        stream = StreamedBlocks(lambda: maker.stream(sets.train))
        require_first_block(stream, packing)
        return Corpus(stream, held, ("training: a stream, read in its own order", *lines), column, sets.revision, fits)
    tally = Tally()
    packed = maker.blocks(sets.train, tally, keep_tail=fits, streaming=False)
    require_blocks(tally, packing)
    return Corpus(packed, held, (tally.line("training"), *lines), column, sets.revision, fits)


@dataclass(frozen=True)
class _BlockMaker:
    """From rows to blocks."""

    tokenizer: Any
    packing: Packing
    joined: bool
    fits: bool
    use_cache: bool

    def blocks(self, rows: Rows, tally: Tally, *, keep_tail: bool, streaming: bool) -> TokenBlocks:
        """All of them, in memory."""
        texts, _ = tokens_of(
            rows,
            self.tokenizer,
            lambda: (Documents.of(self._tokenised(rows)), {}),
            depends_on=["text", self.joined],
            use_cache=self.use_cache and not streaming,
        )
        if self.joined:
            tally.lines = len(rows) if hasattr(rows, "__len__") else 0
        each = (texts.tokens[texts.starts[i] : texts.starts[i + 1]].tolist() for i in range(len(texts)))
        if self.fits:
            return fitted(Documents.of(self._pieces(each, tally)), self.packing, tally)
        return TokenBlocks.of(pack(each, self.packing, tally, keep_tail=keep_tail))

    def stream(self, rows: Rows) -> Iterator[Example]:
        """The same while they are read; nothing is counted."""
        each = self._tokenised(rows)
        if self.fits:
            return fitted_stream(self._pieces(each, Tally()), self.packing, Tally())
        return ({"input_ids": block} for block in pack(each, self.packing, Tally(), keep_tail=False))

    def _tokenised(self, rows: Rows) -> Iterator[list[int]]:
        return tokenise(_texts(rows, joined=self.joined), self.tokenizer, batch=16 if self.joined else 256)

    def _pieces(self, documents: Iterator[list[int]], tally: Tally) -> Iterator[Sequence[int]]:
        for document in documents:
            tally.documents += 1
            if not document:
                tally.empty += 1
                continue
            pieces = list(self.packing.pieces(document))
            tally.cut += len(pieces) > 1
            tally.tokens += sum(map(len, pieces))
            yield from pieces


@dataclass(frozen=True)
class StreamedBlocks:
    """Examples made while they are read; each iteration reads the data anew."""

    read: Callable[[], Iterator[Example]] = field(repr=False)

    def __iter__(self) -> Iterator[Example]:
        return self.read()


def require_first_block(stream: StreamedBlocks, packing: Packing) -> None:
    """Refuse a stream that fills no block.

    Raises:
        DataError: it does not.
    """
    if next(iter(stream), None) is None:
        raise DataError(
            f"a stream with less than {packing.room} tokens: expected at least one block. Lower --block_size."
        )


def require_first(stream: StreamedBlocks) -> None:
    """Refuse a stream without an example.

    Raises:
        DataError: it has none, or the first one is no good.
    """
    if next(iter(stream), None) is None:
        raise DataError("a stream without an example: expected at least one. Check the columns, or give other data.")


def _texts(rows: Rows, *, joined: bool) -> Iterator[str | None]:
    for batch in rows.iter(batch_size=1000):
        if joined:
            yield "".join(line or "" for line in batch["text"])
        else:
            yield from batch["text"]
