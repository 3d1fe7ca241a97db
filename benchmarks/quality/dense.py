"""Dense blocks that are no GELU: small language models trained here on real text, since no pretrained weights with
these activations were found in packages. Converted with the table's row, and calibrated; measured on two domains.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hf_geglu
from benchmarks.corpora import corpus
from benchmarks.quality.measuring import distances, log_probabilities
from benchmarks.records import earlier, write
from hf_geglu.calibration import CalibrationData, calibrate, measure
from hf_geglu.planning import make_plan

ACTIVATIONS = ("relu", "relu2", "silu", "quick_gelu")
BLOCK, BATCH, WIDTH, LAYERS, RATE = 128, 16, 128, 3, 3e-3


def run(*, activations: Sequence[str] = ACTIVATIONS, steps: int = 400, blocks: int = 24, seed: int = 0) -> None:
    """Train one model an activation, and convert it in each way. Rows of other activations in the record are kept."""
    train = bytes_of(corpus("library").train, steps * BATCH)
    held = {
        "library": bytes_of(corpus("library").held_out, blocks),
        "prose": bytes_of(corpus("prose").held_out, blocks),
    }
    settings = {"steps": steps, "block": BLOCK, "blocks": blocks, "width": WIDTH, "layers": LAYERS}
    rows = [row for row in earlier("quality_dense", settings) if row["activation"] not in activations]
    record: dict[str, Any] = {**settings, "rows": rows}
    for activation in activations:
        model, loss = trained(activation, train, steps=steps, seed=seed)
        reference = {name: list(log_probabilities(model, each)) for name, each in held.items()}
        nll = {name: _nll(reference[name], each) for name, each in held.items()}
        print(f"{activation}: trained to {loss:.3f}, held out {nll} nats a byte", flush=True)
        plan = make_plan(model)
        batches = tuple({"input_ids": part} for part in train[:64].split(4))
        data = CalibrationData(batches=batches, name="Python's documentation")
        made = calibrate(model, plan, data, seed=seed)
        for start, planned, fits in (("table", plan, {}), ("calibrated", made.plan, made.fits)):
            converted = copy.deepcopy(model)
            relative = {
                name: measure(model, planned, fits, CalibrationData(batches=({"input_ids": each},))).relative
                for name, each in held.items()
            }
            hf_geglu.convert(converted, planned, fits=fits, verify="sites")
            figures = {name: distances(reference[name], converted, held[name]) for name in held}
            chosen = [entry.fit.method if entry.fit else "table" for entry in planned.converted]
            row = {"activation": activation, "start": start, "nll": nll, "relative": relative, "domains": figures}
            record["rows"].append({**row, "chosen": {name: chosen.count(name) for name in set(chosen)}})
            shown = ", ".join(
                f"{name} KL {each['kl']['mean']:.2e} rel {relative[name]:.1e}" for name, each in figures.items()
            )
            print(f"{activation} {start}: {shown}", flush=True)
            write("quality_dense", record)


def trained(activation: str, blocks_NT: torch.Tensor, *, steps: int, seed: int) -> tuple[Any, float]:
    """A GPT-2 of bytes with that activation, and its last training loss (mean of 20 steps)."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=BLOCK,
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    losses = []
    for step, batch in enumerate(blocks_NT[: steps * BATCH].split(BATCH)):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 20) * 0.5 * (1 + math.cos(math.pi * progress))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), sum(losses[-20:]) / len(losses[-20:])


def bytes_of(texts: tuple[str, ...], count: int, *, seed: int = 0) -> torch.Tensor:
    """(count, BLOCK) bytes of UTF-8, spread over the texts where there are more."""
    joined = torch.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=torch.uint8).long()
    blocks = joined[: len(joined) // BLOCK * BLOCK].view(-1, BLOCK)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    if count > len(blocks):
        order = torch.cat([order] * math.ceil(count / len(blocks)))
    return blocks[order[:count]]


def _nll(reference: list[torch.Tensor], blocks_NT: torch.Tensor) -> float:
    losses = [-each.gather(1, block[1:, None]).mean().item() for each, block in zip(reference, blocks_NT, strict=True)]
    return sum(losses) / len(losses)
