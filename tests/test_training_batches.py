"""The order of the data is a function of seed and position, never of batch sizes or processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training import CausalLM, TrainSettings
from hf_geglu.training.data.batches import BatchShape, draws, epoch_order, eval_batches, step_batches, step_count
from hf_geglu.training.objectives.objective import IGNORED

shapes = st.builds(BatchShape, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


def numbered(count: int) -> list[list[int]]:
    """Block i is [i, i]: what a batch holds can be read off it."""
    return [[i, i] for i in range(count)]


def seen(blocks: list[list[int]], shape: BatchShape, step: int, *, seed: int) -> list[int]:
    """The blocks of a step, over all processes, sorted."""
    found: list[int] = []
    for process in range(shape.processes):
        start = step * shape.per_step
        batches = next(step_batches(blocks, CausalLM(), shape, seed=seed, start=start, process=process))
        assert len(batches) == shape.forwards
        found += [int(row[0]) for batch in batches for row in batch["input_ids"]]
    return sorted(found)


@given(st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(count, seed=seed, epoch=epoch)) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_order(50, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@given(st.integers(1, 20), st.integers(1, 4))
def test_every_block_comes_once_an_epoch(count: int, epochs: int) -> None:
    taken = [int(block[0]) for _, block in islice(draws(numbered(count), seed=3), count * epochs)]
    assert Counter(taken) == dict.fromkeys(range(count), epochs)


@given(st.integers(1, 20), st.integers(0, 60))
def test_starting_late_is_skipping(count: int, start: int) -> None:
    blocks = numbered(count)
    whole = list(islice(draws(blocks, seed=3), start + 5))
    assert list(islice(draws(blocks, seed=3, start=start), 5)) == whole[start:]


@given(st.integers(1, 30), shapes, st.integers(0, 5))
def test_a_step_sees_the_same_blocks_however_it_is_cut(count: int, shape: BatchShape, step: int) -> None:
    blocks = numbered(count)
    in_one = BatchShape(shape.per_step, 1, 1)
    one_by_one = BatchShape(1, shape.per_step, 1)
    assert seen(blocks, shape, step, seed=7) == seen(blocks, in_one, step, seed=7)
    assert seen(blocks, shape, step, seed=7) == seen(blocks, one_by_one, step, seed=7)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4))
def test_an_evaluation_takes_each_block_once_and_keeps_processes_in_step(count: int, size: int, processes: int) -> None:
    taken: list[int] = []
    lengths = set()
    for process in range(processes):
        batches = list(
            eval_batches(numbered(count), CausalLM(), batch_size=size, seed=0, processes=processes, process=process)
        )
        lengths.add(len(batches))
        for batch in batches:
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                taken += [int(ids[0])] * bool((labels != IGNORED).any())
    assert sorted(taken) == list(range(count))
    assert len(lengths) == 1


class Stream:
    """No length: read anew each time."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(numbered(3))


def test_a_stream_is_read_again_when_it_ends() -> None:
    assert [block[0] for _, block in islice(draws(Stream(), seed=0), 7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [position for position, _ in islice(draws(Stream(), seed=0, start=4), 3)] == [4, 5, 6]


def test_an_empty_stream_ends_in_an_error_rather_than_never() -> None:
    with pytest.raises(DataError, match="empty"):
        next(draws(iter(()), seed=0))


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (2.0, 5), (0.1, 1)])
def test_epochs_are_rounded_up_to_steps(epochs: float, steps: int) -> None:
    settings = TrainSettings(num_train_epochs=epochs)
    assert step_count(settings, numbered(10), BatchShape(2, 2)) == steps


def test_a_stream_needs_max_steps() -> None:
    with pytest.raises(ConfigurationError, match="max_steps"):
        step_count(TrainSettings(), Stream(), BatchShape(1, 1))
    assert step_count(TrainSettings(max_steps=4), Stream(), BatchShape(1, 1)) == 4


def test_no_blocks() -> None:
    with pytest.raises(DataError, match="0 training blocks"):
        step_count(TrainSettings(max_steps=1), [], BatchShape(1, 1))


def test_tensors_and_mappings_are_blocks_too() -> None:
    objective = CausalLM()
    forms = [[1, 2, 3], torch.tensor([1, 2, 3]), {"input_ids": [1, 2, 3]}, {"input_ids": torch.tensor([1, 2, 3])}]
    batch = objective.batch(forms)
    assert batch["input_ids"].tolist() == [[1, 2, 3]] * 4
    assert batch["labels"].tolist() == [[2, 3, IGNORED]] * 4
    assert "attention_mask" not in batch
