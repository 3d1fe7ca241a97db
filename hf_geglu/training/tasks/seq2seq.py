"""Text to text by an encoder-decoder: translation, summaries, answers. Predicted are the tokens of the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.data.batches import Blocks
from hf_geglu.training.data.corpus import Corpus, StreamedBlocks, require_first, text_columns
from hf_geglu.training.data.examples import Counts, Examples, Ragged
from hf_geglu.training.data.rows import row_sets
from hf_geglu.training.data.sources import Rows
from hf_geglu.training.objectives.metrics import TokenAccuracy
from hf_geglu.training.objectives.objective import IGNORED, Batch, Example, padded
from hf_geglu.training.tasks.kind import Prepared, Request, TaskKind

PAIRS = (
    *(("source", "target"), ("input", "output"), ("input", "target"), ("inputs", "targets"), ("text", "target")),
    *(("document", "summary"), ("article", "highlights"), ("text", "summary"), ("dialogue", "summary")),
    *(("question", "answer"), ("prompt", "completion"), ("text", "headline")),
)
"""Columns that are taken for source and target, in this order."""


@dataclass(frozen=True)
class SequenceToSequence:
    """Predict each token of the target from the source and the tokens before it.

    Attributes:
        pad_token_id: fills rows up.
        start_token_id: what the decoder reads before the first token.
        metric: share of right tokens.
    """

    pad_token_id: int
    start_token_id: int
    metric: TokenAccuracy = field(default_factory=TokenAccuracy)

    def batch(self, examples: Sequence[Example], *, positions: Sequence[int], seed: int) -> Batch:
        """input_ids (B, S), decoder_input_ids (B, T) and labels (B, T): the decoder reads the labels one place late."""
        rows = [example for example in examples if isinstance(example, Mapping)]
        sources = [row["input_ids"] for row in rows]
        labels = padded([row["labels"] for row in rows], IGNORED)
        start = labels.new_full((len(rows), 1), self.start_token_id)
        late = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self.pad_token_id)
        return {
            "input_ids": padded(sources, self.pad_token_id),
            # always there: T5 makes up one of its own without it, and takes a token for padding
            "attention_mask": padded([torch.ones_like(row) for row in sources], 0),
            "decoder_input_ids": torch.cat([start, late], dim=1),
            "labels": labels,
        }


def find_columns(found: Mapping[str, str], request: Request) -> dict[str, str]:
    """Source and target, or the column `translation`."""
    data = request.data
    exist = ", ".join(f"{name} ({kind})" for name, kind in found.items()) or "none"
    if data.source_lang is not None:
        if "translation" not in found:
            raise DataError(f"--source_lang without a column translation: the columns are {exist}.")
        return {"translation": "translation"}
    texts = text_columns(found)
    for name, flag in ((data.text_column, "text_column"), (data.target_column, "target_column")):
        if name is not None and name not in texts:
            raise DataError(f"--{flag} {name}: expected one of the columns with text. The columns: {exist}.")
    pairs = [
        (first, second)
        for first, second in PAIRS
        if {first, second} <= set(texts) and data.text_column in (None, first) and data.target_column in (None, second)
    ]
    if data.text_column and data.target_column:
        pairs = [(data.text_column, data.target_column)]
    elif not pairs and len(texts) == 2 and (data.text_column or data.target_column):
        other = next(name for name in texts if name not in (data.text_column, data.target_column))
        pairs = [(data.text_column or other, data.target_column or other)]
    if not pairs or pairs[0][0] == pairs[0][1]:
        raise DataError(
            f"no source and target among the columns {exist}: expected to know both. Say --text_column and "
            "--target_column, or --source_lang and --target_lang for a column translation."
        )
    return {pairs[0][0]: "source", pairs[0][1]: "target"}


def _prepare(request: Request) -> Prepared:
    start = _start(request.config)
    inputs = ("translation",) if request.data.source_lang else ("source", "target")
    sets = row_sets(request.data, lambda found: find_columns(found, request), inputs=inputs, seed=request.seed)
    lines: list[str] = []
    validation = None
    if sets.validation is not None:
        validation, line = _examples(sets.validation, request, "validation")
        lines.append(line)
    train: Blocks
    if request.data.streaming:
        train = StreamedBlocks(lambda: _encoded(sets.train, request, Counts()))
        require_first(train)
        line = "training: a stream, read in its own order"
    else:
        train, line = _examples(sets.train, request, "training")
    objective = SequenceToSequence(int(request.processor.pad_token_id), start)
    column = " and ".join(sets.columns)
    return Prepared(objective, Corpus(train, validation, (line, *sets.lines, *lines), column, sets.revision))


def _start(config: Any) -> int:
    if not getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(
            f"a {config.model_type} model has no encoder and decoder: expected one such as T5 or BART. For a causal "
            "model use the recipe sft."
        )
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(text, "decoder_start_token_id", None) if start is None else start
    if start is None:
        raise ConfigurationError(
            "the model's config has no decoder_start_token_id: expected the token that a target begins with. Set it in "
            "config.json; in multilingual models it is the token of the language."
        )
    return int(start)


def _encoded(rows: Rows, request: Request, counts: Counts) -> Iterator[dict[str, Any]]:
    tokenizer, data = request.processor, request.data

    def kept(row: list[int], limit: int) -> Tensor:
        over = len(row) - limit
        if over > 0:
            counts.cut += 1
            counts.lost += over
            row = _shortened(row, limit, tokenizer)
        return torch.tensor(row)

    for batch in rows.iter(batch_size=1000):
        pairs = [pair for pair in _pairs(batch, data.source_lang, data.target_lang) if all(pair)]
        counts.blank += len(next(iter(batch.values()))) - len(pairs)
        if not pairs:
            continue
        first = tokenizer([data.source_prefix + source for source, _ in pairs], verbose=False)["input_ids"]
        second = tokenizer(text_target=[target for _, target in pairs], verbose=False)["input_ids"]
        for source, target in zip(first, second, strict=True):
            yield {"input_ids": kept(source, request.block_size), "labels": kept(target, request.target_size)}


def _examples(rows: Rows, request: Request, what: str) -> tuple[Examples, str]:
    counts = Counts()
    found = list(_encoded(rows, request, counts))
    if not found:
        raise DataError(f"{counts.blank:,} {what} rows without source and target: expected some. Check the columns.")
    sources, targets = (Ragged.of(row[name].tolist() for row in found) for name in ("input_ids", "labels"))
    line = f"{what}: {len(found):,} examples, {len(sources.values):,} + {len(targets.values):,} tokens"
    line += f"; {counts.blank:,} with an empty source or target skipped" * bool(counts.blank)
    limits = f"{request.block_size} and {request.target_size}"
    line += f"; {counts.cut:,} texts cut short at {limits}, {counts.lost:,} tokens dropped" * bool(counts.cut)
    return Examples({"input_ids": sources, "labels": targets}), line


def _shortened(row: list[int], limit: int, tokenizer: Any) -> list[int]:
    """Cut in the middle of the text, not at its end token."""
    end = row[-1:] if row[-1] == tokenizer.eos_token_id else []
    return row[: limit - len(end)] + end


def _pairs(batch: Mapping[str, Any], source: str | None, target: str | None) -> list[tuple[str, str]]:
    if "translation" not in batch:
        return [(a or "", b or "") for a, b in zip(batch["source"], batch["target"], strict=True)]
    rows = batch["translation"]
    for key in (source, target):
        if key not in rows[0]:
            raise DataError(f"the column translation has no {key}: expected one of {', '.join(rows[0])}.")
    return [(row[source] or "", row[target] or "") for row in rows]


SEQ2SEQ = TaskKind(
    "seq2seq",
    "a text from another text",
    "AutoModelForSeq2SeqLM",
    "an encoder-decoder",
    _prepare,
    needs_pad=True,
    writes=True,
)
