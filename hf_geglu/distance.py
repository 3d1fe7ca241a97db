"""Two models on the same inputs: how far apart are their outputs?"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_geglu.errors import VerificationError
from hf_geglu.inputs import Inputs
from hf_geglu.modes import evaluating

Outputs = dict[str, torch.Tensor]

PART = 2**24
"""Numbers that are compared in float64 at a time: 128 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Differences over one or several batches, in one dtype."""

    dtype: str
    output: str
    """Which outputs were compared: "logits", "last_hidden_state"..."""
    max_abs: float
    max_rel: float
    """Largest difference relative to the largest magnitude of that output in the original."""
    kl: float | None = None
    """KL(original || model) in nats per token, for outputs that are logits over a vocabulary."""
    delta_nll: float | None = None
    """Mean negative log-likelihood of the input tokens, model minus original, in nats per token."""
    tokens: int = 0
    """Predicted tokens behind `kl` and `delta_nll`."""

    def __str__(self) -> str:
        text = f"{self.output} in {self.dtype}: largest difference {self.max_abs:.3g} (relative {self.max_rel:.3g})"
        if self.kl is not None:
            text += f", KL {self.kl:.3g}"
        if self.delta_nll is not None:
            text += f", nll {self.delta_nll:+.4f} nats a token"
        return text


def compare(
    original: nn.Module, model: nn.Module, inputs: Inputs | Iterable[Inputs], *, dtype: torch.dtype | None = None
) -> Comparison:
    """Run both models on the same inputs, in eval mode, and measure the distance of their outputs.

    Neither is changed. Batches are compared one by one, so any amount of them fits in memory.

    Args:
        original: what is taken as right.
        model: what is measured against it.
        inputs: keyword arguments of one forward, or several of them.
        dtype: run copies of both in this dtype; None runs them as they are.

    Raises:
        VerificationError: the two have no output of the same name and shape, or there is no batch.
    """
    if dtype is not None:
        original, model = (copy.deepcopy(each).to(dtype) for each in (original, model))
    name = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
    merged: Comparison | None = None
    with evaluating(original), evaluating(model), torch.no_grad():
        for batch in [inputs] if isinstance(inputs, Mapping) else inputs:
            causal = is_causal(model)
            before, after = (outputs_of(each, cast(batch, each)) for each in (original, model))
            entry = comparison(before, after, dtype=name, tokens=batch.get("input_ids"), causal=causal)
            merged = entry if merged is None else _merge(merged, entry)
    if merged is None:
        raise VerificationError(
            "no inputs to compare on; expected the keyword arguments of a forward, or several of them"
        )
    return merged


def outputs_of(model: nn.Module, inputs: Inputs) -> Outputs:
    """The floating-point outputs of one forward by name, without caches and per-layer states.

    Models that draw random numbers even in eval mode draw the same ones each time.
    """
    devices = [parameter.device for parameter in model.parameters()][:1]
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        torch.manual_seed(0)
        # nothing is generated here, and some caches are written in place, which gradients do not survive
        cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        result = model(**{**cache, **inputs})
    tensors = dict(_flat(result, "output")) if not isinstance(result, Mapping) else {}
    for name, value in result.items() if isinstance(result, Mapping) else ():
        if isinstance(value, torch.Tensor) or name not in _BY_THE_WAY:
            tensors |= dict(_flat(value, name))
    if not tensors:
        raise VerificationError(f"{type(model).__name__} returned no floating-point tensor to compare")
    return {"logits": tensors["logits"]} if "logits" in tensors else tensors


_BY_THE_WAY = ("past_key_values", "hidden_states", "attentions", "decoder_hidden_states", "encoder_hidden_states")
"""Caches and per-layer states, which come as tuples."""


def _flat(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The floating-point tensors in nested tuples, numbered: "logits 0"."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
        yield name, value
    elif isinstance(value, tuple | list):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name} {number}")
    elif isinstance(value, Mapping):  # the outputs of a part, of InstructBLIP's language model
        for key, inner in value.items():
            if key not in _BY_THE_WAY:
                yield from _flat(inner, f"{name} {key}")


def comparison(
    before: Outputs,
    after: Outputs,
    *,
    dtype: str,
    tokens: torch.Tensor | None = None,
    causal: bool = False,
) -> Comparison:
    """The distance of two sets of outputs of one forward.

    Args:
        before: the original's.
        after: the model's.
        dtype: what both were run in, for the record.
        tokens: the input ids (B, T), where the logits (B, T, V) predict tokens.
        causal: logits at t predict token t + 1 (otherwise token t).
    """
    names = [name for name in before if name in after and before[name].shape == after[name].shape]
    if not names:
        shapes = {name: tuple(tensor.shape) for name, tensor in (before | after).items()}
        raise VerificationError(f"the two models have no output of the same name and shape: {shapes}")
    max_abs = max_rel = 0.0
    for name in names:
        largest = size = 0.0
        for part_before, part_after in _wide_parts(before[name], after[name]):
            difference = (part_after - part_before).abs()
            if not torch.isfinite(difference).all():  # masked logits are -inf in both, and equal
                both = torch.isfinite(part_before) | torch.isfinite(part_after)
                difference = torch.where(both, difference, 0.0).nan_to_num(nan=float("inf"))
            largest = max(largest, difference.max().item())
            size = max(size, part_before.abs().nan_to_num(nan=0.0, posinf=0.0).max().item())
        max_abs = max(max_abs, largest)
        max_rel = max(max_rel, largest / max(size, 1e-30))
    kl = delta = None
    count = 0
    logits = before.get("logits")
    if tokens is not None and logits is not None and logits.shape[:2] == tokens.shape and logits.dim() == 3:
        kl, delta, count = _token_distances(logits, after["logits"], tokens, causal)
    return Comparison(
        dtype=dtype, output=", ".join(names), max_abs=max_abs, max_rel=max_rel, kl=kl, delta_nll=delta, tokens=count
    )


def squares(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """(Sum of squared differences, sum of squares of `before`) over what is finite in both, in float64."""
    square = size = 0.0
    for part_before, part_after in _wide_parts(before, after):
        finite = torch.isfinite(part_before) & torch.isfinite(part_after)
        square += torch.where(finite, part_after - part_before, 0.0).square().sum().item()
        size += torch.where(finite, part_before, 0.0).square().sum().item()
    return square, size


def _wide_parts(before: torch.Tensor, after: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both in float64, `PART` numbers at a time: the logits of 1,024 tokens over 49,152 words would be 400 MB each."""
    flat_before, flat_after = before.flatten(), after.flatten()
    for start in range(0, len(flat_before), PART):
        yield flat_before[start : start + PART].double(), flat_after[start : start + PART].double()


def _token_distances(
    before: torch.Tensor, after: torch.Tensor, tokens: torch.Tensor, causal: bool
) -> tuple[float, float, int]:
    """(KL, delta nll, tokens), row by row: a full (B, T, V) in float64 would not fit for large vocabularies."""
    kl = delta = 0.0
    count = 0
    for row_before, row_after, row in zip(before, after, tokens, strict=True):
        if causal:
            row_before, row_after, row = row_before[:-1], row_after[:-1], row[1:]
        p, q = (torch.log_softmax(each.double(), dim=-1) for each in (row_before, row_after))
        kl += (p.exp() * (p - q)).nan_to_num().sum().item()
        # ids outside the logits' range (sub-vocabularies) predict nothing here
        known = row < p.shape[-1]
        picked = row[known, None]
        delta += (p[known].gather(1, picked) - q[known].gather(1, picked)).sum().item()
        count += int(known.sum())
    return kl / max(count, 1), delta / max(count, 1), count


def _merge(one: Comparison, other: Comparison) -> Comparison:
    tokens = one.tokens + other.tokens

    def mean(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else (a * one.tokens + b * other.tokens) / max(tokens, 1)

    return Comparison(
        dtype=one.dtype,
        output=one.output,
        max_abs=max(one.max_abs, other.max_abs),
        max_rel=max(one.max_rel, other.max_rel),
        kl=mean(one.kl, other.kl),
        delta_nll=mean(one.delta_nll, other.delta_nll),
        tokens=tokens,
    )


def cast(inputs: Inputs, model: nn.Module) -> dict[str, Any]:
    """Inputs on the model's device, floating-point ones in its dtype."""
    parameter = next(model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }


def is_causal(model: nn.Module) -> bool:
    """Whether the logits at t predict token t + 1."""
    config: Any = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate and can_generate() and not getattr(config, "is_encoder_decoder", False))
