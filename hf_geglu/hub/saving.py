"""Writes a model's folder so that it is there completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_geglu.files import whole_folder
from hf_geglu.hub.card import CARD, is_ours
from hf_geglu.hub.companions import carry_companions
from hf_geglu.hub.papers import document
from hf_geglu.provenance import TrainingRecord


def save_folder(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    training: TrainingRecord | None = None,
    command: Sequence[str] = (),
    curves: Path | None = None,
    name: str | None = None,
    keep_card: Path | None = None,
    companions: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> Path:
    """Write a model, its generation config, its tokenizer or processor and its papers: all of it or nothing.

    The papers of a variant are golden outputs, a manifest and a model card (see `hf_geglu.hub.papers`). A card that a
    person wrote, or edited, in a folder that is replaced is kept.

    Args:
        model: a transformers model, converted or not.
        folder: where to. Must not exist, or be empty, unless `overwrite`.
        tokenizer: anything with `save_pretrained` that belongs to the model.
        max_shard_size: largest weights file, as in transformers.
        overwrite: replace what is there, once the new folder is complete.
        training: what happened to the model since it was converted or loaded, for manifest and card.
        command: words of the command that made it, as in `sys.argv`.
        curves: a PNG of its loss curves, for the card.
        name: of the variant, for the card; the folder's by default.
        keep_card: a card that a person wrote, to go along instead of ours (which then lies beside it).
        companions: folder or Hub id of the model that was converted. If sentence-transformers runs it, its pooling and
            other modules go along.
        revision: of `companions` on the Hub.

    Returns:
        The folder.

    Raises:
        OutputError: the folder must not be written.
    """
    target = Path(folder)
    with whole_folder(folder, overwrite=overwrite) as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if companions is not None:
            carry_companions(companions, temporary, revision=revision)
        if keep_card is None and not is_ours(target / CARD):
            keep_card = target / CARD
        if keep_card is not None:
            shutil.copyfile(keep_card, temporary / CARD)
        document(
            model,
            temporary,
            training=training,
            command=command,
            max_shard_size=max_shard_size,
            name=name or target.resolve().name,
            curves=curves,
        )
    return target
