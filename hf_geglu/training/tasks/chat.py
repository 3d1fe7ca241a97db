"""Supervised fine-tuning: conversations, or prompts and completions, with the loss on the answers only.

The columns are those that TRL's SFTTrainer takes: `messages`; `prompt` and `completion`, both texts or both
conversations; or `text`, which is learned whole. `tools` beside `messages` is handed to the chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_geglu.errors import DataError
from hf_geglu.training.data.bestfit import Documents, fitted, fitted_stream
from hf_geglu.training.data.corpus import Corpus, StreamedBlocks, find_text_column, require_first_block
from hf_geglu.training.data.packing import Packing, Tally, TokenBlocks
from hf_geglu.training.data.rows import row_sets
from hf_geglu.training.data.sources import Rows
from hf_geglu.training.data.tokenised import tokens_of
from hf_geglu.training.objectives.objective import IGNORED, CausalLM, Example
from hf_geglu.training.tasks.kind import Prepared, Request, TaskKind
from hf_geglu.training.tasks.template import (
    Rendered,
    give_template,
    render,
    require_template,
    tokens_and_labels,
)

Answer = tuple[list[int], list[int]]
"""Tokens and labels."""


def find_columns(found: Mapping[str, str], request: Request) -> dict[str, str]:
    """messages[, tools], prompt and completion[, tools], or text."""
    tools = {"tools": "tools"} if "tools" in found else {}
    if request.data.text_column is None:
        for names in (("messages",), ("conversations",), ("prompt", "completion")):
            if set(names) <= set(found):
                return {name: "messages" if name == "conversations" else name for name in names} | tools
    try:
        return {find_text_column(found, request.data.text_column): "text"}
    except DataError as error:
        raise DataError(
            f"no column messages, nor prompt and completion; and no text: {error} Expected what TRL's SFTTrainer takes."
        ) from error


_COUNTED = ("documents", "empty", "truncated_documents", "truncated_tokens", "unanswered", "unanswered_turns")
"""What a `Tally` knows of rows that are kept in the cache."""


@dataclass(frozen=True)
class _Reader:
    """From rows to tokens and labels."""

    request: Request

    def answers(self, rows: Rows, tally: Tally) -> Iterator[Answer]:
        limit = self.request.block_size
        for row in rows:
            tally.documents += 1
            rendered, special = self._rendered(row)
            if rendered is None:
                tally.empty += 1
                continue
            tally.unanswered_turns += rendered.without_span
            ids, labels = tokens_and_labels(self.request.processor, rendered, special=special)
            # the first token of a document is never predicted
            if all(label == IGNORED for label in labels[1:limit]):
                tally.unanswered += 1
                continue
            if len(ids) > limit:
                tally.truncated_documents += 1
                tally.truncated_tokens += len(ids) - limit
            yield ids[:limit], labels[:limit]

    def _rendered(self, row: Mapping[str, Any]) -> tuple[Rendered | None, bool]:
        data, tokenizer = self.request.data, self.request.processor
        tools = row.get("tools") or None
        if "messages" in row:
            messages = _messages(row["messages"])
            if not messages:
                return None, False
            rendered = render(tokenizer, messages, tools)
            whole = Rendered(rendered.text, ((0, len(rendered.text)),))
            return (rendered if data.assistant_only_loss else whole), False
        if "text" in row:
            text = row["text"] or ""
            end = tokenizer.eos_token or ""
            text += end * (not text.endswith(end))
            return (Rendered(text, ((0, len(text)),)) if (row["text"] or "").strip() else None), True
        prompt, completion = row["prompt"], row["completion"]
        if not prompt or not completion:
            return None, False
        if isinstance(prompt, str) != isinstance(completion, str):
            raise DataError("prompt and completion, one a text and the other a conversation: expected the same kind.")
        if not isinstance(prompt, str):
            before = _messages(prompt)
            rendered = render(tokenizer, [*before, *_messages(completion)], tools, after=len(before))
        else:
            end = tokenizer.eos_token or ""
            text = prompt + completion + end * (not completion.endswith(end))
            rendered = Rendered(text, ((len(prompt), len(text)),))
        whole = Rendered(rendered.text, ((0, len(rendered.text)),))
        return (rendered if data.completion_only_loss else whole), isinstance(prompt, str)

    def documents(self, rows: Rows, tally: Tally, *, use_cache: bool) -> Documents:
        """All rows, in memory or out of the cache; the tally counts them either way."""
        data = self.request.data

        def make() -> tuple[Documents, dict[str, int]]:
            own = Tally()
            pairs = list(self.answers(rows, own))
            made = Documents.of((ids for ids, _ in pairs), (labels for _, labels in pairs))
            return made, {name: int(getattr(own, name)) for name in _COUNTED}

        depends = ["sft", self.request.block_size, data.assistant_only_loss, data.completion_only_loss]
        found, told = tokens_of(rows, self.request.processor, make, depends_on=depends, use_cache=use_cache)
        for name, count in told.items():
            setattr(tally, name, getattr(tally, name) + count)
        tally.tokens += len(found.tokens)
        tally.predicted += int((found.labels != IGNORED).sum()) if found.labels is not None else 0
        return found


def _messages(rows: Any) -> list[dict[str, Any]]:
    """Messages as templates want them: role and content, without the nulls that a table fills rows up with; ShareGPT's
    from and value are read too."""
    roles = {"human": "user", "gpt": "assistant"}
    found = []
    for row in rows or ():
        message = {name: value for name, value in row.items() if value is not None}
        if "role" not in message and {"from", "value"} <= message.keys():
            message = {"role": roles.get(message["from"], message["from"]), "content": message["value"]}
        if "role" not in message:
            raise DataError(f"a message with {', '.join(message) or 'nothing'}: expected role and content.")
        found.append(message)
    return found


def _prepare(request: Request) -> Prepared:
    data, tokenizer = request.data, request.processor
    give_template(tokenizer, data.chat_template_path)

    def find(found: dict[str, str]) -> dict[str, str]:
        chosen = find_columns(found, request)
        conversations = "messages" in chosen.values() or (
            "prompt" in chosen and not found["prompt"].startswith(("string", "large_string"))
        )
        if conversations:
            require_template(tokenizer)
        return chosen

    sets = row_sets(data, find, seed=request.seed)
    reader = _Reader(request)
    packing = Packing(request.block_size)
    packs = data.packs(default=False)
    lines = list(sets.lines)
    pad = tokenizer.pad_token_id
    objective = CausalLM(pad_token_id=0 if pad is None else int(pad))

    def blocks(rows: Rows, tally: Tally) -> TokenBlocks:
        documents = reader.documents(rows, tally, use_cache=data.use_cache and not data.streaming)
        if packs:
            return fitted(documents, packing, tally)
        tally.blocks += len(documents)
        return documents.blocks()

    validation = None
    if sets.validation is not None:
        tally = Tally()
        validation = blocks(sets.validation, tally)
        lines.append(tally.line("validation"))
        if not len(validation):
            raise DataError(f"{tally.documents:,} validation rows without an answer to predict: expected some.")
    else:
        lines.append("validation: none, so there is no evaluation")
    column = " and ".join(sets.columns)
    if data.streaming:

        def read() -> Iterator[Example]:
            answers = reader.answers(sets.train, Tally())
            if packs:
                return fitted_stream(answers, packing, Tally())
            return ({"input_ids": ids, "labels": labels} for ids, labels in answers)

        stream = StreamedBlocks(read)
        require_first_block(stream, packing)
        told = ("training: a stream, read in its own order", *lines)
        return Prepared(objective, Corpus(stream, validation, told, column, sets.revision, packs))
    tally = Tally()
    train = blocks(sets.train, tally)
    if not len(train):
        raise DataError(
            f"{tally.documents:,} rows, {tally.empty:,} of them empty and {tally.unanswered:,} without an answer "
            f"within {request.block_size} tokens: expected something to predict. Check the columns, or "
            "raise --max_length."
        )
    told = (tally.line("training"), *lines)
    return Prepared(objective, Corpus(train, validation, told, column, sets.revision, packs))


SFT = TaskKind("sft", "the answers of a conversation", "AutoModelForCausalLM", "a causal model", _prepare, writes=True)
