"""narrow: from a model and calibration data to the weights of its narrow blocks, in up to three stages.

    closed   neurons are chosen by what leaving them out costs (`conversions.narrow`), and block after block, on what
        the narrow model before it really gives, the down projection is solved for so that the sum around the block is
        what it was
    local    each block is then trained on the same task (`conversions.whitened`)
    heal     the whole narrow model is trained on the original's outputs, FFN blocks only (`narrowing.heal`)

The original is not touched: all happens on a copy.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_geglu.calibration import CalibrationData
from hf_geglu.conversions import NewWeights
from hf_geglu.conversions.narrow import Moments, kept, narrowed, removal_order, ridge
from hf_geglu.conversions.whitened import WhitenedBlock, fit, hidden
from hf_geglu.inputs import Inputs
from hf_geglu.modes import evaluating
from hf_geglu.narrowing.blocks import Block, block_of
from hf_geglu.narrowing.heal import heal
from hf_geglu.narrowing.objective import tokens_of
from hf_geglu.narrowing.quick import quick
from hf_geglu.narrowing.replay import Replay
from hf_geglu.narrowing.settings import NarrowSettings, Stage
from hf_geglu.narrowing.statistics import KEPT_AS, MEMORY, SiteStatistics, error_metric, gather, weights_of
from hf_geglu.narrowing.sums import Stop, Sum, hooked
from hf_geglu.plan import Plan, SitePlan
from hf_geglu.surgery import apply

Fits = dict[str, NewWeights]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Narrower:
    """What is known of the original after one pass over it; serves any number of narrow models."""

    model: nn.Module
    statistics: Mapping[str, SiteStatistics]
    orders: Mapping[str, torch.Tensor]
    batches: Sequence[Inputs]
    """Those of the statistics."""
    all_batches: Sequence[Inputs]

    @property
    def tokens(self) -> int:
        """Behind the statistics."""
        return sum(len(each) for each in next(iter(self.statistics.values())).sums)


def study(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Inputs],
    *,
    smallest: int,
    settings: NarrowSettings,
    progress: Progress = lambda line: None,
) -> Narrower:
    """Look at the original once: which neurons it can do without, in which order.

    Args:
        model: unconverted; not changed.
        plan: for it; its sites that are converted are the ones to narrow.
        batches: calibration data, keyword arguments of forwards.
        smallest: the smallest width that will be asked for.
        settings: `selection_tokens`, `statistics_tokens`, `sensitivity`, `seed`.
        progress: takes a line from time to time.
    """
    entries = plan.converted
    with torch.no_grad(), quick(batches, next(model.parameters()).device):
        blocks = {entry.site.up: block_of(model, entry) for entry in entries}
        some = _first_tokens(batches, min(settings.statistics_tokens, _affordable(entries)))
        measured = len(_first_tokens(some, settings.selection_tokens))
        found = gather(model, entries, blocks, some, measured=measured, seed=settings.seed, progress=progress)
        orders = {}
        for up, each in found.items():
            covariance, _ = each.moments.second(centred=each.block.weights.down_bias is not None)
            metric = error_metric(each.metric_DD, settings.sensitivity)
            orders[up] = removal_order(covariance, each.block.weights.down, smallest=smallest, metric_DD=metric)
            each.moments = Moments(0, 0)  # F times F in float64: more than the block itself where D is small
            progress(f"{up}: neurons ordered")
    return Narrower(model=model, statistics=found, orders=orders, batches=some, all_batches=batches)


def narrow(
    studied: Narrower,
    plan: Plan,
    *,
    width: int,
    settings: NarrowSettings,
    value_branch: bool = True,
    progress: Progress = lambda line: None,
    reached: Callable[[Stage, nn.Module], None] = lambda stage, student: None,
) -> tuple[Fits, nn.Module]:
    """Narrow to one width, up to the stage that `settings` names.

    Args:
        studied: from `study`.
        plan: as for `surgery.apply`, with that width at its sites.
        width: neurons of each block.
        settings: the stage and its numbers.
        value_branch: let it learn. False is the control: the block stays what a dense block of that width would be.
        progress: takes a line from time to time.
        reached: is given the last stage before healing, if there is healing, and the last one, with the model as it is.

    Returns:
        The new weights of each site by its `up`, and the narrow copy of the model that holds them.
    """
    with quick(studied.all_batches, next(studied.model.parameters()).device):
        with torch.no_grad():
            starts = {
                up: narrowed(each.block.weights, kept(studied.orders[up], width))
                for up, each in studied.statistics.items()
            }
            student = copy.deepcopy(studied.model)
            apply(student, plan, {up: studied.statistics[up].block.folded(start) for up, start in starts.items()})
            for parameter in student.parameters():
                parameter.requires_grad_(False)
            trainable = _sequence(student, studied, starts, settings, value_branch, progress)
        if settings.reaches("heal"):
            reached("local", student)
            batches = studied.all_batches
            heal(studied.model, student, trainable, studied.statistics, batches, settings=settings, progress=progress)
        with torch.no_grad():
            fits = {
                up: _detached(studied.statistics[up].block.folded(block.weights())) for up, block in trainable.items()
            }
            for up, new in fits.items():
                write(student, studied.statistics[up].entry, new)
            reached(settings.stage, student)
    return fits, student


def write(student: nn.Module, entry: SitePlan, new: NewWeights) -> None:
    """Put new weights into a narrow model that is there already."""
    for name, tensor in new.parameters(entry.site).items():
        parameter = student.get_parameter(name)
        parameter.data.copy_(tensor.reshape(parameter.shape))


def _sequence(
    student: nn.Module,
    studied: Narrower,
    starts: Fits,
    settings: NarrowSettings,
    value_branch: bool,
    progress: Progress,
) -> dict[str, WhitenedBlock]:
    """Block after block: solve for the down projection, then train it, on what the blocks before really give."""
    trainable = {}
    with evaluating(student):
        replay = Replay(student, studied.batches, [each.entry.site.down for each in studied.statistics.values()])
        for up, each in studied.statistics.items():
            x_ND, target_ND, weights_N = _task(student, replay, each)
            start, moments = _solved(starts[up], each.block, x_ND, target_ND, weights_N)
            mean_weight = weights_N / weights_N.mean()
            centred = (x_ND - x_ND.mean(0)).mul_(mean_weight.sqrt()[:, None])
            block = WhitenedBlock(
                start,
                input_covariance_DD=centred.T @ centred / len(x_ND),
                hidden_covariance_FF=moments.second(centred=True)[0],
                output_scale=float(weights_N.rsqrt().mean()),
                learn_value=value_branch,
            )
            if settings.reaches("local"):
                del centred
                metric = error_metric(each.metric_DD, settings.sensitivity)
                chosen = replace(settings.fit, seed=settings.seed)
                fit(block, x_ND, target_ND, mean_weight, each.block.activation, settings=chosen, metric_DD=metric)
            write(student, each.entry, _detached(each.block.folded(block.weights())))
            trainable[up] = block
            progress(f"{up}: fitted")
    return trainable


def _task(student: nn.Module, replay: Replay, each: SiteStatistics) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, what the block should give, weights): what is missing in the narrow model's sum to be the original's."""
    site, sums_ND = each.entry.site, torch.cat(each.sums)
    x_ND, target_ND = sums_ND.new_empty(len(sums_ND), site.d_in, dtype=torch.float32), sums_ND.float()
    ends = [0, *itertools.accumulate(len(batch) for batch in each.sums)]
    seen: dict[str, torch.Tensor] = {}

    def take_sum(tensor: torch.Tensor) -> None:
        seen["sum"] = tensor
        raise Stop

    def see(number: int) -> None:
        batch = replay.batches[number]
        here, own = (tokens_of(seen[name], batch).float().cpu() for name in ("sum", "out"))
        rows = slice(ends[number], ends[number + 1])
        x_ND[rows] = tokens_of(seen["x"], batch)
        target_ND[rows] -= here - own
        seen.clear()

    own = Sum(site.down, "output")
    with (
        hooked(student, Sum(site.gate, "input"), lambda tensor: seen.__setitem__("x", tensor)),
        hooked(student, own, lambda tensor: seen.__setitem__("out", tensor)),
        hooked(student, each.place, take_sum),
    ):
        replay.visit(site.down, see)
    return x_ND, target_ND, torch.cat([weights_of(batch) for batch in each.sums])


def _solved(
    start: NewWeights, block: Block, x_ND: torch.Tensor, target_ND: torch.Tensor, weights_N: torch.Tensor
) -> tuple[NewWeights, Moments]:
    moments = Moments(start.gate.shape[0], target_ND.shape[1])
    chunks = (torch.split(each, 8192) for each in (x_ND, target_ND, weights_N))
    for x, y, w in zip(*chunks, strict=True):
        moments.update(hidden(start, x, block.activation), y, w)
    down, bias = ridge(moments, bias=start.down_bias is not None)
    return replace(start, down=down, down_bias=bias), moments


def _detached(weights: NewWeights) -> NewWeights:
    return NewWeights.from_tensors({name: tensor.detach() for name, tensor in weights.tensors().items()})


def _affordable(entries: Sequence[SitePlan]) -> int:
    """Tokens whose sums fit into `MEMORY`."""
    return MEMORY // sum(KEPT_AS.itemsize * entry.site.d_out for entry in entries)


def _first_tokens(batches: Sequence[Inputs], tokens: int) -> list[Inputs]:
    chosen: list[Inputs] = []
    count = 0
    for batch in batches:
        if chosen and count >= tokens:
            break
        chosen.append(batch)
        count += CalibrationData(batches=(batch,)).tokens
    return chosen
