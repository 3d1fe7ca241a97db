"""A calibration that was killed at any moment, in memory or layer by layer, ends with the same bits."""

import os
import random

import pytest
from calibration_inputs import lively
from checkpoints import files_in
from test_checkpoint_killed import Children
from tiny_models import tiny

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def written(target):
    """What a run has written, but for what it had begun to write."""
    found = files_in(target) if target.exists() else {}
    return {name: content for name, content in found.items() if name != "draft"}


def check(what, tmp_path, moments):
    """Kill at some of all steps on the disk, and once more on the way after each; None: at every step."""
    lively(tiny("llama")).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    children = Children(what, tmp_path / "base")
    chance = random.Random(0)
    saved = 0
    try:
        steps = children.whole(tmp_path / "whole", [])
        expected = files_in(tmp_path / "whole")
        assert steps > 20
        for at in range(1, steps) if moments is None else sorted(chance.sample(range(1, steps), moments)):
            target = tmp_path / f"out-{at}"
            assert children.killed(target, [], at=at)
            assert written(target) in ({}, expected)
            if written(target) != expected:
                children.killed(target, [], at=max(1, (steps - at) // 3))
                saved += children.whole(target, []) < steps
            assert written(target) == expected, at
    finally:
        children.close()
    assert saved > 0  # what was done before the kill was not done again


@pytest.mark.parametrize("what", ["calibrate", "in memory"])
def test_killed_at_some_steps(tmp_path, what):
    check(what, tmp_path, 6)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["calibrate", "in memory"])
def test_killed_at_every_step(tmp_path, what):
    check(what, tmp_path, None)
