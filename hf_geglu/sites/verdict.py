"""From the record of one run to what it shows: FFN blocks, and the pairs of projections that are none, with the reason.

Who feeds whom is read off the gradients: the answers of the projections are random leaves, so the input of a
projection has a gradient with respect to exactly those whose answers it was made of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_geglu.sites.activations import SATURATING
from hf_geglu.sites.hypotheses import Fit, Hypotheses
from hf_geglu.sites.projections import leads_on
from hf_geglu.sites.trace import Call, Trace


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One block as it was seen at work: the calls of its projections, the formula that holds, and the next best one."""

    gate: Call
    up: Call
    down: Call
    fit: Fit
    runner_up: Fit | None
    direct: bool = True
    """Whether the unit's answer itself enters the down projection, and not something made of it: its norm, say."""

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of its two or three projections."""
        return tuple(dict.fromkeys((self.gate.path, self.up.path, self.down.path)))

    @property
    def gate_NF(self) -> torch.Tensor:
        """What goes through the activation."""
        return gate_of(self.gate, self)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Projections that feed each other and yet are no FFN block."""

    projections: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Everything that one run showed."""

    taken: tuple[Observation, ...]
    refused: tuple[Refusal, ...]


def rows(call: Call) -> torch.Tensor:
    """The answer of a projection as (N, K): channels last, tokens flattened."""
    return _rows(call.out.detach(), call)


def entering(call: Call) -> torch.Tensor:
    """What entered a projection as (N, F)."""
    return _rows(call.x.detach(), call)


def judge(trace: Trace, *, by_hand: bool = False) -> Verdict:
    """Look at every projection that was called and say what fed it; `by_hand`: whatever its widths are."""
    found: list[Observation] = []
    refused: list[Refusal] = []
    for index, down in enumerate(trace.calls):
        feeding = _feeding(down, trace.calls[:index])
        if len(feeding) == 3 and down.port.stacked:
            feeding = _without_router(down, feeding, trace)
        if not 1 <= len(feeding) <= 2:
            continue
        outcome = _pair(down, feeding, trace)
        if isinstance(outcome, Observation):
            found.append(outcome)
        elif outcome is not None:
            refused.append(outcome)
    taken: list[Observation] = []
    for one in found:
        reason = _mixes(one) or _chained(one, found) or _unfit(one, by_hand)
        if reason is None:
            taken.append(one)
        else:
            refused.append(Refusal(one.projections, reason))
    used = {path for one in taken for path in one.projections}
    refused = [r for r in refused if not used.intersection(r.projections)]
    unique = {one.projections: one for one in reversed(taken)}
    return Verdict(tuple(reversed(unique.values())), tuple(dict.fromkeys(refused)))


def _feeding(down: Call, earlier: list[Call]) -> list[Call]:
    """The earlier calls whose answers went into the input of `down`, through anything but another projection."""
    if not earlier or not down.x.requires_grad:
        return []
    parts = _parts_in(down, [call.out for call in earlier])
    return [call for call, has_part in zip(earlier, parts, strict=True) if has_part]


def _without_router(down: Call, feeding: list[Call], trace: Trace) -> list[Call]:
    """Shared experts may be weighed before their down projection rather than after it: the two of three that make a
    unit, if there are such two."""
    for router in feeding:
        two = [call for call in feeding if call is not router]
        if isinstance(_pair(down, two, trace), Observation):
            return two
    return feeding


def _pair(down: Call, feeding: list[Call], trace: Trace) -> Observation | Refusal | None:
    """What `down` and the one or two projections that feed it are; None where their widths say nothing."""
    paths = tuple(call.path for call in (*feeding, down))
    leads = any(leads_on(call.port, down.port) for call in feeding)
    hypotheses = Hypotheses([rows(call) for call in feeding], down.port.d_in, trace.limits if leads else ())
    fits = hypotheses.fit(entering(down))
    if fits and fits[0].holds:
        return _observation(down, feeding, fits, direct=True)
    if not leads:
        return None
    for result in reversed(trace.results[min(call.at for call in feeding) : down.at]):
        inner = _unit(result, down, hypotheses)
        if inner and everything_passes(result, down, feeding) and not _hears(down, trace.inputs):
            return _observation(down, feeding, inner, direct=False)
    names = " and ".join(f"{call.path} ({call.port.d_in} -> {call.port.d_out})" for call in feeding)
    why = _unnamed(down, feeding, trace) or _mixing(down, feeding, fits, trace)
    return Refusal(paths, f"what enters {down.path} is no activation of {names}: {why}")


def _unnamed(down: Call, feeding: list[Call], trace: Trace) -> str | None:
    """Whether something that an attribute holds stands between two projections, and is no function with a name."""
    if len(feeding) == 1:
        said, z_NF = feeding[0].out.detach(), entering(down)
        for heard in trace.heard:
            if _equal(heard.x, said) and _equal(heard.y.reshape(-1, heard.y.shape[-1]), z_NF):
                return f"{heard.path} computes a function that has no name in ACT2FN, or one with learned numbers"
    return None


def _observation(down: Call, feeding: list[Call], fits: list[Fit], *, direct: bool) -> Observation:
    rivals = [one for one in fits[1:] if one.activation != fits[0].activation or one.layout != fits[0].layout]
    gate = feeding[fits[0].gate_source]
    up = feeding[1 - fits[0].gate_source] if fits[0].layout == "separate" else gate
    return Observation(gate, up, down, fits[0], rivals[0] if rivals else None, direct)


def _unit(result: torch.Tensor, down: Call, hypotheses: Hypotheses) -> list[Fit]:
    """The fits of something that was computed on the way to `down`, if it is an activation or a gated unit."""
    for dim in (-1, 1) if result.ndim > 2 else (-1,):
        if result.shape[dim] == down.port.d_in:
            fits = hypotheses.fit(result.detach().movedim(dim, -1).reshape(-1, down.port.d_in))
            if fits and fits[0].holds and (fits[0].layout, fits[0].activation) != ("dense", "linear"):
                return fits
    return []


def everything_passes(result: torch.Tensor, down: Call, feeding: list[Call]) -> bool:
    """Whether `down` hears of `result`, and of the projections through it only: with it held back, nothing is left."""
    if not down.x.requires_grad or not _hears(down, [result]):
        return False
    hook = result.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
    try:
        return not _hears(down, [call.out for call in feeding])
    finally:
        hook.remove()


def _hears(down: Call, sources: list[torch.Tensor]) -> bool:
    """Whether any of these has a part in what enters `down`."""
    return any(_parts_in(down, sources))


def _parts_in(down: Call, sources: list[torch.Tensor]) -> list[bool]:
    """For each of these, whether what enters `down` moves with it."""
    if not sources:
        return []
    # every number that enters gets a weight of its own, so that nothing cancels
    weights = torch.linspace(0.5, 1.5, down.x.numel(), dtype=down.x.dtype).reshape(down.x.shape)
    grads = torch.autograd.grad((down.x * weights).sum(), sources, retain_graph=True, allow_unused=True)
    return [grad is not None and bool(grad.any()) for grad in grads]


def stays_in_place(given: torch.Tensor, down: Call, dim: int) -> bool:
    """Whether zeros at one position keep the others out of it, as a norm does even over positions."""
    given_NF = given.detach().movedim(dim, -1).reshape(-1, given.shape[dim])
    silent = int(given_NF.abs().sum(dim=-1).argmin())
    entering_F = _rows(down.x, down)[silent]
    (grad,) = torch.autograd.grad(entering_F.sum(), [given], retain_graph=True, allow_unused=True)
    if grad is None:
        return True
    grad_NF = grad.movedim(dim, -1).reshape(given_NF.shape)
    return not bool(grad_NF[torch.arange(len(grad_NF)) != silent].any())


def _mixing(down: Call, feeding: list[Call], fits: list[Fit], trace: Trace) -> str:
    """Why no formula holds, as far as gradients show it."""
    x_NF = _rows(down.x, down)
    for call in feeding:
        grad = torch.autograd.grad(x_NF[-1].sum(), call.out, retain_graph=True, allow_unused=True)[0]
        if grad is not None and int(_rows(grad, call).any(dim=-1).sum()) > 1:
            return "positions are mixed in between (attention, a convolution or a pooling)"
    for column in range(min(4, x_NF.shape[-1])):
        grad = torch.autograd.grad(x_NF[-1, column], feeding[0].out, retain_graph=True, allow_unused=True)[0]
        if grad is not None and int(_rows(grad, feeding[0]).any(dim=0).sum()) > 2:
            return f"neurons are mixed in between (a norm or a softmax){_by(feeding, trace)}"
    if any(call.port.form == "convolution" for call in (down, *feeding)):
        return "a convolution wider than 1 is involved"
    return f"the best fit is {fits[0]}{_by(feeding, trace)}" if fits else "as many numbers do not come out as go in"


def _by(feeding: list[Call], trace: Trace) -> str:
    """Which module changes what a projection says first: a norm with statistics of its own, say, which a value branch
    of constant 1 could not pass unchanged."""
    if len(feeding) == 1 and not feeding[0].port.convolves:
        said_NK = rows(feeding[0])
        for heard in trace.heard:
            if _equal(heard.x.reshape(-1, heard.x.shape[-1]), said_NK) and not _equal(heard.x, heard.y):
                return f"; {heard.path} is the first that changes what {feeding[0].path} says"
    return ""


def _unfit(one: Observation, by_hand: bool) -> str | None:
    """Why a pair whose formula holds is still no FFN block."""
    up, down, seen = one.up, one.down, one.fit
    if any(call.port.form == "convolution" for call in (one.gate, up, down)):
        return f"a convolution wider than 1 is one of its projections ({up.path}, {down.path})"
    if seen.layout == "separate" and one.gate.path == up.path:
        return f"{up.path} is run twice, once for the gate and once for the value: a unit of one projection"
    if one.gate.x.shape != up.x.shape or not torch.equal(one.gate.x, up.x):
        return f"gate {one.gate.path} and value {up.path} read different inputs"
    if up.port.d_in != down.port.d_out and not by_hand:
        return (
            f"{up.path} reads width {up.port.d_in} and {down.path} writes width {down.port.d_out}: "
            f"a head or an adaptor between widths, d_in != d_out"
        )
    if seen.layout == "dense" and seen.activation == "linear":
        return f"no activation between {up.path} and {down.path}: a low-rank pair"
    if seen.layout == "dense" and seen.activation in SATURATING:
        return f"{seen.activation} between {up.path} and {down.path} saturates: a pooler or a gate, not an FFN"
    if seen.layout == "dense" and down.port.d_in < up.port.d_in and not up.port.stacked and not by_hand:
        return f"a bottleneck ({up.port.d_in} -> {down.port.d_in} -> {down.port.d_out}): an adapter or squeeze-excite"
    if one.runner_up is not None and one.runner_up.holds:
        return f"{seen} and {one.runner_up} cannot be told apart"
    return None


def _mixes(one: Observation) -> str | None:
    """Whether it is the second half of a MixFFN."""
    up = one.up
    if up.port.depthwise:
        return (
            f"a depthwise convolution ({up.path}) stands between the up projection and the activation (a MixFFN): "
            "positions are mixed before the gate, and a value branch would need a convolution of its own"
        )
    return None


def _chained(one: Observation, found: list[Observation]) -> str | None:
    """Whether an activated projection comes before or after the pair: then it is a perceptron of more layers."""
    for other in found:
        if other.fit.activation == "linear" or other is one:
            continue
        if other.down.path in (one.up.path, one.gate.path) or one.down.path in (other.up.path, other.gate.path):
            return (
                f"a chain of more than two projections: {', '.join(dict.fromkeys(one.projections + other.projections))}"
            )
    return None


def gate_of(gate: Call, one: Observation) -> torch.Tensor:
    """What goes through the activation in a block like `one`, read off this call of its gate projection."""
    gate_NF = _halves(gate, one.down, one.fit)[0]
    return gate_NF if one.fit.limit is None else gate_NF.clamp(max=one.fit.limit)


def value_of(up: Call, down: Call, seen: Fit) -> torch.Tensor:
    """What the activation is multiplied by in a gated block, read off this call of the up projection."""
    value_NF = rows(up) if seen.layout == "separate" else _halves(up, down, seen)[1]
    return value_NF if seen.limit is None else value_NF.clamp(-seen.limit, seen.limit)


def _halves(call: Call, down: Call, seen: Fit) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and value of a packed answer; the whole answer twice where it is not packed."""
    answer_NK, width = rows(call), down.port.d_in
    if seen.layout == "packed":
        halves = (answer_NK[..., :width], answer_NK[..., width:])
    elif seen.layout == "interleaved":
        halves = (answer_NK[..., 0::2], answer_NK[..., 1::2])
    else:
        halves = (answer_NK, answer_NK)
    return halves if seen.gate_half != "last" else (halves[1], halves[0])


def _rows(tensor: torch.Tensor, call: Call) -> torch.Tensor:
    moved = tensor.movedim(1, -1) if call.port.convolves and tensor.ndim > 2 else tensor
    return moved.reshape(-1, moved.shape[-1])


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
