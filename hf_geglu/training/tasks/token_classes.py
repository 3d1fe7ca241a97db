"""Token classification: words and their classes, such as named entities. Predicted is the first token of each word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.corpus import Corpus
from hf_geglu.training.examples import Examples, Ragged
from hf_geglu.training.metrics import ClassMetric, EntityMetric, entity_names
from hf_geglu.training.objectives import IGNORED, Batch, Example, columns, stacked
from hf_geglu.training.rows import row_sets
from hf_geglu.training.sources import Rows
from hf_geglu.training.tasks.classes import Classes, classes_of, find_label_column
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
    known = getattr(getattr(sets.train.features["label"], "feature", None), "names", None)
    classes = classes_of(
        (value for rows in every for row in rows["label"] for value in row or ()),
        known=known,
        config=request.config,
        column=label,
    )
    train, line = _examples(sets.train, tokenizer, request, classes, "training")
    lines = [line, *sets.lines, f"{len(classes.names)} classes: {', '.join(classes.names[:10])}"]
    validation = None
    if sets.validation is not None:
        validation, line = _examples(sets.validation, tokenizer, request, classes, "validation")
        lines.append(line)
    names = classes.names
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


def _examples(rows: Rows, tokenizer: Any, request: Request, classes: Classes, what: str) -> tuple[Examples, str]:
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    cut = lost = empty = words = 0
    for batch in rows.iter(batch_size=1000):
        texts, given = [], []
        for row, names in zip(batch["words"], batch["label"], strict=True):
            if len(row or ()) != len(names or ()):
                raise DataError(
                    f"a {what} row has {len(row or ())} words and {len(names or ())} labels: expected as many. Mend it."
                )
            if row:
                texts.append(row)
                given.append([classes.number(name) for name in names])
            else:
                empty += 1
        if not texts:
            continue
        encoded = tokenizer(
            texts, is_split_into_words=True, truncation=True, max_length=request.block_size, verbose=False
        )
        for number, names in enumerate(given):
            places = encoded.word_ids(number)
            row_labels, before = [], None
            for place in places:
                first = place is not None and place != before
                labelled = first or (request.data.label_all_tokens and place is not None)
                row_labels.append(names[place] if labelled and place is not None else IGNORED)
                before = place
            kept = len({place for place in places if place is not None})
            cut += kept < len(names)
            lost += len(names) - kept
            words += kept
            ids.append(encoded["input_ids"][number])
            labels.append(row_labels)
    if not words:
        raise DataError(f"{len(rows):,} {what} rows without words: expected some. Check --text_column.")
    line = f"{what}: {len(ids):,} examples, {words:,} words, {sum(map(len, ids)):,} tokens"
    line += f"; {empty:,} without words skipped" * bool(empty)
    line += f"; {cut:,} cut short at {request.block_size}, {lost:,} words dropped" * bool(cut)
    return Examples({"input_ids": Ragged.of(ids), "labels": Ragged.of(labels)}), line


TOKEN_CLASSIFICATION = TaskKind(
    "token_classification",
    "the class of each word",
    "AutoModelForTokenClassification",
    "a model that can classify tokens",
    _prepare,
)
