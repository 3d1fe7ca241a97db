"""What `inspect` and `collapse` look at: a model from disk or Hub, and batches of text in the model's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_geglu.errors import ConfigurationError

BUILT_IN = "builtin"
"""`--data builtin`: the documentation inside Python's standard library, held-out half."""

_BATCH_TOKENS = 1024
"""Tokens of one forward: enough for matrix products, little memory."""


def open_model(source: str, *, revision: str | None = None) -> Any:
    """A model by folder or Hub id, variant or not, in the dtype it was saved in."""
    from transformers import AutoConfig

    from hf_geglu.hub import load
    from hf_geglu.skeleton import architecture

    config = AutoConfig.from_pretrained(source, revision=revision)
    return load(architecture(config), source, dtype="auto", revision=revision or "main").eval()


def batches_of(
    data: Sequence[str], model: Any, tokenizer: Any, *, tokens: int, block_size: int = 128
) -> list[dict[str, Any]]:
    """The first so many tokens of a text as keyword arguments of a forward each.

    Args:
        data: as in the recipes: files, a folder of them, or one dataset by its name; or "builtin".
        model: whose inputs are made.
        tokenizer: of the model.
        tokens: how many; whole blocks, at least one.
        block_size: tokens of a block, less where the model takes less.

    Raises:
        ConfigurationError: a model that has no tokenizer.
        DataError: no such data, or less than one block of it.
    """
    import torch

    from hf_geglu.distance import is_causal

    if tokenizer is None or not callable(getattr(tokenizer, "convert_tokens_to_ids", None)):
        raise ConfigurationError(
            f"{type(model).__name__} has no tokenizer, so --data text cannot be given to it; expected a language "
            "model. Hand batches of inputs to hf_geglu.inspect_gates(model, batches)"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    size = min(block_size, limit) if isinstance(limit, int) and limit > 0 else block_size
    task = "clm" if is_causal(model) or tokenizer.mask_token_id is None else "mlm"
    rows = _blocks(data, tokenizer, task, size=size, count=max(1, tokens // size))
    per = max(1, _BATCH_TOKENS // size)
    batches = [{"input_ids": torch.stack(rows[i : i + per])} for i in range(0, len(rows), per)]
    if getattr(model.config, "is_encoder_decoder", False):
        batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    return batches


def _blocks(data: Sequence[str], tokenizer: Any, task: Any, *, size: int, count: int) -> list[Any]:
    from itertools import islice
    from pathlib import Path

    from hf_geglu.demo.text import stdlib_corpus
    from hf_geglu.training.data.corpus import load_corpus
    from hf_geglu.training.data.packing import blocks_from_texts
    from hf_geglu.training.settings.run import DataSettings

    if list(data) == [BUILT_IN]:
        found: Any = blocks_from_texts(stdlib_corpus().held_out, tokenizer, block_size=size, task=task)[0]
    else:
        named = len(data) == 1 and not Path(data[0]).exists()
        settings = DataSettings(
            dataset_name=data[0] if named else None,
            train_file=None if named else list(data),
            validation_split_percentage=0.0,
        )
        found = load_corpus(settings, tokenizer, task=task, block_size=size, seed=0).train
    return [block["input_ids"] for block in islice((found[i] for i in range(len(found))), count)]
