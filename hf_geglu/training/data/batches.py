"""Which block goes into which batch: a pure function of seed, sizes and step.

The blocks of a run form one endless sequence of draws: epoch after epoch, each in its own random order. Step s takes
the next G draws, G = blocks a forward x forwards a step x processes. Hence two models trained with the same settings
see the same blocks in the same order, 1x8 sees what 8x1 sees, two processes see what one sees, and a resumed run
starts at a number instead of skipping batches. A batch may reach over the end of an epoch; no block is left out.

accelerate's data loader sharding is not used: it would deal out blocks by process and batch size, and so change what
a step sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training.objectives.objective import Batch, Example, Objective, unpredicted
from hf_geglu.training.settings.run import TrainSettings


@runtime_checkable
class MapBlocks(Protocol):
    """Blocks that can be picked by number: a list, a torch Dataset, a `datasets.Dataset`."""

    def __len__(self) -> int:
        """How many blocks there are."""

    def __getitem__(self, index: int, /) -> Example:
        """The block of that number."""


Blocks: TypeAlias = MapBlocks | Iterable[Example]
"""Blocks of tokens; an iterable without a length is a stream, and is read anew when it ends."""

Draw: TypeAlias = tuple[int, Example]


@dataclass(frozen=True)
class BatchShape:
    """How the draws of a step are dealt out.

    Attributes:
        per_forward: blocks of one forward of one process.
        forwards: forwards of one process in a step (gradient accumulation).
        processes: number of processes.
    """

    per_forward: int
    forwards: int
    processes: int = 1

    @property
    def per_step(self) -> int:
        """Blocks of a step, over all processes."""
        return self.per_forward * self.forwards * self.processes


def step_count(settings: TrainSettings, blocks: Blocks, shape: BatchShape) -> int:
    """Optimizer steps of the whole run; whole epochs are rounded up to whole steps.

    Raises:
        ConfigurationError: a stream without `max_steps`.
        DataError: no blocks.
    """
    if isinstance(blocks, MapBlocks) and len(blocks) == 0:
        raise DataError("0 training blocks: expected at least 1. Give more text, or a smaller --block_size.")
    if settings.max_steps >= 1:
        return settings.max_steps
    if not isinstance(blocks, MapBlocks):
        raise ConfigurationError(
            "a stream of blocks without max_steps: expected the number of steps, since a stream does not say how "
            "long it is. Set max_steps."
        )
    return max(1, math.ceil(settings.num_train_epochs * len(blocks) / shape.per_step))


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """The order of `count` blocks in that epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def draws(blocks: Blocks, *, seed: int, start: int = 0) -> Iterator[Draw]:
    """The endless sequence of draws as (position, block), from position `start` on.

    Raises:
        DataError: a stream that yields nothing.
    """
    if isinstance(blocks, MapBlocks):
        count = len(blocks)
        epoch, offset = divmod(start, count)
        while True:
            for index in epoch_order(count, seed=seed, epoch=epoch)[offset:]:
                yield start, blocks[index]
                start += 1
            epoch, offset = epoch + 1, 0
    position = 0
    while True:
        before = position
        for block in blocks:
            if position >= start:
                yield position, block
            position += 1
        if position == before:
            raise DataError(
                "the stream of blocks is empty: expected at least one block. Give more text, or a smaller --block_size."
            )


def step_batches(
    blocks: Blocks, objective: Objective, shape: BatchShape, *, seed: int, start: int = 0, process: int = 0
) -> Iterator[list[Batch]]:
    """For each step from draw `start` on, the batches of this process, one for each of its forwards."""
    sequence = draws(blocks, seed=seed, start=start)
    while True:
        step = list(islice(sequence, shape.per_step))
        batches = []
        for forward in range(shape.forwards):
            begin = (forward * shape.processes + process) * shape.per_forward
            positions, examples = zip(*step[begin : begin + shape.per_forward], strict=True)
            batches.append(objective.batch(examples, positions=positions, seed=seed))
        yield batches


def eval_batches(
    blocks: MapBlocks, objective: Objective, *, batch_size: int, seed: int, processes: int = 1, process: int = 0
) -> Iterator[Batch]:
    """Each block once, dealt out over the processes.

    Every process gets the same number of batches, because a collective forward (DDP) would wait for the others for
    ever: one that has run out repeats block 0 with nothing to predict.
    """
    count = len(blocks)
    for begin in range(0, count, batch_size * processes):
        own = range(begin + process * batch_size, min(begin + (process + 1) * batch_size, count))
        rows: Sequence[int] = own if len(own) else (0,)
        batch = objective.batch([blocks[i] for i in rows], positions=rows, seed=seed)
        if not len(own):
            batch["labels"] = unpredicted(batch["labels"])
        yield batch
