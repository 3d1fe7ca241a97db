"""Tiny bases and variants saved with their papers, for the tests of verify, reproduce, push and delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tiny_models import TINY, tiny
from tiny_training import causal_tokenizer

import hf_geglu
from hf_geglu.hub import save_folder

CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n\n# A base model\n"


def saved_base(folder: Path, model_type: str, *, card: str | None = CARD) -> Path:
    """A base with tokenizer and card, as a repository would have it."""
    tiny(model_type).save_pretrained(folder)
    causal_tokenizer().save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def loaded_base(folder: Path, model_type: str, **kwargs: Any) -> Any:
    """The base out of its folder, so that it knows where it comes from."""
    return _auto(model_type).from_pretrained(folder, **kwargs)


def saved_variant(tmp_path: Path, model_type: str, *, shards: str = "5GB", **options: Any) -> tuple[Path, Path]:
    """(folder of the variant, folder of its base)."""
    base = saved_base(tmp_path / f"{model_type}-base", model_type)
    model = loaded_base(base, model_type)
    hf_geglu.convert(model, **options)
    return save_folder(
        model, tmp_path / f"{model_type}-geglu", tokenizer=causal_tokenizer(), max_shard_size=shards
    ), base


def _auto(model_type: str) -> Any:
    auto = TINY[model_type][0]
    return auto if auto.__name__.startswith("Auto") else transformers.AutoModel
