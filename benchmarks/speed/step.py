"""One optimizer step of a whole language model in bfloat16: forward, loss, backward, AdamW.

All sides have the same weights, batch, attention and fused AdamW. "eager HF" is the model's own loss; "torch.compile"
the same with each layer compiled, so that one compilation serves all of them (whole, 30 layers would take minutes, and
were no faster: 1.04 of eager at four layers, where layer by layer it was .99); ours is `hf_geglu.optimize` and the loss
in the output projection (`hf_geglu.training.objectives.head`). Liger runs on CUDA only and is a side of `block` there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hf_geglu
from benchmarks.speed.clock import interleaved, ratios
from benchmarks.speed.memory import peak_bytes, saved_bytes
from hf_geglu.training.objectives.head import Head, find_head

EAGER = "eager HF"
COMPILED = "torch.compile"
SIDES = (EAGER, COMPILED, "loss in the head", "ours, lean", "ours, tiled")
"""Plain, compiled, then one change of ours after the other."""


def build(model: str, *, layers: int | None = None, vocabulary: int | None = None) -> nn.Module:
    """A model of the published shape with random weights, in bfloat16."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    built: nn.Module
    if model == "GPT-2 small":
        config = GPT2Config(n_layer=layers or 12, vocab_size=vocabulary or 50257)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0  # to compare losses
        built = GPT2LMHeadModel(config)
    else:
        built = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary or 49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=layers or 30,
                num_attention_heads=9,
                num_key_value_heads=3,
                max_position_embeddings=8192,
                rope_theta=100000.0,
                tie_word_embeddings=True,
            )
        )
    built.config.use_cache = False  # type: ignore[union-attr]
    return built.to(torch.bfloat16).train()


def loss_of(side: str, model: Any) -> Callable[[Tensor], Tensor]:
    """How this side computes the mean loss of a batch; changes the model to its way of running."""
    if side == COMPILED:
        for layer in max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len):
            layer.compile()
    if side in (EAGER, COMPILED):
        return lambda ids: model(input_ids=ids, labels=ids).loss
    if side.startswith("ours"):
        hf_geglu.optimize(model, ops=side.removeprefix("ours, "))
    head = find_head(model)
    assert isinstance(head, Head), head

    def loss(ids: Tensor) -> Tensor:
        labels = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], dim=1)
        scored = int((labels != -100).sum())
        return head.summed_loss(lambda: model(input_ids=ids), labels, ignore_index=-100, divisor=scored)

    return loss


def _gradients(loss: Callable[[Tensor], Tensor], model: nn.Module, ids: Tensor) -> tuple[float, Tensor]:
    model.zero_grad()
    value = loss(ids)
    value.backward()  # type: ignore[no-untyped-call]
    return float(value.detach()), torch.cat(
        [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    )


def errors(shape: dict[str, Any], device: str) -> dict[str, float]:
    """Error of loss and gradients against float64 over that of eager HF; on two layers and few tokens."""
    small = build(**{**shape, "layers": 2, "vocabulary": 512}).to(device)
    ids = torch.randint(0, 512, (2, 48), device=device)
    exact = copy.deepcopy(small).double()
    truth = _gradients(loss_of(EAGER, exact), exact, ids)
    found = {}
    for side in SIDES:
        model = copy.deepcopy(small)
        loss, gradients = _gradients(loss_of(side, model), model, ids)
        found[side] = (abs(loss - truth[0]) / truth[0], float((gradients - truth[1]).norm() / truth[1].norm()))
    # A loss in bfloat16 may be right by chance; half a unit of its last place is what eager could claim.
    floor = (2.0**-9, 1e-12)
    return {
        side: round(max(a / max(b, least) for a, b, least in zip(own, found[EAGER], floor, strict=True)), 3)
        for side, own in found.items()
    }


def measure(*, shape: dict[str, Any], batch: tuple[int, int], seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Errors first, then the bytes kept and the time of a step, over eager HF."""
    result: dict[str, Any] = {"error over eager": errors(shape, device)}
    runs: dict[str, Callable[[], object]] = {}
    kept = {}
    for side in SIDES:
        model = build(**shape).to(device)
        ids = torch.randint(0, model.config.vocab_size, batch, device=device)  # type: ignore[union-attr,arg-type]
        loss = loss_of(side, model)
        kept[side] = saved_bytes(lambda loss=loss, ids=ids: loss(ids), model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def run(loss: Any = loss, ids: Any = ids, optimizer: Any = optimizer) -> None:
            loss(ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        runs[side] = run
    times = interleaved(runs, device=device, seconds=seconds, rounds=(3, 15))
    return {
        **result,
        "time over eager": ratios(times, over=EAGER),
        "saved over eager": {side: round(value / kept[EAGER], 4) for side, value in kept.items()},
        "rounds": len(times[EAGER]),
    }


def measure_peak(*, side: str, shape: dict[str, Any], batch: tuple[int, int], device: str = "cpu") -> int:
    """Peak bytes of forward and backward of one side: activations and gradients, without weights."""
    model = build(**shape).to(device)
    ids = torch.randint(0, model.config.vocab_size, batch, device=device)  # type: ignore[union-attr,arg-type]
    loss = loss_of(side, model)
    loss(ids).backward()  # what is allocated or compiled once
    model.zero_grad()
    return peak_bytes(lambda: loss(ids).backward(), device=device)
