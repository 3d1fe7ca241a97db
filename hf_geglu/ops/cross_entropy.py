"""Cross entropy of a linear head without its logits: `linear_cross_entropy(hidden, weight, labels)`.

    N = tokens, D = width of the hidden states, V = vocabulary, C = tokens of a chunk
    z_NV = hidden_ND weight_VD' + bias_V;   logits = cap tanh(scale z / cap), or scale z without a soft cap
    loss = sum over the scored tokens of (1 - eps) (lse - logits_label) + eps (lse - mean logits)

The logits are made a chunk of tokens at a time, and turned in place into their gradient, which is multiplied into the
gradients of hidden states, weight and bias at once. So the backward has nothing left to do but to hand them on, and
(N, V) never exists. Ignored tokens are left out before the first product. The idea is that of Cut Your Losses
(arXiv:2411.09009) and of Liger (arXiv:2410.10989); the loss is computed in float32, as models of Transformers do.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_geglu.errors import KernelError
from hf_geglu.ops.graph import graph_is_kept

MOST_LOGITS = 2**26
"""Logits of a chunk: 128 MiB in 16 bits."""

FEWEST_ROWS = 256
"""A chunk of fewer rows would spend its time reading the weight."""

CHUNKS_IN_16_BITS = 4
"""A 16-bit gradient of the weight is summed in its own type over so many chunks: the rounding of the partial sums then
adds up to at most 1.6 times that of the last one (square root of (1 + 2 + 3 + 4)/4). Over more, in float32."""

CACHED = 2**19
"""Logits that are worked on at once in float32, on a CPU: 2 MiB, so that the passes over them stay in the cache."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    num_items_in_batch: float | Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross entropy of ``F.linear(hidden, weight, bias)`` against `labels`, as a float32 scalar (float64 for float64).

    Under autocast the products are computed in its type, while the gradient of a float32 weight stays float32.
    Differentiable once.

    Args:
        hidden: (..., D), what the output projection reads.
        weight: (V, D), `bias`: (V,), both as in nn.Linear; they may be frozen, and the weight may be tied.
        labels: (...), int64, aligned with `hidden`: token t is scored against label t.
        ignore_index: label of tokens that are not scored.
        label_smoothing: share of the target that is spread over the vocabulary, as in torch.
        logit_scale: factor of the logits (Granite, Cohere).
        logit_softcap: bound of the logits, ``cap tanh(logits / cap)`` (Gemma 2), after the factor.
        reduction: mean over the scored tokens (NaN where there are none, as in torch) or sum.
        num_items_in_batch: divide the sum by this many tokens instead; goes with either reduction.
        chunk_tokens: tokens whose logits exist at a time; by default a quarter of them, at least 256, at most 2**26/V.

    Raises:
        KernelError: shapes or labels that do not fit, options out of range; or, at the second backward, a loss that is
        differentiated twice.
    """
    _check(hidden, weight, labels, bias, label_smoothing, logit_softcap, reduction, chunk_tokens)
    labels = labels.reshape(-1)
    device = hidden.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wide = _wide(precision)
    if num_items_in_batch is not None:
        share = torch.as_tensor(num_items_in_batch, device=hidden.device).to(wide).reciprocal()
    elif reduction == "mean":
        share = (labels != ignore_index).sum().to(wide).reciprocal()
    else:
        share = torch.ones((), dtype=wide, device=hidden.device)
    gradients = torch.is_grad_enabled()
    loss: Tensor = _linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels,
        share,
        precision,
        ignore_index,
        float(label_smoothing),
        float(logit_scale),
        logit_softcap,
        chunk_tokens,
        gradients and hidden.requires_grad,
        gradients and weight.requires_grad,
        gradients and bias is not None and bias.requires_grad,
    )[0]
    return loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    logit_softcap: float | None,
    reduction: str,
    chunk_tokens: int | None,
) -> None:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise KernelError(
            f"hidden states {tuple(hidden.shape)} and a weight {tuple(weight.shape)}: expected (..., D) and (V, D). "
            "Give the weight as nn.Linear has it."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelError(
            f"a bias {tuple(bias.shape)} beside {weight.shape[0]} outputs: expected one number an output."
        )
    if labels.shape != hidden.shape[:-1]:
        raise KernelError(
            f"labels {tuple(labels.shape)} beside hidden states {tuple(hidden.shape)}: expected one label a token. "
            "Shift them before the call: token t is scored against label t."
        )
    if labels.dtype != torch.int64:
        raise KernelError(f"labels of type {labels.dtype}: expected int64. Call labels.long().")
    if not 0.0 <= label_smoothing <= 1.0:
        raise KernelError(f"label_smoothing={label_smoothing}: expected a share between 0 and 1; 0 is off.")
    if logit_softcap is not None and logit_softcap <= 0:
        raise KernelError(f"logit_softcap={logit_softcap}: expected a positive bound; None is off.")
    if reduction not in ("mean", "sum"):
        raise KernelError(f"reduction={reduction!r}: expected 'mean' or 'sum'.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise KernelError(f"chunk_tokens={chunk_tokens}: expected 1 or more; None chooses.")


@torch.library.custom_op("hf_geglu::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    share: Tensor,
    precision: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_tokens: int | None,
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, its gradients for hidden states, weight and bias); empty where a gradient is not wanted."""
    with torch.autocast(hidden.device.type, enabled=False):
        scored = torch.nonzero(labels != ignore_index).flatten()
        _check_labels(labels[scored], len(weight), ignore_index)
        whole = len(scored) == len(labels)
        rows = _chunk_rows(len(scored), len(weight), chunk_tokens)
        weight_VD = weight.to(precision)
        bias_V = None if bias is None else bias.to(precision)
        # float16 has no room for the share of one token of many (below 6e-8 it is 0): there the share comes last.
        late = precision == torch.float16
        early = (torch.ones_like(share) if late else share) * logit_scale

        losses = torch.empty(len(scored), dtype=share.dtype, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if for_hidden else hidden.new_empty(0)
        grad_weight = _Sum(weight, precision, math.ceil(len(scored) / rows)) if for_weight else None
        grad_bias = torch.zeros(len(weight) if for_bias else 0, dtype=share.dtype, device=hidden.device)
        for start in range(0, len(scored), rows):
            chunk = scored[start : start + rows]
            hidden_CD = (hidden[start : start + rows] if whole else hidden[chunk]).to(precision)
            logits_CV = F.linear(hidden_CD, weight_VD, bias_V)
            losses[start : start + rows] = _losses(
                logits_CV,
                labels[chunk],
                early if for_hidden or for_weight or for_bias else None,
                label_smoothing,
                logit_scale,
                logit_softcap,
            )
            if for_hidden:
                grad_CD = logits_CV @ weight_VD
                grad_hidden.index_copy_(0, chunk, (grad_CD * share if late else grad_CD).to(hidden.dtype))
            if grad_weight is not None:
                grad_weight.add(logits_CV, hidden_CD)
            if for_bias:
                grad_bias += logits_CV.sum(0, dtype=share.dtype)
            del logits_CV  # before the next chunk's are made
        return (
            losses.sum() * share,
            grad_hidden,
            weight.new_empty(0) if grad_weight is None else grad_weight.take(share if late else None),
            (grad_bias * share if late else grad_bias).to(weight.dtype if bias is None else bias.dtype, copy=True),
        )


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, share: Tensor, *options: Any) -> Any:
    for_hidden, for_weight, for_bias = options[-3:]
    return (
        torch.empty_like(share),
        torch.empty_like(hidden) if for_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if for_weight else weight.new_empty(0),
        (weight if bias is None else bias).new_empty(len(weight) if for_bias else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # gradients for the gradients: zeros as large as the weight
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[-3:]


def _hand_on(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None, None, None]
    if grad_loss is not None:
        # Looking at a number makes a GPU wait, and there is none to look at while a graph is traced.
        unchanged = type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
        # The weight's gradient is as large as the weight: a second one would be the peak of a step.
        in_place = not torch.is_grad_enabled() and type(grad_loss) is Tensor and not graph_is_kept()
        for n, (gradient, wanted) in enumerate(zip(ctx.saved_tensors, ctx.wanted, strict=True)):
            if wanted and in_place and not unchanged:
                found[n] = gradient.mul_(grad_loss)
            elif wanted:
                scaled = gradient if unchanged else (gradient * grad_loss).to(gradient.dtype)
                found[n] = _refusing(scaled) if torch.is_grad_enabled() else scaled
    return (*found, *[None] * 11)


class _Once(torch.autograd.Function):
    """The identity, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise KernelError(
            "a second derivative of linear_cross_entropy: expected one backward, since the logits are gone after it. "
            "Compute the logits and use torch.nn.functional.cross_entropy, or --chunked_cross_entropy off."
        )


def _refusing(gradient: Tensor) -> Tensor:
    once: Any = _Once
    refusing: Tensor = once.apply(gradient.detach().requires_grad_())
    return refusing


_linear_cross_entropy.register_autograd(_hand_on, setup_context=_keep)


def _check_labels(scored: Tensor, vocabulary: int, ignore_index: int) -> None:
    """On a CPU; elsewhere it would make the host wait, and the device checks its indices itself."""
    if scored.device.type != "cpu" or not len(scored):
        return
    low, high = (int(extreme) for extreme in scored.aminmax())
    if low < 0 or high >= vocabulary:
        raise KernelError(
            f"labels from {low} to {high} for {vocabulary} outputs: expected 0 <= label < {vocabulary}, or "
            f"{ignore_index} for tokens that are not scored."
        )


def _chunk_rows(tokens: int, vocabulary: int, wanted: int | None) -> int:
    """Tokens of a chunk; the chunks are as even as they can be."""
    if wanted:
        return wanted
    rows = max(1, min(MOST_LOGITS // vocabulary, max(FEWEST_ROWS, math.ceil(tokens / CHUNKS_IN_16_BITS))))
    return math.ceil(tokens / math.ceil(tokens / rows)) if tokens else rows


class _Sum:
    """The gradient of the weight, (V, D), summed over chunks. The first one is written rather than added."""

    def __init__(self, weight: Tensor, precision: torch.dtype, chunks: int) -> None:
        self.dtype = weight.dtype
        self.precision = precision
        narrow = weight.dtype == precision == torch.bfloat16 and chunks <= CHUNKS_IN_16_BITS
        zero = torch.zeros_like if chunks == 0 else torch.empty_like
        self.sum_VD = zero(weight, dtype=weight.dtype if narrow else _wide(weight.dtype))
        self.kept = 0.0

    def add(self, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        kept, self.kept = self.kept, 1.0
        if self.sum_VD.dtype == self.precision:
            self.sum_VD.addmm_(grad_CV.t(), hidden_CD, beta=kept)
            return
        # A strip of the vocabulary at a time, so that the product in between stays small. A float16 product could
        # overflow (the sum of hidden states of one frequent token), so that its factors are widened first.
        strip = max(1, CACHED // max(1, hidden_CD.shape[1]))
        for sum_SD, grad_CS in zip(torch.split(self.sum_VD, strip), torch.split(grad_CV, strip, dim=1), strict=True):
            if self.precision == torch.float16:
                sum_SD.addmm_(grad_CS.float().t(), hidden_CD.float(), beta=kept)
            elif kept:
                sum_SD += grad_CS.t() @ hidden_CD
            else:
                sum_SD.copy_(grad_CS.t() @ hidden_CD)

    def take(self, share: Tensor | None) -> Tensor:
        if share is not None:
            self.sum_VD *= share
        return self.sum_VD.to(self.dtype)


def _losses(
    logits_CV: Tensor,
    labels_C: Tensor,
    factor: Tensor | None,
    label_smoothing: float,
    logit_scale: float,
    logit_softcap: float | None,
) -> Tensor:
    """The losses of a chunk, (C,); with a `factor`, `logits_CV` becomes their gradient times that factor."""
    rows = max(1, CACHED // logits_CV.shape[1]) if logits_CV.device.type == "cpu" else len(logits_CV)
    found = []
    for own_RV, labels_R in zip(torch.split(logits_CV, rows), torch.split(labels_C, rows), strict=True):
        z_RV = own_RV.to(_wide(own_RV.dtype), copy=True)
        labels_R1 = labels_R[:, None]
        slope_RV = None
        if logit_softcap is not None:
            z_RV.mul_(logit_scale / logit_softcap).tanh_()
            slope_RV = None if factor is None else z_RV.square().neg_().add_(1.0)
            z_RV.mul_(logit_softcap)
        elif logit_scale != 1.0:
            z_RV.mul_(logit_scale)
        losses_R1 = z_RV.gather(1, labels_R1).mul_(label_smoothing - 1.0)
        if label_smoothing:
            losses_R1 -= z_RV.mean(1, keepdim=True) * label_smoothing
        top_R1 = z_RV.amax(1, keepdim=True)
        sum_R1 = z_RV.sub_(top_R1).exp_().sum(1, keepdim=True)
        found.append(losses_R1.add_(top_R1).add_(sum_R1.log()).squeeze(1))
        if factor is None:
            continue
        grad_RV = z_RV.mul_(factor / sum_R1)
        if label_smoothing:
            grad_RV -= factor * (label_smoothing / grad_RV.shape[1])
        grad_RV.scatter_add_(1, labels_R1, (factor * (label_smoothing - 1.0)).expand_as(labels_R1))
        own_RV.copy_(grad_RV if slope_RV is None else grad_RV.mul_(slope_RV))
    return torch.cat(found)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that a loss is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
