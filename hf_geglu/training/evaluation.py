"""Mean negative log-likelihood of a model over blocks, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_geglu.errors import DataError
from hf_geglu.modes import evaluating
from hf_geglu.training.data.batches import MapBlocks, eval_batches
from hf_geglu.training.objectives.head import Head, NoHead, find_head, logits_in
from hf_geglu.training.objectives.metrics import Metric
from hf_geglu.training.objectives.objective import IGNORED, Batch, CausalLM, Objective, predicted

EVAL_SEED = 20200212
"""Masks of an evaluation are always the same, so that evaluations can be compared (the day of arXiv:2002.05202)."""


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        nll: mean negative log-likelihood of what is predicted, in nats; of a regression the mean squared error.
        perplexity: exp(nll) of tokens, infinite where that overflows; None of anything else.
        tokens: number of predicted tokens, or of whatever else the objective predicts.
        metrics: what the objective counts besides, such as accuracy.
        loss_name: what `nll` is: "nll" of tokens, "cross_entropy" of classes, "mse" of numbers.
    """

    nll: float
    perplexity: float | None
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    loss_name: str = "nll"

    @classmethod
    def of(
        cls, total_nll: float, tokens: int, metric: Metric | None = None, counts: Tensor | None = None
    ) -> EvalResult:
        """From the sum over all tokens, and what a metric has counted."""
        nll = total_nll / tokens
        perplexity = math.exp(nll) if nll < 700 else math.inf if nll == nll else math.nan
        if metric is None or counts is None:
            return cls(nll=nll, perplexity=perplexity, tokens=tokens)
        name = metric.loss_name
        return cls(nll, perplexity if name == "nll" else None, tokens, metric.values(counts), name)


def summed_nll(model: nn.Module, batch: Batch, head: Head | NoHead, *, divisor: float = 1.0) -> Tensor:
    """Sum of the negative log-likelihoods of the labels of a batch, divided by `divisor`, as a float32 scalar.

    It is computed in the head or from the logits rather than by the model, because the models of Transformers divide
    by counts of their own.
    """
    if isinstance(head, Head) and head.usable():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return head.summed_loss(lambda: model(**inputs), batch["labels"], ignore_index=IGNORED, divisor=divisor).float()
    return _loss_of(logits_of(model, batch), batch["labels"]) / divisor


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """What a model says to a batch, whose labels it does not get."""
    return logits_in(model(**{name: tensor for name, tensor in batch.items() if name != "labels"}))


def _loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    if not labels.is_floating_point():
        return nn.functional.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
    kept, told = predicted(labels), logits.float().view(labels.shape)
    if labels.ndim == 1:
        return nn.functional.mse_loss(told[kept], labels[kept], reduction="sum")
    return nn.functional.binary_cross_entropy_with_logits(told[kept], labels[kept], reduction="sum")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on that device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep a decoder from building a key-value cache that training and evaluation never read."""
    config: Any = getattr(getattr(model, "module", model), "config", None)  # .module: inside DDP
    text_config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    before = getattr(text_config, "use_cache", None)
    if before:
        text_config.use_cache = False
    try:
        yield
    finally:
        if before:
            text_config.use_cache = before


def evaluate(
    model: nn.Module,
    blocks: MapBlocks,
    *,
    objective: Objective | None = None,
    batch_size: int = 8,
    accelerator: Any = None,
    head: Head | NoHead | None = None,
) -> EvalResult:
    """Token-weighted negative log-likelihood of `blocks` under `model`, over all processes of `accelerator`.

    The model is left as it was found, training mode included.

    Args:
        model: anything that takes input_ids and returns logits; on its own device, or prepared by `accelerator`.
        blocks: blocks of tokens, as for `train`; they may differ in length.
        objective: what is predicted; by default the next token.
        batch_size: blocks a forward, per process.
        accelerator: an `accelerate.Accelerator` to share the work by; by default this process does all of it.
        head: what `find_head` says of the model before it is prepared, or a `NoHead` to make the logits whole; by
        default it is asked.

    Raises:
        DataError: there is nothing to predict.
    """
    objective = objective or CausalLM()
    processes, process = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    device = accelerator.device if accelerator else next(model.parameters()).device
    metric = getattr(objective, "metric", None)
    if metric is not None:
        head = NoHead("the metric wants the logits")
    elif head is None:
        head = find_head(getattr(model, "module", model))
    sums: list[Tensor] = []
    tokens = 0
    counts = torch.zeros(0, dtype=torch.float64)
    with torch.no_grad(), without_cache(model), evaluating(model):
        for batch in eval_batches(
            blocks, objective, batch_size=batch_size, seed=EVAL_SEED, processes=processes, process=process
        ):
            tokens += int(predicted(batch["labels"]).sum())
            placed = to_device(batch, device)
            if metric is None:
                sums.append(summed_nll(model, placed, head))
                continue
            logits = logits_of(model, placed)
            sums.append(_loss_of(logits, placed["labels"]))
            new = metric.counts(logits, placed["labels"])
            counts = counts + new if len(counts) else new
    # Summed in float64 on the CPU: some devices have no float64, and float32 loses digits over many batches.
    nll = float(torch.stack(sums).cpu().double().sum()) if sums else 0.0
    total = torch.cat([torch.tensor([nll, float(tokens)], dtype=torch.float64), counts])
    if processes > 1:
        total = accelerator.reduce(total.to(device), reduction="sum").cpu()
    if total[1] == 0:
        raise DataError(
            f"{len(blocks)} evaluation blocks hold nothing to predict: expected at least one token. Give more "
            "validation text, or none at all."
        )
    return EvalResult.of(float(total[0]), int(total[1]), metric, total[2:])
