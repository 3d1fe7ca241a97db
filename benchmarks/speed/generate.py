"""Whole generation: greedy decoding of a language model, its blocks by packed weights or as they are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import hf_geglu
from benchmarks.speed.block import EAGER
from benchmarks.speed.clock import interleaved, ratios
from benchmarks.speed.decode import OURS, PACKED
from benchmarks.speed.step import build


@torch.no_grad()
def measure(*, shape: dict[str, Any], dtype: str, prompt: int, new: int, batch: int, seconds: float) -> dict[str, Any]:
    """Time over eager HF of a prompt and `new` tokens, the share of tokens that are the same, and the bytes held."""
    plain: Any = build(**shape).to(getattr(torch, dtype)).eval()
    plain.config.use_cache = True
    models = {EAGER: plain, OURS: copy.deepcopy(plain), PACKED: copy.deepcopy(plain)}
    hf_geglu.optimize(models[OURS])
    report = hf_geglu.optimize(models[PACKED], decode=True)
    ids = torch.randint(0, plain.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    answers: dict[str, Tensor] = {}

    def run(name: str) -> None:
        answers[name] = models[name].generate(ids, attention_mask=torch.ones_like(ids), **settings)

    runs = {name: lambda name=name: run(name) for name in models}
    times = interleaved(runs, device="cpu", seconds=seconds, rounds=(3, 21))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in plain.parameters())
    return {
        "time over eager": ratios(times, over=EAGER),
        "same tokens": round(float((answers[EAGER] == answers[PACKED])[:, prompt:].float().mean()), 3),
        "packed bytes over weights": round(report.packed_bytes / weights, 3),
    }
