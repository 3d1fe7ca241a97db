"""Sequence classification: a text, or a pair of texts, and its class, labels or number. What the loss is weighted by
are examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_geglu.errors import DataError
from hf_geglu.training.data.batches import Blocks
from hf_geglu.training.data.corpus import Corpus, StreamedBlocks, find_text_column, require_first, text_columns
from hf_geglu.training.data.examples import Counts, Examples, Ragged
from hf_geglu.training.data.rows import row_sets
from hf_geglu.training.data.sources import Rows
from hf_geglu.training.objectives.metrics import ClassMetric, LabelMetric, NumberMetric
from hf_geglu.training.objectives.objective import Batch, Example, padded
from hf_geglu.training.tasks.classes import all_of_one_class, find_label_column
from hf_geglu.training.tasks.kind import Prepared, Request, TaskKind
from hf_geglu.training.tasks.targets import OneClass, Target, target_of

PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("question", "sentence"), ("text1", "text2"), ("sentence_A", "sentence_B")),
)
"""Columns that are taken for a pair of texts, as GLUE and its relatives call them."""


@dataclass(frozen=True)
class SequenceClasses:
    """Predict the class of an example, its labels or its number."""

    pad_token_id: int
    metric: ClassMetric | LabelMetric | NumberMetric

    def batch(self, examples: Sequence[Example], *, positions: Sequence[int], seed: int) -> Batch:
        """(B, T) tokens and (B,) labels, or (B, C) of several labels."""
        rows = [example for example in examples if isinstance(example, Mapping)]
        ids = [row["input_ids"] for row in rows]
        batch = {"input_ids": padded(ids, self.pad_token_id), "labels": torch.stack([row["labels"] for row in rows])}
        mask = padded([torch.ones_like(row) for row in ids], 0)
        if not bool(mask.all()):
            batch["attention_mask"] = mask
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = padded([row["token_type_ids"] for row in rows], 0)
        return batch


def find_columns(columns: Mapping[str, str], request: Request) -> dict[str, str]:
    """Text, perhaps a second text, and class."""
    data = request.data
    label = find_label_column(columns, data.label_column)
    others = {name: kind for name, kind in columns.items() if name != label}
    pair = next((pair for pair in PAIRS if set(pair) <= set(text_columns(others))), None)
    if data.text_column is None and data.text_pair_column is None and pair is not None:
        first, second = pair
        return {first: "text", second: "text_pair", label: "label"}
    second_column = data.text_pair_column
    first = find_text_column({k: v for k, v in others.items() if k != second_column}, data.text_column)
    if second_column is None:
        return {first: "text", label: "label"}
    if second_column not in text_columns(others):
        raise DataError(f"--text_pair_column {second_column}: expected one of {', '.join(text_columns(others))}.")
    return {first: "text", second_column: "text_pair", label: "label"}


def _prepare(request: Request) -> Prepared:
    data = request.data
    sets = row_sets(data, lambda columns: find_columns(columns, request), inputs=("text",), seed=request.seed)
    label = next(old for old, new in sets.columns.items() if new == "label")
    every = [sets.train, *([sets.validation] if sets.validation is not None else [])]
    feature = (sets.train.features or {}).get("label")
    target = target_of(
        None if data.streaming else [value for rows in every for value in rows["label"]],
        wanted=data.problem_type,
        known=getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None),
        given=data.label_names,
        config=request.config,
        column=label,
        first=next((row["label"] for row in sets.train), None) if data.streaming else None,
    )
    reader = _Reader(request, target)
    lines: list[str] = []
    validation = None
    if sets.validation is not None:
        validation, line = reader.examples(sets.validation, "validation")
        lines.append(line)
    column = " and ".join(old for old, new in sets.columns.items() if new != "label")
    train: Blocks
    if data.streaming:
        train = StreamedBlocks(lambda: reader.encoded(sets.train, Counts()))
        require_first(train)
        line = "training: a stream, read in its own order"
        if isinstance(target, OneClass):
            lines += all_of_one_class(sets.train, "label")
    else:
        train, line = reader.examples(sets.train, "training")
    lines = [line, *sets.lines, target.line, *lines]
    objective = SequenceClasses(int(request.processor.pad_token_id), target.metric)
    corpus = Corpus(train, validation, tuple(lines), column, sets.revision)
    return Prepared(objective, corpus, target.options, distils=isinstance(target, OneClass))


@dataclass(frozen=True)
class _Reader:
    """From rows to tokens and what is to be predicted."""

    request: Request
    target: Target

    def encoded(self, rows: Rows, counts: Counts) -> Iterator[dict[str, Any]]:
        """One example after the other."""
        tokenizer: Any = self.request.processor
        for batch in rows.iter(batch_size=1000):
            keep = [number for number, text in enumerate(batch["text"]) if text and not text.isspace()]
            counts.blank += len(batch["text"]) - len(keep)
            if not keep:
                continue
            texts = [[batch[name][number] or "" for number in keep] for name in ("text", "text_pair") if name in batch]
            whole = tokenizer(*texts, verbose=False)["input_ids"]
            encoded = tokenizer(*texts, truncation=True, max_length=self.request.block_size, verbose=False)
            for place, number in enumerate(keep):
                ids = encoded["input_ids"][place]
                counts.cut += len(ids) < len(whole[place])
                counts.lost += len(whole[place]) - len(ids)
                example = {"input_ids": torch.tensor(ids)}
                if "token_type_ids" in encoded:
                    example["token_type_ids"] = torch.tensor(encoded["token_type_ids"][place])
                yield example | {"labels": torch.tensor(self.target.of(batch["label"][number]))}

    def examples(self, rows: Rows, what: str) -> tuple[Examples, str]:
        """All of them, in memory."""
        counts = Counts()
        found = list(self.encoded(rows, counts))
        if not found:
            raise DataError(f"{counts.blank:,} {what} rows without text: expected some. Check --text_column.")
        ids = [example["input_ids"].tolist() for example in found]
        line = f"{what}: {len(ids):,} examples, {sum(map(len, ids)):,} tokens"
        line += f"; {counts.blank:,} without text skipped" * bool(counts.blank)
        line += f"; {counts.cut:,} cut short at {self.request.block_size}, {counts.lost:,} tokens dropped" * bool(
            counts.cut
        )
        columns = {"input_ids": Ragged.of(ids)}
        if "token_type_ids" in found[0]:
            columns["token_type_ids"] = Ragged.of(example["token_type_ids"].tolist() for example in found)
        return Examples(columns, {"labels": torch.stack([example["labels"] for example in found]).numpy()}), line


TEXT_CLASSIFICATION = TaskKind(
    "text_classification",
    "the class of a text, or of a pair of texts",
    "AutoModelForSequenceClassification",
    "a model that can classify texts",
    _prepare,
    needs_pad=True,
)
