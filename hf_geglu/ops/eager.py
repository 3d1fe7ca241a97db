"""The unit without a compiler: a piece of tokens at a time, in float32, so that nothing of full size is made on the
way."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_geglu.ops.formulas import formula

PIECE = 1 << 16
"""Elements that are worked on at once: they and their five intermediate results stay in a second-level cache."""


def forward(gate_TF: torch.Tensor, value_TF: torch.Tensor, activation: str, offset: float) -> torch.Tensor:
    """activation(gate) * (value + offset) as a new tensor."""
    hidden_TF = torch.empty_like(gate_TF, memory_format=torch.contiguous_format)
    both = formula(activation)
    for gate, value, hidden in _pieces(gate_TF, value_TF, hidden_TF):
        hidden.copy_(both(_wide(gate))[0] * (_wide(value) + offset))
    return hidden_TF


def backward_(
    gate_TF: torch.Tensor, value_TF: torch.Tensor, hidden_TF: torch.Tensor, activation: str, offset: float
) -> None:
    """In place: gate and value become their gradients, the gradient of the hidden state becomes the hidden state."""
    both = formula(activation)
    for gate, value, hidden in _pieces(gate_TF, value_TF, hidden_TF):
        activated, slope = both(_wide(gate))
        shifted, gradient = _wide(value) + offset, _wide(hidden)
        # all three before any is written: in float32 these are the tensors themselves
        answers = gradient * shifted * slope, gradient * activated, activated * shifted
        for tensor, answer in zip((gate, value, hidden), answers, strict=True):
            tensor.copy_(answer)


def backward(
    gate_TF: torch.Tensor,
    value_TF: torch.Tensor,
    gradient_TF: torch.Tensor,
    activation: str,
    offset: float,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Gradients of gate and value into `out`; nothing else is changed."""
    both = formula(activation)
    for gate, value, grad, d_gate, d_value in _pieces(gate_TF, value_TF, gradient_TF, *out):
        activated, slope = both(_wide(gate))
        wide = _wide(grad)
        d_gate.copy_(wide * (_wide(value) + offset) * slope)
        d_value.copy_(wide * activated)


def _pieces(*tensors_TF: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    rows = max(1, PIECE // max(1, tensors_TF[0].shape[-1]))
    return zip(*(torch.split(tensor, rows) for tensor in tensors_TF), strict=True)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
