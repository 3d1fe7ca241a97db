"""What a model is for, as far as narrowing needs to know: what an error in its output costs, and how far two of its
outputs are apart. A model with logits is judged by the distribution over tokens, any other by its sentence embedding.

Legend of suffixes: B batch, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import log_softmax, normalize

from hf_geglu.errors import ConversionError
from hf_geglu.inputs import Inputs

EMBEDDING, LAST, INNER = 5.0, 1.0, 0.5
"""Weights in the loss: squared distance of the unit embeddings, relative squared error of the last sum, and of those
before. The embedding's is small beside the others' and what a user sees."""


def token_mask(batch: Inputs, shape: torch.Size) -> torch.Tensor | None:
    """Which tokens are no padding, (B, T), where the batch says so and `shape` starts like that."""
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == shape[:2]:
        return mask.bool()
    return None


def tokens_of(tensor: torch.Tensor, batch: Inputs) -> torch.Tensor:
    """Its last dimension at every token that is no padding, (N, ...)."""
    mask = token_mask(batch, tensor.shape)
    return tensor[mask] if mask is not None else tensor.reshape(-1, tensor.shape[-1])


def embedding(outputs: Mapping[str, Any], batch: Inputs) -> torch.Tensor:
    """The unit sentence embedding (B, D): the mean of the last hidden states over the tokens (arXiv:1908.10084)."""
    states = outputs.get("last_hidden_state")
    if states is None:
        raise ConversionError(
            f"the model returns {', '.join(outputs)}, neither logits nor last_hidden_state, so nothing says what "
            "an error costs; narrow its body, or a model with a head"
        )
    mask = token_mask(batch, states.shape)
    if mask is None:
        return normalize(states.flatten(1, -2).mean(1), dim=-1)
    weights = mask[..., None].to(states.dtype)
    return normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def probe(outputs: Mapping[str, Any], batch: Inputs, generator: torch.Generator) -> torch.Tensor:
    """A random number whose gradients' second moment is what an error costs, to second order.

    For logits: the log-likelihood of tokens drawn from them (the Fisher information). For embeddings: a random
    direction (the Gauss-Newton matrix of the squared distance).
    """
    logits = outputs.get("logits")
    if logits is None:
        unit = embedding(outputs, batch)
        return (unit * torch.randn(unit.shape, generator=generator).to(unit)).sum()
    flat = log_softmax(tokens_of(logits, batch).float(), dim=-1)
    drawn = torch.multinomial(flat.detach().exp().cpu(), 1, generator=generator).to(flat.device)
    return flat.gather(1, drawn).sum()


def distance(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    batch: Inputs,
    sums: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
) -> torch.Tensor:
    """The loss of the whole model's training: its outputs, and the sums around its blocks, against the original's.

    Args:
        student: outputs of the narrow model.
        teacher: of the original.
        batch: their inputs.
        sums: at each block, the narrow model's and the original's, first block first.
    """
    if "logits" in teacher:
        p, q = (log_softmax(tokens_of(each["logits"], batch).float(), dim=-1) for each in (teacher, student))
        main = (p.exp() * (p - q)).sum(-1).mean()
    else:
        apart = embedding(student, batch).float() - embedding(teacher, batch).float()
        main = EMBEDDING * apart.square().sum(-1).mean()
    errors = [_relative(*(tokens_of(each, batch).float() for each in pair)) for pair in sums]
    if not errors:
        return main
    inner = torch.stack(errors[:-1]).mean() if len(errors) > 1 else errors[0].new_zeros(())
    return main + LAST * errors[-1] + INNER * inner


def _relative(one_ND: torch.Tensor, other_ND: torch.Tensor) -> torch.Tensor:
    """Squared error in units of each token's own variance, as the next norm sees it."""
    return ((one_ND - other_ND).square().mean(-1) / variance(other_ND)).mean()


def variance(sum_ND: torch.Tensor) -> torch.Tensor:
    """Of each token's entries, (N,), never 0. Faster than `Tensor.var` along the last dimension, by far."""
    centred = sum_ND - sum_ND.mean(-1, keepdim=True)
    return (centred.square().sum(-1) / (sum_ND.shape[-1] - 1)).clamp_min(1e-12)
