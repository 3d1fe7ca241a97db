"""The whole narrow model is trained to give what the original gives. Nothing but its FFN blocks moves, no label is
read."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hf_geglu.conversions.whitened import WhitenedBlock, schedule
from hf_geglu.distance import cast, outputs_of
from hf_geglu.inputs import Inputs
from hf_geglu.modes import evaluating
from hf_geglu.narrowing.objective import distance
from hf_geglu.narrowing.settings import NarrowSettings
from hf_geglu.narrowing.statistics import SiteStatistics
from hf_geglu.narrowing.sums import hooked


def heal(
    original: nn.Module,
    student: nn.Module,
    trainable: Mapping[str, WhitenedBlock],
    statistics: Mapping[str, SiteStatistics],
    batches: Sequence[Inputs],
    *,
    settings: NarrowSettings,
    progress: Callable[[str], None],
) -> None:
    """Train `trainable`, in place. Both models run without dropout.

    Args:
        original: is not changed.
        student: its narrow copy; only read, its blocks' weights come from `trainable`.
        trainable: the blocks by `up`.
        statistics: where their weights and sums are in the model.
        batches: calibration data.
        settings: of `heal`, and the seed of the order.
        progress: is told the loss from time to time.
    """
    chosen = settings.heal
    steps = max(1, round(chosen.passes * len(batches)))
    device = next(original.parameters()).device
    for block in trainable.values():
        block.to(device)
    parameters = [parameter for block in trainable.values() for parameter in block.trained()]
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(parameters, lr=chosen.learning_rate, betas=(0.9, 0.99), fused=fused)
    with evaluating(original), evaluating(student):
        for step, batch in zip(range(steps), _endless(batches, settings.seed), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, steps, chosen.warmup, chosen.learning_rate)
            loss = _loss(original, student, trainable, statistics, batch, low_precision=chosen.low_precision)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, chosen.gradient_norm)
            optimizer.step()
            if (step + 1) % max(1, steps // 20) == 0:
                progress(f"heal: step {step + 1} of {steps}, loss {loss.item():.4f}")
    for block in trainable.values():
        block.to("cpu")


def _loss(
    original: nn.Module,
    student: nn.Module,
    trainable: Mapping[str, WhitenedBlock],
    statistics: Mapping[str, SiteStatistics],
    batch: Inputs,
    *,
    low_precision: bool,
) -> torch.Tensor:
    given = cast(batch, original)
    sums: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    device = next(original.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=low_precision):
        with torch.no_grad(), _heard(original, statistics, sums[0]):
            wanted = outputs_of(original, given)
        with torch.enable_grad(), _heard(student, statistics, sums[1]):
            held = {
                name: tensor.reshape(student.get_parameter(name).shape)
                for up, block in trainable.items()
                for name, tensor in _parameters(statistics[up], block).items()
            }
            got = outputs_of(_Held(student, held), given)
    with torch.enable_grad():
        return distance(got, wanted, given, list(zip(sums[1], sums[0], strict=True)))


def _parameters(where: SiteStatistics, block: WhitenedBlock) -> dict[str, torch.Tensor]:
    return where.block.folded(block.weights()).parameters(where.entry.site)


class _Held(nn.Module):
    """A model that runs with other parameters than it has, through which gradients go."""

    def __init__(self, model: nn.Module, held: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model, self.held = model, held

    def forward(self, **inputs: Any) -> Any:
        use_cache = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}
        return functional_call(self.model, self.held, (), {**use_cache, **inputs})


@contextmanager
def _heard(model: nn.Module, statistics: Mapping[str, SiteStatistics], into: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the sums around the blocks are noted in order."""
    with ExitStack() as stack:
        for each in statistics.values():
            stack.enter_context(hooked(model, each.place, into.append))
        yield


def _endless(batches: Sequence[Inputs], seed: int) -> Iterator[Inputs]:
    """Every batch in turn, in another order with every pass."""
    draw = random.Random(seed)
    while True:
        order = list(batches)
        draw.shuffle(order)
        yield from order
