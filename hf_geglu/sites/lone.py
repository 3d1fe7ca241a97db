"""Projections that are alone with an activation: poolers and transforms, which look like the first half of an FFN."""

from __future__ import annotations

import torch
from torch import nn

from hf_geglu.sites.arguments import shapes
from hf_geglu.sites.hypotheses import Hypotheses
from hf_geglu.sites.isolation import isolated
from hf_geglu.sites.observe import visible
from hf_geglu.sites.running import Recipe, play
from hf_geglu.sites.twin import Mold
from hf_geglu.sites.verdict import rows


def lone_projection(block: nn.Module, *, mold: Mold) -> str | None:
    """The reason to refuse a block of one projection if it ends in an activation; None where it is no candidate at
    all."""
    path, port = visible(block, ())[0]
    with isolated():
        for shape in shapes(port.d_in, channels_first=port.convolves)[:2]:
            run = play(block, mold, Recipe((), shape, "absent"))
            if run.error is not None or not run.trace.calls or not isinstance(run.answer, torch.Tensor):
                continue
            answer = run.answer.detach()
            if answer.ndim == 0:
                return None
            fits = Hypotheses([rows(run.trace.calls[-1])], answer.shape[-1]).fit(answer.reshape(-1, answer.shape[-1]))
            if fits and fits[0].holds and fits[0].activation != "linear":
                return (
                    f"one projection ({path}) followed by {fits[0].activation}, with no second one: a pooler or a head"
                )
            return None
    return None
