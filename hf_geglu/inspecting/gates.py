"""inspect_gates: what the gates of a model are by their weights, and what they do on real inputs.

Legend of suffixes: F neurons, D inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_geglu.distance import cast
from hf_geglu.errors import NoSitesError, SelectionError
from hf_geglu.inputs import Inputs
from hf_geglu.inspecting.experts import ExpertsPass, hearing_experts
from hf_geglu.inspecting.listen import Heard, listening
from hf_geglu.inspecting.measure import FirstPass, SecondPass
from hf_geglu.inspecting.place import Place, down_columns, gate_rows, places, value_constants, value_rows
from hf_geglu.inspecting.report import GateReport, Neurons, SiteGates
from hf_geglu.inspecting.sketch import nearest_cosine
from hf_geglu.modes import evaluating
from hf_geglu.selection import Layers, select
from hf_geglu.sites.weights import is_stack

Progress = Callable[[int, int], None]
"""(batches done, batches in all), both passes counted."""


def inspect_gates(
    model: nn.Module,
    batches: Iterable[Inputs] = (),
    *,
    before: nn.Module | None = None,
    layers: Layers = None,
    name: str = "model",
    progress: Progress | None = None,
) -> GateReport:
    """Look at every FFN block: its weights, and what happens in it on these inputs.

    The model runs over the batches twice, in evaluation mode, without gradients. Its outputs, modules and random state
    are as before, and hooks come off whatever happens. What is kept is some 1,600 bytes a neuron (96 bins of its gate's
    input, 128 columns of a random sketch, moments), however many tokens there are; the same inputs give the same
    report.

    Args:
        model: gated or dense, converted or not: every block that `find_sites` sees.
        batches: keyword arguments of a forward each; none: weights alone. An `attention_mask` (B, T) leaves its padding
            out.
        before: the model from before a fine-tuning, looked at on the same inputs; its blocks are paired with this one's
            in order.
        layers: which blocks, as in `make_plan`.
        name: for tables and plots.
        progress: is told how far it is.

    Returns:
        The report; `print` shows it, `hf_geglu.inspecting.picture.draw` plots it, `to_dict` makes JSON of it.

    Raises:
        NoSitesError: the model has no FFN block.
        SelectionError: `layers` matches nothing, or the model from before has other blocks.
    """
    kept = list(batches)
    passes = 2 * len(kept) * (1 if before is None else 2)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, passes)

    earlier = None if before is None else _inspect(before, kept, layers, "before", step)
    report = _inspect(model, kept, layers, name, step)
    if before is None or earlier is None:
        return report
    return _beside(report, earlier, model, before, layers)


def _inspect(
    model: nn.Module, batches: Sequence[Inputs], layers: Layers, name: str, step: Callable[[], None]
) -> GateReport:
    chosen = _chosen(model, layers)
    first = {place.site.up: FirstPass(place) for place in chosen}
    reasons: dict[str, str] = {}
    second: dict[str, SecondPass] = {}
    experts: dict[str, ExpertsPass] = {}
    if batches:
        stacks = [place for place in chosen if is_stack(place.site.projection)]
        modules = [place for place in chosen if not is_stack(place.site.projection)]
        with hearing_experts(model, stacks) as experts:
            reasons |= _run(model, modules, batches, lambda place, heard: first[place.site.up].add(heard), step)
        second = {path: SecondPass.after(each) for path, each in first.items() if each.tokens}
        heard_of = [place for place in chosen if place.site.up in second]
        _run(model, heard_of, batches, lambda place, heard: second[place.site.up].add(heard), step)
    sites = []
    for place in chosen:
        path = place.site.up
        if path in experts and experts[path].tokens_E.any():
            sites.append(_stack(place, experts[path]))
            continue
        why = [reasons[path]] if path in reasons else []
        if is_stack(place.site.projection) and batches:
            why.append("its experts did not run one after the other, so none of them is heard")
        elif batches and not why and path not in second:
            why.append("no input reached it")
        sites.append(_site(model, place, second.get(path), why))
    return GateReport(
        model_class=type(model).__name__,
        name=name,
        tokens=max((site.tokens if site.experts is None else 0 for site in sites), default=0) or _routed(sites),
        sites=tuple(sites),
        note="" if batches else "weights alone: no text was run, so nothing is said of what the gates do",
    )


def _routed(sites: Sequence[SiteGates]) -> int:
    return max((sum(site.experts or ()) for site in sites), default=0)


def _chosen(model: nn.Module, layers: Layers) -> tuple[Place, ...]:
    found = places(model)
    if not found:
        raise NoSitesError(f"{type(model).__name__} has no FFN block to look at")
    selected = {site.up for site in select([place.site for place in found], layers)}
    return tuple(place for place in found if place.site.up in selected)


def _run(
    model: nn.Module,
    chosen: Sequence[Place],
    batches: Sequence[Inputs],
    take: Callable[[Place, Heard], None],
    step: Callable[[], None],
) -> dict[str, str]:
    with listening(model, chosen, take) as ear, evaluating(model), torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            ear.mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
            with torch.random.fork_rng(devices=[]):
                model(**cast(batch, model))
            step()
    return ear.unheard


def _known(place: Place) -> dict[str, Any]:
    """What is known of a block before anything is measured."""
    site = place.site
    return {
        "path": site.up,
        "layer": site.layer,
        "kind": site.kind,
        "layout": site.layout,
        "activation": site.activation,
        "width": site.width,
        "unit": place.unit,
    }


def _stack(place: Place, heard: ExpertsPass) -> SiteGates:
    return SiteGates(
        **_known(place),
        reasons=("experts in one parameter: the gates of routed tokens only; no norms, duplicates or shares",),
        **heard.facts(),
    )


def _site(model: nn.Module, place: Place, second: SecondPass | None, reasons: list[str]) -> SiteGates:
    site = place.site
    facts, neurons = _from_weights(model, place)
    if neurons is None and not reasons:
        reasons.append("its weights cannot be read (quantised, offloaded, or experts in one parameter)")
    if second is not None:
        first = second.first
        shares = second.shares()
        duplicates, pairs = second.duplicates()
        if shares is None and site.layout != "dense":
            reasons.append("something stands between the unit and its down projection: shares are not measured")
        closed_F = first.closed_F.double() / first.tokens
        histogram = first.histogram.counts_FB.sum(0, dtype=torch.float64)
        facts |= {
            "tokens": first.tokens,
            "closed": closed_F.mean().item(),
            "dead": int((first.closed_F == first.tokens).sum()),
            "duplicates": duplicates,
            "pairs": pairs,
            "value_share": None if shares is None else shares[0],
            "gate_share": None if shares is None else shares[1],
            "histogram": (histogram / histogram.sum()).float(),
        }
        neurons = _with_tokens(neurons, place, first, closed_F)
    return SiteGates(
        **_known(place),
        reasons=tuple(reasons),
        neurons=neurons,
        **facts,
    )


def _from_weights(model: nn.Module, place: Place) -> tuple[dict[str, Any], Neurons | None]:
    gate_FD, value_FD, down_F = gate_rows(model, place), value_rows(model, place), down_columns(model, place)
    if gate_FD is None or down_F is None:
        return {}, None
    gate_norm_F = gate_FD.norm(dim=1)
    size = gate_FD.double().norm().clamp_min(1e-300)
    facts: dict[str, Any] = {"empty": int((down_F == 0).sum())}
    value: dict[str, Any] = {}
    if value_FD is not None:
        value["value_norm"] = value_FD.norm(dim=1)
        facts["value_over_gate"] = (value_FD.double().norm() / size).item()
    if value_FD is not None and place.start is not None:
        # act(z) = f(a z) (alpha z + beta): the value started at alpha/a of the gate's rows
        away_FD = value_FD - gate_FD * (place.start.alpha / place.start.a)
        value["learned"] = away_FD.norm(dim=1) / gate_norm_F.clamp_min(1e-30)
        facts["learned"] = (away_FD.double().norm() / size).item()
        constants_F = value_constants(model, place)
        if place.start.beta and constants_F is not None:
            value["constant"] = constants_F / _as_stored(place.start.beta, model, place) - 1.0
            facts["constant"] = value["constant"].double().square().mean().sqrt().item()
    return facts, Neurons(gate_norm=gate_norm_F, down_norm=down_F, twin=nearest_cosine(gate_FD), **value)


def _as_stored(beta: float, model: nn.Module, place: Place) -> float:
    """The start as the model's dtype has it: what was rounded then is no departure now."""
    dtype = model.get_submodule(place.site.up).weight.dtype
    return torch.tensor(beta, dtype=dtype).item()  # type: ignore[arg-type]


def _with_tokens(neurons: Neurons | None, place: Place, first: FirstPass, closed_F: torch.Tensor) -> Neurons | None:
    if neurons is None:
        return None
    energy_F = first.hidden.variance_F.cpu() * neurons.down_norm.double().square()
    value: Mapping[str, torch.Tensor] = {}
    if first.value.count:
        value = {"value_mean": first.value.mean_F, "value_std": first.value.variance_F.sqrt()}
    measured = {
        "mean": first.gate.mean_F,
        "std": first.gate.variance_F.sqrt(),
        "low": first.histogram.quantile_F(0.05),
        "median": first.histogram.quantile_F(0.5),
        "high": first.histogram.quantile_F(0.95),
        "closed": closed_F,
        "contribution": energy_F / energy_F.sum().clamp_min(1e-300),
        **value,
    }
    return replace(neurons, **{key: tensor.float().cpu() for key, tensor in measured.items()})


def _beside(report: GateReport, earlier: GateReport, model: nn.Module, before: nn.Module, layers: Layers) -> GateReport:
    """With how far the weights have moved."""
    now, then = _chosen(model, layers), _chosen(before, layers)
    if [place.site.width for place in now] != [place.site.width for place in then]:
        raise SelectionError(
            f"{len(then)} blocks before and {len(now)} now, or of other widths; expected the same model from before "
            "and after a training (or before and after its conversion)"
        )
    sites = []
    for site, place, old in zip(report.sites, now, then, strict=True):
        gate = _moved(gate_rows(model, place), gate_rows(before, old))
        value = _moved(value_rows(model, place), value_rows(before, old))
        sites.append(replace(site, moved_gate=gate, moved_value=value))
    return replace(report, sites=tuple(sites), before=earlier)


def _moved(now_FD: torch.Tensor | None, then_FD: torch.Tensor | None) -> float | None:
    if now_FD is None or then_FD is None or now_FD.shape != then_FD.shape:
        return None
    away, size = (now_FD - then_FD).double().norm().item(), then_FD.double().norm().item()
    return away / size if size else (float("inf") if away else 0.0)
