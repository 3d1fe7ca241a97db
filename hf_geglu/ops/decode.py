"""A block for few tokens on a CPU, through a second copy of its weights that lies as oneDNN multiplies it.

A few tokens cost what it costs to read the weights. torch gives oneDNN (or MKL, in float32) a weight as it lies in
memory, which takes about twice as long as reading it; a copy in oneDNN's blocked layout, made once, is read at the
speed of memory. torch's compiler does the same when it freezes a model: the operators are those that it calls, which
are private, so `why_not` tries them out before anything relies on them.

Nothing here knows whether a weight has changed since it was packed: `hf_geglu.optimizing.decoding` does.

Legend: T tokens, I inputs and O outputs of a projection, F intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_geglu.ops import onednn, reference
from hf_geglu.ops.block import Weights
from hf_geglu.ops.form import Form, split

MOST_TOKENS = 64
"""Tokens up to which packed weights were clearly quicker; the layout is chosen for so many."""


@dataclass(frozen=True, slots=True)
class PackedProjection:
    """Weights for consecutive inputs, as oneDNN wants them, and the bias. In float32 each piece has no more inputs than
    `onednn` sums at once."""

    pieces: tuple[Tensor, ...]
    widths: tuple[int, ...]
    """Inputs of each piece."""
    bias: Tensor | None

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None) -> PackedProjection:
        """Packed copies; the bias is copied too."""
        inputs = weight_OI.shape[1]
        longest = onednn.LONGEST if weight_OI.dtype == torch.float32 else inputs
        count = -(-inputs // longest)
        width = -(-inputs // (64 * count)) * 64 if count > 1 else inputs
        parts = torch.split(weight_OI.detach(), width, dim=1)
        pack: Any = torch.ops.mkldnn._reorder_linear_weight
        return cls(
            tuple(pack(part.contiguous(), MOST_TOKENS) for part in parts),
            tuple(part.shape[1] for part in parts),
            None if bias_O is None else bias_O.detach().clone(),
        )

    def times(self, x_TI: Tensor) -> Tensor:
        """x W + b, (T, O)."""
        multiply: Any = torch.ops.mkldnn._linear_pointwise
        first, *rest = torch.split(x_TI, list(self.widths), dim=1) if len(self.widths) > 1 else (x_TI,)
        answer_TO: Tensor = multiply(first, self.pieces[0], self.bias, "none", [], "")
        for part, piece in zip(rest, self.pieces[1:], strict=True):
            answer_TO = multiply.binary(part, answer_TO, piece, None, "add")
        return answer_TO


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """Gate and up projection in one, and the down projection."""

    branches: PackedProjection
    down: PackedProjection
    form: Form
    """How gate and value lie in what `branches` answers."""


def pack(weights: Weights, form: Form) -> PackedBlock:
    """A second copy of the weights, which lie as `form` says. May raise RuntimeError: no memory, say."""
    up, up_bias = _outputs_first(weights.up[0], form), weights.up[1]
    if weights.gate is not None:
        up = torch.cat([_outputs_first(weights.gate[0], form), up])
        if weights.gate[1] is not None and up_bias is not None:
            up_bias = torch.cat([weights.gate[1], up_bias])
    down = PackedProjection.of(_outputs_first(weights.down[0], form), weights.down[1])
    kept = replace(form, layout="packed") if form.layout == "separate" else form
    return PackedBlock(PackedProjection.of(up, up_bias), down, kept)


def run(x_TD: Tensor, packed: PackedBlock) -> Tensor:
    """The block, (T, D) -> (T, D); not differentiable."""
    form = packed.form
    gate_TF, value_TF = split(packed.branches.times(x_TD), form)
    return packed.down.times(reference.unit(gate_TF, value_TF, form.activation, form.offset))


def packable(weights: Weights) -> str | None:
    """Why these weights cannot be packed; None where they can."""
    weight = weights.up[0]
    if weight.device.type != "cpu":
        return f"its weights are on {weight.device.type}; packed ones are for the CPU"
    if any(tensor is not None and (tensor.is_inference() or not tensor.is_contiguous()) for tensor in weights.flat()):
        return "its weights are inference tensors, which do not tell when they change, or not contiguous"
    if weights.gate is not None and (weights.gate[1] is None) != (weights.up[1] is None):
        return "only one of its two branches has a bias"
    return why_not(weight.dtype)


def bytes_of(weights: Weights) -> int:
    """What a packed copy takes; oneDNN fills odd sizes up to its blocks, which comes on top."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.flat() if tensor is not None)


@cache
def why_not(dtype: torch.dtype) -> str | None:
    """Why nothing of that type can be packed in this process; None where a small product comes out right."""
    if dtype == torch.bfloat16:
        if not _multiplies_bfloat16():
            return "this processor does not multiply bfloat16, and packed weights were measured only where it does"
    elif dtype != torch.float32:
        return f"weights in {str(dtype).removeprefix('torch.')} are not packed; float32 and bfloat16 are"
    if not onednn.is_on():
        return "this torch has no oneDNN, or it is turned off"
    generator = torch.Generator().manual_seed(0)
    x_TI, weight_OI, bias_O = (torch.randn(*shape, generator=generator) for shape in ((2, 96), (64, 96), (64,)))
    x_TI, weight_OI, bias_O = (tensor.to(dtype) for tensor in (x_TI, weight_OI, bias_O))
    try:
        with torch.no_grad():
            found_TO = PackedProjection.of(weight_OI, bias_O).times(x_TI)
    except Exception as error:  # whatever private operators of another version may say
        return f"oneDNN does not pack: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    expected_TO = x_TI.double() @ weight_OI.double().t() + bias_O.double()
    off = float((found_TO.double() - expected_TO).abs().max() / expected_TO.abs().max())
    return None if off <= 16 * torch.finfo(dtype).eps else "oneDNN's packed product does not come out right"


def _multiplies_bfloat16() -> bool:
    asked: Any = torch.cpu
    return bool(asked._is_avx512_bf16_supported() or asked._is_amx_tile_supported())


def _outputs_first(weight: Tensor, form: Form) -> Tensor:
    """(O, I), as in nn.Linear."""
    weight = weight.detach()
    return weight.t() if form.transposed else weight
