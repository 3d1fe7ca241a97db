"""Sequence classification: a text, or a pair of texts, and its class. What the loss is weighted by are examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_geglu.errors import DataError
from hf_geglu.training.corpus import Corpus, find_text_column, text_columns
from hf_geglu.training.examples import Examples, Ragged
from hf_geglu.training.metrics import ClassMetric
from hf_geglu.training.objectives import Batch, Example, padded
from hf_geglu.training.rows import row_sets
from hf_geglu.training.sources import Rows
from hf_geglu.training.tasks.classes import Classes, classes_of, find_label_column
from hf_geglu.training.tasks.kind import Prepared, Request, TaskKind

PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("question", "sentence"), ("text1", "text2"), ("sentence_A", "sentence_B")),
)
"""Columns that are taken for a pair of texts, as GLUE and its relatives call them."""


@dataclass(frozen=True)
class SequenceClasses:
    """Predict the class of an example."""

    pad_token_id: int
    metric: ClassMetric

    def batch(self, examples: Sequence[Example], *, positions: Sequence[int], seed: int) -> Batch:
        """(B, T) tokens and (B,) labels."""
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
    sets = row_sets(
        request.data,
        lambda columns: find_columns(columns, request),
        inputs=("text",),
        seed=request.seed,
    )
    label = next(old for old, new in sets.columns.items() if new == "label")
    every = [sets.train, *([sets.validation] if sets.validation is not None else [])]
    known = getattr(sets.train.features["label"], "names", None)
    classes = classes_of(
        (value for rows in every for value in rows["label"]), known=known, config=request.config, column=label
    )
    train, line = _examples(sets.train, request, classes, "training")
    lines = [line, *sets.lines, f"{len(classes.names)} classes: {_told(classes)}"]
    validation = None
    if sets.validation is not None:
        validation, line = _examples(sets.validation, request, classes, "validation")
        lines.append(line)
    column = " and ".join(old for old, new in sets.columns.items() if new != "label")
    objective = SequenceClasses(int(request.processor.pad_token_id), ClassMetric(len(classes.names)))
    corpus = Corpus(train, validation, tuple(lines), column, sets.revision)
    return Prepared(objective, corpus, classes.options())


def _told(classes: Classes) -> str:
    return ", ".join(classes.names[:8]) + ", ..." * (len(classes.names) > 8)


def _examples(rows: Rows, request: Request, classes: Classes, what: str) -> tuple[Examples, str]:
    tokenizer: Any = request.processor
    ids: list[list[int]] = []
    types: list[list[int]] = []
    labels: list[int] = []
    cut = lost = blank = 0
    for batch in rows.iter(batch_size=1000):
        keep = [number for number, text in enumerate(batch["text"]) if text and not text.isspace()]
        blank += len(batch["text"]) - len(keep)
        if not keep:
            continue
        texts = [[batch[name][number] or "" for number in keep] for name in ("text", "text_pair") if name in batch]
        whole = tokenizer(*texts, verbose=False)["input_ids"]
        encoded = tokenizer(*texts, truncation=True, max_length=request.block_size, verbose=False)
        for before, after in zip(whole, encoded["input_ids"], strict=True):
            cut += len(after) < len(before)
            lost += len(before) - len(after)
        ids += encoded["input_ids"]
        types += encoded.get("token_type_ids", [])
        labels += [classes.number(batch["label"][number]) for number in keep]
    if not ids:
        raise DataError(f"{len(rows):,} {what} rows without text: expected some. Check --text_column.")
    line = f"{what}: {len(ids):,} examples, {sum(map(len, ids)):,} tokens"
    line += f"; {blank:,} without text skipped" * bool(blank)
    line += f"; {cut:,} cut short at {request.block_size}, {lost:,} tokens dropped" * bool(cut)
    columns = {"input_ids": Ragged.of(ids)} | ({"token_type_ids": Ragged.of(types)} if types else {})
    return Examples(columns, {"labels": np.asarray(labels, dtype=np.int64)}), line


TEXT_CLASSIFICATION = TaskKind(
    "text_classification",
    "the class of a text, or of a pair of texts",
    "AutoModelForSequenceClassification",
    "a model that can classify texts",
    _prepare,
    needs_pad=True,
)
