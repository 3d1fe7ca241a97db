"""Run a block's twin until it goes through, and judge what it did."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from hf_geglu.sites.arguments import fillings, shapes
from hf_geglu.sites.isolation import isolated
from hf_geglu.sites.locating import Seen, locate
from hf_geglu.sites.overheard import Arguments
from hf_geglu.sites.projections import Port, leads_on, within
from hf_geglu.sites.running import Recipe, Run, persist
from hf_geglu.sites.twin import Mold
from hf_geglu.sites.verdict import Refusal, Verdict, judge

MAX_WIDTHS = 3


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of running one block. `error` says why it could not be run to its end, None where it was."""

    seen: tuple[Seen, ...]
    refused: tuple[Refusal, ...]
    error: str | None
    idle: frozenset[str] = frozenset()
    """Projections that the run which showed a block never called, those of replaced children aside."""


def observe(
    block: nn.Module,
    *,
    stub_sets: Collection[Collection[str]] = ((),),
    mold: Mold | None = None,
    widths: Collection[int] = (),
    by_hand: bool = False,
    given: Arguments | None = None,
    tokens: int | None = None,
) -> Probe:
    """Probe one block by behaviour; its weights are never read and nothing of it changes.

    Args:
        block: The module to be understood; it must run on one hidden state.
        stub_sets: Paths of children to be replaced by noise. Each set is tried until one shows an FFN block.
        mold: Casts the twins; give the one made of the whole model when many of its blocks are probed.
        widths: Of the hidden state; read off the projections where none are given.
        by_hand: Somebody says that there is a block, so its widths need not be those of one.
        given: Arguments to run it with, instead of synthetic ones.
        tokens: A number of tokens to try after the usual ones.
    """
    mold = mold or Mold(block)
    verdict: Verdict | None = None
    furthest: Run | None = None
    with isolated():
        for stubs in stub_sets:
            asked = (
                recipes(block, stubs, widths, tokens) if given is None else [Recipe(stubs, (), "absent", given=given)]
            )
            for recipe in asked:
                run = persist(block, mold, recipe)
                if run.error is None and run.trace.calls:
                    shown = judge(run.trace, by_hand=by_hand)
                    if shown.taken:
                        return _probed(block, mold, run, shown)
                    verdict = verdict if verdict and verdict.refused else shown
                    break
                if furthest is None or len(run.trace.calls) > len(furthest.trace.calls):
                    furthest = run
        if verdict is None and furthest is not None:
            shown = judge(furthest.trace, by_hand=by_hand)
            if shown.taken:
                return _probed(block, mold, furthest, shown)
    if verdict is not None:
        return Probe((), verdict.refused, None)
    return Probe((), (), furthest.error if furthest and furthest.error else "none of its projections was called")


def visible(block: nn.Module, stubs: Collection[str]) -> list[tuple[str, Port]]:
    """The projections of a block that are not below a stub."""
    return [
        (path, port)
        for path, _, port in within(block)
        if not any(path == stub or path.startswith(stub + ".") for stub in stubs)
    ]


def recipes(block: nn.Module, stubs: Collection[str], widths: Collection[int], tokens: int | None) -> list[Recipe]:
    """Every way to run a block, the likeliest first."""
    ports = [port for _, port in visible(block, stubs)]
    if not widths:
        pairs = [(a, b) for a in ports for b in ports if a is not b and leads_on(a, b)]
        pairs.sort(key=lambda pair: pair[0].d_in != pair[1].d_out)
        widths = list(dict.fromkeys(first.d_in for first, _ in pairs))[:MAX_WIDTHS]
    images = any(port.convolves for port in ports)
    return [
        Recipe(stubs, shape, filling)
        for width in widths
        for shape in shapes(width, channels_first=images, tokens=tokens)
        for filling in fillings(block)
    ]


def _probed(block: nn.Module, mold: Mold, run: Run, shown: Verdict) -> Probe:
    """What a run showed, with the activations located. What comes between a unit and the down projection is nobody's
    business as long as an exchange of the activation shows that it leaves positions where they are."""
    seen: list[Seen] = []
    refused = list(shown.refused)
    for one in shown.taken:
        located = locate(block, mold, run, one)
        if located is None and not one.direct:
            reason = f"what enters {one.down.path} is made of {one.fit}, but not position by position"
            refused.append(Refusal(one.projections, reason))
        else:
            seen.append(located or Seen(one))
    idle = {path for path, _ in visible(block, run.recipe.stubs)} - {call.path for call in run.trace.calls}
    return Probe(tuple(seen), tuple(refused), run.error, frozenset(idle))
