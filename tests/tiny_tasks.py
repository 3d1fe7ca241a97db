"""For each task a model of a few thousand parameters with its processor on disk, and a little data of its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny
from tiny_training import SENTENCES, VOCABULARY, causal_tokenizer, gpt2, masked_tokenizer, saved_model
from transformers import AutoModelForSeq2SeqLM, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<eos> {{ m['role'] }} {{ m['content'] }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<eos> assistant {% endif %}"
)
"""A template that marks no answers, as most do not."""


def write_task(place: Path, task: str, *, rows: int = 40) -> list[str]:
    """Model and data of a task in that folder; returns the flags that name them."""
    make = {
        "clm": _text,
        "mlm": _text,
        "sft": _chats,
        "seq2seq": _pairs,
        "text_classification": _classes,
        "token_classification": _entities,
        "image_classification": _pictures,
    }[task]
    make(place, task, rows)
    data = ["--train_dir", f"{task}-data"] if task == "image_classification" else ["--train_file", f"{task}.jsonl"]
    length = [] if task == "image_classification" else ["--max_length", "24"]
    return ["--model_name_or_path", f"{task}-model", *data, *length, "--validation_split_percentage", "20"]


def sentence(number: int) -> str:
    """Every one is another."""
    words = SENTENCES[number % 5].split()
    return " ".join([*words[number % 7 :], *words[: number % 7], *SENTENCES[(number // 5) % 5].split()[: number % 4]])


def _dump(place: Path, task: str, rows: list[dict[str, Any]]) -> None:
    (place / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _text(place: Path, task: str, rows: int) -> None:
    saved_model(place / f"{task}-model", task)
    _dump(place, task, [{"text": sentence(i)} for i in range(rows)])


def _chats(place: Path, task: str, rows: int) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(place / f"{task}-model")
    gpt2().save_pretrained(place / f"{task}-model")
    turns = [("user", 0), ("assistant", 3), ("user", 1), ("assistant", 7)]
    _dump(
        place,
        task,
        [
            {"messages": [{"role": role, "content": " ".join(sentence(i + k).split()[:3])} for role, k in turns]}
            for i in range(rows)
        ],
    )


def _pairs(place: Path, task: str, rows: int) -> None:
    pieces: Any = masked_tokenizer()._tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="<unk>", eos_token="<eos>", pad_token="[PAD]", model_max_length=64
    )
    tokenizer.save_pretrained(place / f"{task}-model")
    sizes = {
        "vocab_size": VOCABULARY,
        "pad_token_id": 5,
        "decoder_start_token_id": 5,
        "eos_token_id": 1,
        "dropout_rate": 0.0,
    }
    tiny("t5", auto=AutoModelForSeq2SeqLM, **sizes).save_pretrained(place / f"{task}-model")
    _dump(place, task, [{"source": sentence(i), "target": " ".join(sentence(i).split()[:4])} for i in range(rows)])


def _encoder(place: Path, task: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=5, **sizes, **quiet)
    BertForMaskedLM(config).save_pretrained(place / f"{task}-model")
    masked_tokenizer().save_pretrained(place / f"{task}-model")


def _classes(place: Path, task: str, rows: int) -> None:
    _encoder(place, task)
    names = ["animals", "blocks", "values", "silence", "numbers"]
    _dump(place, task, [{"text": sentence(i), "label": names[i % 5]} for i in range(rows)])


def _entities(place: Path, task: str, rows: int) -> None:
    _encoder(place, task)
    found = []
    for i in range(rows):
        words = sentence(i).split()
        tags = ["B-X" if word in ("fox", "gate", "one") else "I-X" if word == "two" else "O" for word in words]
        found.append({"tokens": words, "ner_tags": tags})
    _dump(place, task, found)


def _pictures(place: Path, task: str, rows: int) -> None:
    from PIL import Image
    from transformers import AutoModel, ViTImageProcessor

    tiny("vit", auto=AutoModel).save_pretrained(place / f"{task}-model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(place / f"{task}-model")
    generator = torch.Generator().manual_seed(0)
    for i in range(rows):
        name = ("dark", "light")[i % 2]
        pixels = torch.randint(0, 100, (20, 24, 3), generator=generator) + 120 * (i % 2)
        folder = place / f"{task}-data" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{i}.png")
