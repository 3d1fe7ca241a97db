"""One pass over the original: what each block's hidden values do, what an error of its output costs, and what the sums
around it were. Everything that choosing and fitting narrow blocks needs.

Legend of suffixes: N tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_geglu.conversions.narrow import Moments
from hf_geglu.conversions.whitened import hidden
from hf_geglu.distance import cast, outputs_of
from hf_geglu.errors import ConversionError
from hf_geglu.inputs import Inputs
from hf_geglu.modes import evaluating
from hf_geglu.narrowing.blocks import Block
from hf_geglu.narrowing.objective import probe, tokens_of, variance
from hf_geglu.narrowing.sums import Sum, find_sums, hooked
from hf_geglu.plan import SitePlan

MEMORY = 1 << 30
"""Bytes that the recorded sums may take; tokens beyond are not looked at."""
KEPT_AS = torch.bfloat16
"""Rounding is 0.1 % of a sum; a narrow block is off by ten percent or more of its spread."""


@dataclass(slots=True, eq=False)
class SiteStatistics:
    """Of one block of the original."""

    entry: SitePlan
    block: Block
    place: Sum
    """Where its output is added; the output itself where it is added nowhere."""
    moments: Moments
    """Of its hidden values; given up once its neurons are in order."""
    metric_DD: torch.Tensor
    """Second moment of the gradients of what the model is for, at the sum."""
    sums: list[torch.Tensor] = field(default_factory=list)
    """(N, D) of each batch, as `KEPT_AS`."""
    inputs: torch.Tensor | None = None

    @property
    def compensates(self) -> bool:
        """Whether the errors of earlier blocks can be made up for here."""
        return self.place.module != self.entry.site.down


def weights_of(sum_ND: torch.Tensor) -> torch.Tensor:
    """What an error of a token's sum costs (N,): the next norm divides by its spread, so one over its variance."""
    return 1.0 / variance(sum_ND.float())


def gather(
    model: nn.Module,
    entries: Sequence[SitePlan],
    blocks: Mapping[str, Block],
    batches: Sequence[Inputs],
    *,
    measured: int,
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, SiteStatistics]:
    """Run the original over the batches: forwards and backwards over the first ones, forwards only over the others,
    whose sums are all that is kept.

    Args:
        model: the original; not changed.
        entries: the sites.
        blocks: their blocks, by `up`.
        batches: keyword arguments of forwards.
        measured: how many of them are run backwards too, for the moments and the metric.
        seed: of the directions that are probed.
        progress: is told of each tenth.

    Raises:
        ConversionError: a block is run more or less than once in a forward.
    """
    places = find_sums(model, _small(batches[0]), [entry.site.down for entry in entries])
    found = {
        entry.site.up: SiteStatistics(
            entry=entry,
            block=blocks[entry.site.up],
            place=places.get(entry.site.down, Sum(entry.site.down, "output")),
            moments=Moments(entry.site.width, 0),
            metric_DD=torch.zeros(entry.site.d_out, entry.site.d_out),
        )
        for entry in entries
    }
    generator = torch.Generator().manual_seed(seed)
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        with evaluating(model):
            for number, batch in enumerate(batches):
                given = cast(batch, model)
                if number < measured:
                    _look(model, found, given, generator)
                else:
                    _listen(model, found, given)
                if (number + 1) % max(1, len(batches) // 10) == 0:
                    progress(f"original: {number + 1} of {len(batches)} batches")
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
    return found


def _look(model: nn.Module, found: Mapping[str, SiteStatistics], batch: Inputs, generator: torch.Generator) -> None:
    """One batch."""
    inputs: dict[str, list[torch.Tensor]] = {up: [] for up in found}
    sums: dict[str, list[torch.Tensor]] = {up: [] for up in found}

    def taker(up: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def take(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor if tensor.requires_grad else tensor.detach().requires_grad_(True)
            sums[up].append(tensor)
            return tensor

        return take

    with ExitStack() as stack, torch.enable_grad():
        for up, each in found.items():
            stack.enter_context(hooked(model, each.place, taker(up)))
            stack.enter_context(hooked(model, Sum(each.entry.site.gate, "input"), inputs[up].append))
        value = probe(outputs_of(model, batch), batch, generator)
    for up in found:
        if len(sums[up]) != 1 or len(inputs[up]) != 1:
            raise ConversionError(
                f"{up} is run {len(inputs[up])} times in one forward; a block that is shared between layers, or left "
                "out in some, keeps its width. Say width='same'"
            )
    gradients = torch.autograd.grad(value, [sums[up][0] for up in found], allow_unused=True)
    for (up, each), gradient in zip(found.items(), gradients, strict=True):
        x_ND = tokens_of(inputs[up][0].detach(), batch).float().cpu()
        sum_ND = tokens_of(sums[up][0].detach(), batch).float().cpu()
        h_NF = hidden(each.block.weights, x_ND, each.block.activation)
        each.moments.update(h_NF, h_NF.new_zeros(len(h_NF), 0), weights_of(sum_ND))
        if gradient is not None:
            cost_ND = tokens_of(gradient, batch).float().cpu()
            each.metric_DD += cost_ND.T @ cost_ND
        each.sums.append(sum_ND.to(KEPT_AS))


def _listen(model: nn.Module, found: Mapping[str, SiteStatistics], batch: Inputs) -> None:
    """One batch, its sums alone."""

    def keeper(each: SiteStatistics) -> Callable[[torch.Tensor], None]:
        return lambda tensor: each.sums.append(tokens_of(tensor, batch).to("cpu", KEPT_AS))

    with ExitStack() as stack, torch.no_grad():
        for each in found.values():
            stack.enter_context(hooked(model, each.place, keeper(each)))
        outputs_of(model, batch)


def _small(batch: Inputs) -> Inputs:
    """The first of a batch: enough to see where outputs go."""
    return {
        name: value[:1] if isinstance(value, torch.Tensor) and value.dim() else value for name, value in batch.items()
    }


def error_metric(metric_DD: torch.Tensor, sensitivity: float) -> torch.Tensor:
    """What an error costs: its size, and how far it moves what the model is for, each counted as 1 on average."""
    size = float(metric_DD.diagonal().mean())
    even = torch.eye(len(metric_DD))
    if size <= 0.0:
        return even
    return sensitivity * metric_DD / size + (1 - sensitivity) * even
