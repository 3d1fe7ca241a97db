"""Fine-tuning after a conversion: naive, the table's row, annealed, calibrated, and the control, on identical
batches; the control with several seeds says what a difference is worth.

The model is a small SwiGLU Llama of bytes, trained here on the library domain and fine-tuned on the prose domain: 200
steps of SmolLM2-135M for each start and seed take half a day on two cores.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_geglu
from benchmarks.corpora import corpus
from benchmarks.quality.dense import BATCH, BLOCK, bytes_of
from benchmarks.records import write
from hf_geglu.calibration import CalibrationData, calibrate
from hf_geglu.demo.naive import naive_swap
from hf_geglu.modeling_geglu import get_attribute, set_attribute
from hf_geglu.planning import make_plan

WIDTH, LAYERS, PRETRAINED, RATE, FINE_RATE = 128, 3, 400, 3e-3, 3e-4


class Annealed(nn.Module):
    """``(1 - lam) silu(1.702 u)/1.702 + lam gelu(u)``: on scaled weights the original at lam = 0, GeGLU at lam = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lam = 0.0

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        return (1 - self.lam) * nn.functional.silu(1.702 * u) / 1.702 + self.lam * nn.functional.gelu(u)


def run(*, steps: int = 200, seeds: int = 3, every: int = 50) -> None:
    """Write held-out losses of every start and seed."""
    base = _pretrained()
    held = bytes_of(corpus("prose").held_out[:40], 48)
    texts = corpus("prose").held_out[40:]
    plan = make_plan(base)
    data = CalibrationData(
        batches=tuple({"input_ids": part} for part in bytes_of(corpus("library").train, 64).split(4)),
        name="Python's documentation",
    )
    made = calibrate(base, plan, data)
    rows: list[dict[str, Any]] = []
    marks = [0, *range(every, steps + 1, every)]
    for seed in range(seeds):
        batches = bytes_of(texts, steps * BATCH, seed=seed)
        for start in ("control", "table", "calibrated", "annealed over half the steps", "naive swap"):
            model, anneal = _start(base, start, plan, made)
            nll = _tuned(model, batches, held, marks, anneal)
            rows.append({"start": start, "seed": seed, "steps": marks, "nll": nll})
            print(start, seed, [round(value, 4) for value in nll], flush=True)
            record = {"model": "SwiGLU Llama of bytes, trained here", "steps": steps, "seeds": seed + 1, "rows": rows}
            write("quality_recovery", record)


def _pretrained() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=344,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=BLOCK,
    )
    model = LlamaForCausalLM(config)
    _train(model, bytes_of(corpus("library").train, PRETRAINED * BATCH), RATE)
    return model.eval()


def _start(base: Any, start: str, plan: Any, made: Any) -> tuple[Any, Callable[[float], None]]:
    """A model that begins there, and what to call before each step with the share of the steps that are done."""
    if start == "naive swap":
        return naive_swap(base, plan), lambda done: None
    model = copy.deepcopy(base)
    if start == "control":
        return model, lambda done: None
    if start == "calibrated":
        hf_geglu.convert(model, made.plan, fits=made.fits, verify="sites")
    else:
        hf_geglu.convert(model, plan, verify="sites")
    hf_geglu.forget_original(model)
    if not start.startswith("annealed"):
        return model, lambda done: None
    units = []
    for entry in plan.converted:
        assert entry.site.activation_path is not None
        unit = Annealed()
        assert isinstance(get_attribute(model, entry.site.activation_path), nn.Module)
        set_attribute(model, entry.site.activation_path, unit)
        units.append(unit)

    def anneal(done: float) -> None:
        for unit in units:
            unit.lam = min(1.0, 2 * done)

    return model, anneal


def _tuned(
    model: Any, batches: torch.Tensor, held: torch.Tensor, marks: list[int], anneal: Callable[[float], None]
) -> list[float]:
    found = []
    steps = len(batches) // BATCH

    def before(step: int) -> None:
        anneal(step / steps)
        if step in marks:
            found.append(_nll(model, held))

    _train(model, batches, FINE_RATE, before)
    anneal(1.0)
    found.append(_nll(model, held))
    return found


def _train(model: Any, blocks_NT: torch.Tensor, rate: float, before: Callable[[int], None] = lambda step: None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    parts = blocks_NT.split(BATCH)
    for step, batch in enumerate(parts):
        before(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / len(parts)))
        model.train()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _nll(model: Any, held: torch.Tensor) -> float:
    model.eval()
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in held.split(BATCH)) / len(held)
