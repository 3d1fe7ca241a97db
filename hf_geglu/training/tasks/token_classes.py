"""Token classification: words and their classes, such as named entities. Predicted is the first token of each word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.data.batches import Blocks
from hf_geglu.training.data.corpus import Corpus, StreamedBlocks, require_first
from hf_geglu.training.data.examples import Counts, Examples, Ragged
from hf_geglu.training.data.rows import row_sets
from hf_geglu.training.data.sources import Rows
from hf_geglu.training.objectives.metrics import ClassMetric, EntityMetric, entity_names
from hf_geglu.training.objectives.objective import IGNORED, Batch, Example, columns, stacked
from hf_geglu.training.tasks.classes import Classes, classes_of, find_label_column, streamed_classes, told
from hf_geglu.training.tasks.kind import Prepared, Request, TaskKind

WORDS = ("tokens", "words", "text")
LABELS = ("ner_tags", "tags", "pos_tags", "chunk_tags", "labels", "label")
"""Columns that are taken for words and their classes, in this order."""


@dataclass(frozen=True)
class TokenClasses:
    """Predict the class of each word."""

    pad_token_id: int
    metric: ClassMetric | EntityMetric

    def batch(self, examples: Sequence[Example], *, positions: Sequence[int], seed: int) -> Batch:
        """(B, T) tokens and labels; a word is labelled at its first token, or at every one."""
        ids, masks, labels = [], [], []
        for example in examples:
            row, mask, own = columns(example)
            assert own is not None
            ids.append(row)
            masks.append(mask)
            labels.append(own)
        return stacked(ids, masks, labels, self.pad_token_id)


def find_columns(found: Mapping[str, str], request: Request) -> dict[str, str]:
    """Words and classes, both lists."""
    exist = ", ".join(f"{name} ({kind})" for name, kind in found.items()) or "none"
    lists = [name for name, kind in found.items() if "List" in kind or "list" in kind or "Sequence" in kind]
    wanted = request.data.text_column
    words = wanted or next((name for name in WORDS if name in lists), None)
    if words is None or words not in lists:
        raise DataError(
            f"--text_column {wanted}: expected a column with a list of words. The columns: {exist}."
            if wanted
            else f"no column with a list of words called {', '.join(WORDS)}: say --text_column. The columns: {exist}."
        )
    label = find_label_column(
        {name: kind for name, kind in found.items() if name in lists and name != words},
        request.data.label_column,
        names=LABELS,
    )
    return {words: "words", label: "label"}


def _prepare(request: Request) -> Prepared:
    tokenizer = _for_words(request.processor)
    sets = row_sets(request.data, lambda found: find_columns(found, request), inputs=("words",), seed=request.seed)
    label = next(old for old, new in sets.columns.items() if new == "label")
    every = [sets.train, *([sets.validation] if sets.validation is not None else [])]
    known = getattr(getattr((sets.train.features or {}).get("label"), "feature", None), "names", None)
    given, streams = request.data.label_names, request.data.streaming
    if streams:
        classes = streamed_classes(known=known, config=request.config, column=label, given=given)
    else:
        values = (value for rows in every for row in rows["label"] for value in row or ())
        classes = classes_of(values, known=known, config=request.config, column=label, given=given)
    reader = _Reader(tokenizer, request, classes)
    lines: list[str] = []
    validation = None
    if sets.validation is not None:
        validation, line = reader.examples(sets.validation, "validation")
        lines.append(line)
    train: Blocks
    if streams:
        train = StreamedBlocks(lambda: reader.encoded(sets.train, "training", Counts()))
        require_first(train)
        line = "training: a stream, read in its own order"
    else:
        train, line = reader.examples(sets.train, "training")
    names = classes.names
    lines = [line, *sets.lines, f"{len(names)} classes: {told(names, 10)}", *lines]
    metric = EntityMetric(names) if entity_names(names) else ClassMetric(len(names))
    pad = request.processor.pad_token_id
    objective = TokenClasses(0 if pad is None else int(pad), metric)
    column = next(old for old, new in sets.columns.items() if new == "words")
    return Prepared(objective, Corpus(train, validation, tuple(lines), column, sets.revision), classes.options())


def _for_words(tokenizer: Any) -> Any:
    """A tokenizer that takes words one by one.

    Raises:
        ConfigurationError: it cannot say which token belongs to which word.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(
            f"{type(tokenizer).__name__} does not say which token belongs to which word: expected a fast tokenizer. "
            "Give one with --tokenizer_name."
        )
    try:
        tokenizer(["a"], is_split_into_words=True)
    except (AssertionError, ValueError):  # byte-level BPE that would join the words
        tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path, add_prefix_space=True)
    return tokenizer


@dataclass(frozen=True)
class _Reader:
    """From words to tokens and labels."""

    tokenizer: Any
    request: Request
    classes: Classes

    def encoded(self, rows: Rows, what: str, counts: Counts) -> Iterator[dict[str, Any]]:
        """One example after the other."""
        for batch in rows.iter(batch_size=1000):
            texts, given = [], []
            for row, names in zip(batch["words"], batch["label"], strict=True):
                if len(row or ()) != len(names or ()):
                    raise DataError(
                        f"a {what} row has {len(row or ())} words and {len(names or ())} labels: expected as many. "
                        "Mend it."
                    )
                if row:
                    texts.append(row)
                    given.append([self.classes.number(name) for name in names])
                else:
                    counts.blank += 1
            if not texts:
                continue
            limit = self.request.block_size
            encoded = self.tokenizer(texts, is_split_into_words=True, truncation=True, max_length=limit, verbose=False)
            for number, names in enumerate(given):
                places = encoded.word_ids(number)
                kept = len({place for place in places if place is not None})
                counts.cut += kept < len(names)
                counts.lost += len(names) - kept
                labels = torch.tensor(self._labels(places, names))
                yield {"input_ids": torch.tensor(encoded["input_ids"][number]), "labels": labels}

    def _labels(self, places: Sequence[int | None], names: Sequence[int]) -> list[int]:
        """A label for each token, given the word that it belongs to."""
        found, before = [], None
        for place in places:
            labelled = place is not None and (place != before or self.request.data.label_all_tokens)
            found.append(names[place] if labelled and place is not None else IGNORED)
            before = place
        return found

    def examples(self, rows: Rows, what: str) -> tuple[Examples, str]:
        """All of them, in memory."""
        counts = Counts()
        found = list(self.encoded(rows, what, counts))
        if not found:
            raise DataError(f"{counts.blank:,} {what} rows without words: expected some. Check --text_column.")
        ids, labels = (Ragged.of(row[name].tolist() for row in found) for name in ("input_ids", "labels"))
        predicted = int((labels.values != IGNORED).sum())
        line = f"{what}: {len(found):,} examples, {predicted:,} labels, {len(ids.values):,} tokens"
        line += f"; {counts.blank:,} without words skipped" * bool(counts.blank)
        limit = self.request.block_size
        line += f"; {counts.cut:,} cut short at {limit}, {counts.lost:,} words dropped" * bool(counts.cut)
        return Examples({"input_ids": ids, "labels": labels}), line


TOKEN_CLASSIFICATION = TaskKind(
    "token_classification",
    "the class of each word",
    "AutoModelForTokenClassification",
    "a model that can classify tokens",
    _prepare,
)
