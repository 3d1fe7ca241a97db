"""What all sides are given: one text, and the order of its blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_geglu.training.data.batches import epoch_order

SEED = 42
"""Of the recipe, which shuffles by it; the others are handed that order."""


@dataclass(frozen=True)
class Texts:
    """One running text to train on, and one that is held out, for the side that insists on having one.

    Attributes:
        train, held_out: JSON files with one row {"text"}: a single document, so that what a side puts between
            documents makes no difference.
        order: the block of each draw.
    """

    train: str
    held_out: str
    order: tuple[int, ...]


def write_texts(folder: Path, documents: Sequence[str], tokenizer: Any, *, block: int, draws: int) -> Texts:
    """As many documents as make so many blocks.

    Raises:
        ValueError: there are not enough.
    """
    text, ids = "", []
    for taken, document in enumerate(documents):  # noqa: B007 - what is left is needed
        text = f"{text}\n\n{document}" if text else document
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # The recipe ends a document with a token of its own, which must not complete a block.
        if len(ids) >= block * draws and (len(ids) + 1) % block:
            break
    else:
        raise ValueError(f"{len(ids)} tokens in {len(documents)} documents: expected {block * draws}")
    rest = "\n\n".join(documents[taken + 1 :])
    train, held = folder / "train.json", folder / "held_out.json"
    train.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    held.write_text(json.dumps({"text": rest[: 16 * block]}) + "\n", encoding="utf-8")
    return Texts(str(train), str(held), tuple(epoch_order(len(ids) // block, seed=SEED, epoch=0)))
