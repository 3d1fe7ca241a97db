"""Does a document see the one before it in its block? Found out by running the model that will be trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_geglu.modes import evaluating
from hf_geglu.training.evaluation import without_cache
from hf_geglu.training.objectives.isolation import Form, Isolation, isolated

logger = logging.getLogger(__name__)

ROWS = ((7, 9, 3), (11, 4))
"""Lengths of the documents in the two rows of the probe. The rows are unequal; no document ends where another does."""
NOISE = 64
"""Rounding steps of the output's dtype, relative to its largest value, that a document may be off by."""


def find_isolation(model: nn.Module, *, causal: bool, longest: int, autocast: Any = None) -> Isolation | None:
    """The way to keep documents of a block apart in this model: the first in which the outputs of each document, packed
    among others, equal those of the document alone. None: there is none.

    Args:
        model: on the device that it will be trained on.
        causal: whether a token sees those before it only.
        longest: length of the blocks that will be trained on, in tokens. A 4-D mask takes the place of a sliding
            window, so it is not considered where the blocks are longer than that.
        autocast: context manager of the precision that will be trained in.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", 0) or 2)
    generator = torch.Generator().manual_seed(0)
    rows = [
        [torch.randint(min(4, vocabulary - 1), vocabulary, (n,), generator=generator) for n in lengths]
        for lengths in ROWS
    ]
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model), without_cache(model), autocast or nullcontext():
        alone = [[_run(model, {"input_ids": document[None].to(device)}) for document in row] for row in rows]
        if any(output is None for row in alone for output in row):
            return None
        together = _run(model, _inputs(rows, None, device))
        leaky = None if together is None else _distance(together, alone, flat=False)
        for isolation in _candidates(text, causal=causal, longest=longest):
            output = _run(model, _inputs(rows, isolation, device))
            if output is None:
                continue
            difference = _distance(output, alone, flat=isolation.form == "flattened")
            scale = max(float(each.abs().max()) for row in alone for each in row if each is not None)
            steps = NOISE * torch.finfo(output.dtype).eps * scale
            # 16-bit types are so coarse that a small leak could hide in their rounding
            apart = leaky is None or difference[1] <= 0.25 * leaky[1] or difference[0] == 0
            if difference[0] <= steps and apart:
                return isolation
    return None


def _candidates(config: Any, *, causal: bool, longest: int) -> Iterator[Isolation]:
    flash = "flash" in str(getattr(config, "_attn_implementation", ""))
    padding = getattr(config, "pad_token_id", None)
    offsets = (0, int(padding) + 1) if padding is not None else (0,)
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    forms: tuple[Form, ...] = ("flattened",) if flash else ("positions",)
    if not flash and not (window and int(window) < longest):
        forms = ("positions", "mask", "additive")
    for form in forms:
        for offset in offsets:
            yield Isolation(form, offset=offset, causal=causal)


def _inputs(rows: list[list[Tensor]], isolation: Isolation | None, device: torch.device) -> dict[str, Tensor]:
    ids = [torch.cat(row) for row in rows]
    if isolation is None:
        batch = {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)}
    else:
        positions = [torch.cat([torch.arange(len(document)) for document in row]) for row in rows]
        batch = isolated(ids, positions, ids, isolation, 0)
        del batch["labels"]
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor | None:
    try:
        output: Any = model(**inputs)
    except Exception as error:  # a model may have anything against a form; then it is not its form
        logger.debug("%s does not take %s: %s", type(model).__name__, ", ".join(inputs), error)
        return None
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def _distance(output: Tensor, alone: list[list[Tensor | None]], *, flat: bool) -> tuple[float, float]:
    """(largest, mean) difference between the documents of a packed output and the same documents alone."""
    differences = []
    begin = 0
    for number, row in enumerate(alone):
        if not flat:
            begin = 0
        for document in row:
            assert document is not None
            end = begin + document.shape[1]
            differences.append((output[0 if flat else number, begin:end] - document[0]).float().abs().flatten())
            begin = end
    every = torch.cat(differences)
    return float(every.max()), float(every.mean())
