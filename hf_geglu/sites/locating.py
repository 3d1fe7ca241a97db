"""Where the activation of a block lives: an attribute that can be exchanged, or a call that can be made one.

Nothing is believed that has not been rehearsed: the attribute is exchanged in a twin, and what it answers there must
reach the down projection as the activation's answer does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hf_geglu.modeling_geglu import activation_calls
from hf_geglu.sites.activations import candidates
from hf_geglu.sites.hypotheses import TOLERANCE
from hf_geglu.sites.running import Run, play
from hf_geglu.sites.trace import Rehearsal, Trace
from hf_geglu.sites.twin import Mold
from hf_geglu.sites.verdict import Observation, entering, everything_passes, gate_of, stays_in_place, value_of


@dataclass(frozen=True, slots=True)
class Seen:
    """An observation in words: paths relative to the block, widths, formula, and where the activation lives."""

    observation: Observation
    activation_path: str | None = None
    activation_call: str | None = None
    """Set where the activation is at that path only once this call is exposed."""
    dim: int = -1
    """The dimension of what the activation hears that counts neurons."""


def locate(block: nn.Module, mold: Mold, run: Run, one: Observation) -> Seen | None:
    """What was observed in a run with the place of its activation; None where that can be neither exchanged nor
    exposed."""
    return _with_attribute(block, mold, run, one) or _with_call(block, mold, run, one)


def _with_call(block: nn.Module, mold: Mold, run: Run, one: Observation) -> Seen | None:
    """The call of a function that is the activation, proven by exposing it in a twin and then exchanging it."""
    for path, module in block.named_modules():
        if any(path == stub or path.startswith(f"{stub}.") for stub in run.recipe.stubs):
            continue
        for call in activation_calls(type(module)) if type(module).__module__.partition(".")[0] != "torch" else ():
            exposed = play(block, mold, run.recipe, exposing=(path, call))
            if exposed.error == run.error and len(exposed.trace.calls) == len(run.trace.calls):
                seen = _with_attribute(block, mold, exposed, one, exposing=(path, call))
                if seen is not None:
                    return seen
    return None


def _with_attribute(
    block: nn.Module, mold: Mold, run: Run, one: Observation, *, exposing: tuple[str, str] | None = None
) -> Seen | None:
    """The attribute that a conversion can exchange, proven by exchanging it, and the dimension of neurons there.

    An attribute qualifies if each time it was called it heard the gate branch. Then the conversion is rehearsed: it
    answers with fresh noise, and for a dense block the up projection is twice as wide; the noise must reach the down
    projection.
    """
    gates = [call for call in run.trace.calls if call.path == one.gate.path]
    times = len(gates)
    matching: dict[str, int] = {}
    named = dict(candidates())[one.fit.activation]
    for path in dict.fromkeys(heard.path for heard in run.trace.heard):
        heard = [heard for heard in run.trace.heard if heard.path == path]
        if not all(each.x.is_floating_point() and _same(named(each.x), each.y) for each in heard):
            continue
        inputs = [each.x for each in heard]
        for dim in (1, -1):
            heard_NF = [_channels_last(x, dim) for x in inputs]
            if len(inputs) == times and any(_same(x_NF, one.gate_NF) for x_NF in heard_NF):
                matching[path] = dim
            elif len(inputs) == 1 and _same(heard_NF[0], _concatenated([gate_of(call, one) for call in gates])):
                matching[path] = dim  # once for all experts
    for path in sorted(matching, key=lambda path: (_wraps(block, path), path.count("."))):
        rehearsal = Rehearsal(path, one.up.path if one.fit.layout == "dense" else None, matching[path], not one.direct)
        again = play(block, mold, run.recipe, rehearsal, exposing=exposing)
        if again.error == run.error and _reaches(again.trace, one, rehearsal):
            return Seen(one, path, exposing and exposing[1], matching[path])
    return None


def _channels_last(x: torch.Tensor, dim: int) -> torch.Tensor:
    moved = x.movedim(dim, -1) if x.ndim > 2 else x
    return moved.reshape(-1, moved.shape[-1])


def _reaches(trace: Trace, one: Observation, rehearsal: Rehearsal) -> bool:
    """Whether the noise given by the exchanged activation is what reached the down projection, multiplied as before."""
    downs = [call for call in trace.calls if call.path == one.down.path]
    ups = [call for call in trace.calls if call.path == one.up.path]
    if not len(downs) == len(ups) >= len(rehearsal.given) > 0:
        return False
    expected_NF = _concatenated([_channels_last(given, rehearsal.dim) for given in rehearsal.given]).detach()
    if one.fit.layout != "dense":
        values = [value_of(up, down, one.fit) for up, down in zip(ups, downs, strict=True)]
        value_NF = _concatenated(values)
        if value_NF.shape != expected_NF.shape:
            return False
        expected_NF = expected_NF * (value_NF + one.fit.offset)
    if one.direct:
        return _same(_concatenated([entering(down) for down in downs]), expected_NF)
    if one.fit.layout != "dense":
        shown = (_channels_last(result.detach(), dim) for result in trace.results for dim in (-1, 1) if result.ndim > 1)
        return any(_same(result_NF, expected_NF) for result_NF in shown) and stays_in_place(
            rehearsal.given[0], downs[0], rehearsal.dim
        )
    passes = (everything_passes(given, down, [up]) for given, up, down in zip(rehearsal.given, ups, downs, strict=True))
    return all(passes) and stays_in_place(rehearsal.given[0], downs[0], rehearsal.dim)


def _concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    """All tokens in one; nothing where the parts have different widths."""
    return torch.cat(parts) if len({part.shape[-1] for part in parts}) == 1 else torch.empty(0)


def _wraps(block: nn.Module, path: str) -> bool:
    """Containers come last: exchanging one would also remove the dropout behind the activation."""
    holder: object = block
    for name in path.split("."):
        holder = getattr(holder, name, None)
    return isinstance(holder, nn.Sequential)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE)
