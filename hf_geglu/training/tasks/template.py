"""Which part of a conversation is an answer: found by rendering it once more up to each answer.

A chat template is a program; some mark answers ({% generation %}), most do not, and some write earlier turns in another
way once later ones follow. So an answer is what the text has beyond the conversation before it with the prompt for an
answer. That is checked to be a beginning of the whole text; where it is none, the turn has no span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.objectives.objective import IGNORED

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: as the model sees it.
        spans: (begin, end) of each answer, in characters.
        without_span: answers that the template writes otherwise once later turns follow.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    without_span: int = 0


def give_template(tokenizer: Any, path: str | None) -> None:
    """The template of a file, if one is named.

    Raises:
        ConfigurationError: it cannot be read, or there is none at all.
    """
    if path is not None:
        file = Path(path) / "chat_template.jinja" if Path(path).is_dir() else Path(path)
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"--chat_template_path {file.name} cannot be read: expected a Jinja file in UTF-8. Check the path."
            ) from error


def require_template(tokenizer: Any) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ConfigurationError: it has none.
    """
    if not tokenizer.chat_template:
        raise ConfigurationError(
            f"the data are conversations, and {type(tokenizer).__name__} has no chat template: expected one. Name a "
            "Jinja file with --chat_template_path, or an instruct model's tokenizer with --tokenizer_name."
        )


def render(tokenizer: Any, messages: Messages, tools: Any = None, *, after: int | None = None) -> Rendered:
    """A conversation and where its answers are.

    Args:
        tokenizer: with a chat template.
        messages: each with role and content.
        tools: what the template is told of tools.
        after: everything beyond so many messages is the answer; None: every message of the assistant is one.

    Raises:
        DataError: the template does not take it.
    """

    def text_of(part: Messages, *, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(list(part), tools=tools, tokenize=False, add_generation_prompt=prompt)
        return text

    try:
        whole = text_of(messages)
        ends = (
            [(after, len(messages))]
            if after is not None
            else [(number, number + 1) for number, message in enumerate(messages) if message["role"] == "assistant"]
        )
        spans, lost = [], 0
        for begin, end in ends:
            before = text_of(messages[:begin], prompt=True) if begin else ""
            until = whole if end == len(messages) else text_of(messages[:end])
            if not (whole.startswith(before) and whole.startswith(until)) or len(before) >= len(until):
                lost += 1
                continue
            # What a template puts after the end token of a turn is no part of the answer.
            spans.append((len(before), max(len(until.rstrip()), len(before))))
    except Exception as error:  # templates raise whatever they like
        raise DataError(
            f"the chat template does not take a conversation of {', '.join(str(m.get('role')) for m in messages)}: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}. Expected roles that it knows. Mend the "
            "data, or give another --chat_template_path."
        ) from error
    return Rendered(whole, tuple(spans), lost)


def tokens_and_labels(tokenizer: Any, rendered: Rendered, *, special: bool) -> tuple[list[int], list[int]]:
    """Token ids of a text, and for each its label: itself within an answer, -100 elsewhere.

    A token that reaches over the beginning of an answer belongs to the question: nothing of the question is learned.

    Args:
        tokenizer: of Transformers.
        rendered: text and answers.
        special: add the special tokens of the tokenizer; a template brings its own.
    """
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            rendered.text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids = list(encoded["input_ids"])
        inside = [
            begin < end and any(first <= begin and end <= last for first, last in rendered.spans)
            for begin, end in encoded["offset_mapping"]
        ]
    else:  # no offsets: piece by piece, which is how such tokenizers read a template's special tokens anyway
        ids, inside, done = [], [], 0
        for first, last in (*rendered.spans, (len(rendered.text), len(rendered.text))):
            for part, answer in ((rendered.text[done:first], False), (rendered.text[first:last], True)):
                piece = tokenizer(part, add_special_tokens=special and not done and not answer)["input_ids"]
                ids += piece
                inside += [answer] * len(piece)
            done = last
    return ids, [token if own else IGNORED for token, own in zip(ids, inside, strict=True)]
