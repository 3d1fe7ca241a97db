"""One gated FFN block, forward and backward: time over its bare matrix products, bytes kept for the backward, error.

D = hidden size, F = intermediate size, T = tokens; a unit is T x F elements of the type
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.clock import interleaved, ratios
from benchmarks.speed.memory import peak_bytes, saved_bytes
from hf_geglu import ops
from hf_geglu.ops import onednn

PRODUCTS = "bare products"
QUICK_PRODUCTS = "bare products by oneDNN"
"""The same by the library that our float32 blocks use where it is much quicker than torch's."""
EAGER = "eager HF"
MODES = ("lean", "tiled", "auto")


def llama_block(hidden: int, width: int, activation: str) -> nn.Module:
    """Transformers' own block with separate projections, float64, weights as after initialization."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    block: nn.Module = LlamaMLP(
        LlamaConfig(hidden_size=hidden, intermediate_size=width, hidden_act=activation, num_attention_heads=1)
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block.double()


def sides(block: Any, activation: str, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same block computed in different ways, by name."""
    form = ops.Form(activation=activation)
    gate, up, down = ((block.gate_proj.weight, None), (block.up_proj.weight, None), (block.down_proj.weight, None))

    def ours(mode: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.ffn(x, gate, up, down, form=form, mode=mode)

    found: dict[str, Callable[[Tensor], Tensor]] = {EAGER: block, "torch.compile": torch.compile(block)}
    found |= {f"ours, {mode}": ours(mode) for mode in MODES}
    if device == "cuda" and activation == "gelu_pytorch_tanh":
        found |= _liger(block)
    return found


def _liger(block: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
    except ImportError:
        return {}
    return {"Liger": lambda x: block.down_proj(LigerGELUMulFunction.apply(block.gate_proj(x), block.up_proj(x)))}


def products(
    block: Any, x_TD: Tensor, grad_TD: Tensor, times: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Callable[[], object]:
    """The three products of the forward and the six of the backward, on tensors that are there already."""
    g, u, d = (p.detach() for p in (block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight))
    h_TF = x_TD.detach() @ g.t()
    left = [(x_TD, g.t()), (x_TD, u.t()), (h_TF, d.t())]
    left += [(grad_TD, d), (grad_TD.t(), h_TF), (h_TF, g), (h_TF.t(), x_TD), (h_TF, u), (h_TF.t(), x_TD)]

    def run() -> object:
        with torch.no_grad():
            for pair in left[:3]:
                times(*pair)
            return [times(*pair) for pair in left[3:]]

    return run


class _Swallow(torch.autograd.Function):
    """Takes the answer and keeps nothing of it, as a residual stream does; its gradient is there already."""

    @staticmethod
    def forward(ctx: Any, answer_TD: Tensor, grad_TD: Tensor) -> Tensor:
        ctx.grad_TD = grad_TD
        return answer_TD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.grad_TD, None


def _swallowed(forward: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    swallow: Any = _Swallow
    return list(torch.autograd.grad(swallow.apply(forward(x), grad), (x, *block.parameters())))


def _step(forward: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(forward(x), (x, *block.parameters()), grad))


def errors(
    block: nn.Module, activation: str, x: Tensor, grad: Tensor, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Largest error of output and gradients against float64, over that of eager HF in the same type."""
    exact, narrow = block.to(dtype).double(), copy.deepcopy(block).to(dtype)
    x, grad = x.to(dtype), grad.to(dtype)

    def results(own: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        output = forward(x)
        return [output.detach(), *torch.autograd.grad(output, (x, *own.parameters()), grad)]

    truth = results(exact, exact, x.double(), grad.double())
    found = {
        name: [
            float((a.double() - b).norm() / b.norm())
            for a, b in zip(results(narrow, forward, x, grad), truth, strict=True)
        ]
        for name, forward in sides(narrow, activation, device).items()
    }
    return {
        name: round(max(a / max(b, 1e-12) for a, b in zip(own, found[EAGER], strict=True)), 3)
        for name, own in found.items()
    }


def measure(
    *, hidden: int, width: int, tokens: int, dtype: str, activation: str, seconds: float, device: str = "cpu"
) -> dict[str, Any]:
    """Errors first, then bytes, then times."""
    kind = getattr(torch, dtype)
    block = llama_block(hidden, width, activation).to(device)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(tokens, hidden, dtype=torch.float64, generator=generator).to(device) for _ in range(2))
    few = min(tokens, 64)
    error = errors(copy.deepcopy(block), activation, x[:few], grad[:few], kind, device)
    block, x, grad = block.to(kind), x.to(kind).requires_grad_(), grad.to(kind)
    ways = sides(block, activation, device)
    unit = tokens * width * kind.itemsize
    runs: dict[str, Callable[[], object]] = {PRODUCTS: products(block, x.detach(), grad)}
    quick = device == "cpu" and dtype == "float32" and onednn.pays()
    if quick:
        runs[QUICK_PRODUCTS] = products(block, x.detach(), grad, onednn.times)
    runs |= {name: lambda way=way: _step(way, block, x, grad) for name, way in ways.items()}
    times = interleaved(runs, device=device, seconds=seconds, rounds=(5, 41))
    input_units = x.numel() * x.element_size() / unit
    return {
        "error over eager": error,
        "saved units": {name: round(saved_bytes(lambda w=way: w(x), block) / unit, 3) for name, way in ways.items()},
        "x units": round(input_units, 3),
        "time over products": ratios(times, over=PRODUCTS),
        **({"time over quick products": ratios(times, over=QUICK_PRODUCTS)} if quick else {}),
        "time over eager": ratios(times, over=EAGER),
        "rounds": len(times[EAGER]),
    }


def measure_peak(
    *, side: str, hidden: int, width: int, tokens: int, dtype: str, activation: str, device: str = "cpu"
) -> float:
    """Peak of forward and backward of one side, in units, with the gradients and without the weights, x and the
    gradient of the answer. The answer is not held during the backward (it would be another D/F)."""
    kind = getattr(torch, dtype)
    block = llama_block(hidden, width, activation).to(device=device, dtype=kind)
    x = torch.randn(tokens, hidden, dtype=kind, device=device).requires_grad_()
    way = sides(block, activation, device)[side]
    grad = torch.randn_like(x)
    _swallowed(way, block, x, grad)  # what is allocated or compiled once
    peak = peak_bytes(lambda: _swallowed(way, block, x, grad), device=device)
    return round(peak / (tokens * width * kind.itemsize), 3)
