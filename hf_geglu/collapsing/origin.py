"""What each converted block was before: from the record of a conversion in this process, or from the base class, which
is built again without weights and looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_geglu.collapsing.config import base_class_of, base_config
from hf_geglu.conversions import Coefficients, NewWeights, Scaling, find_scaling
from hf_geglu.errors import SurgeryError
from hf_geglu.modeling_geglu import get_attribute, located_sites
from hf_geglu.sites import Site, find_sites
from hf_geglu.sites.weights import bias_name, parameters_of
from hf_geglu.skeleton import skeleton
from hf_geglu.surgery import Steps, Undo, last_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A dense block that was expanded. Paths are those of the model as it is."""

    site: Site
    """The block as it was."""
    scaling: Scaling
    """What was folded in."""
    activation: Any
    """Its activation: the very object where it is known. None: what serves as the gate's now is it."""
    biased: bool
    """Whether its up projection had a bias of its own; an expanded one always has."""
    parameters: dict[str, nn.Parameter | None] = field(default_factory=dict)
    """The originals that changed, where this process has them; of a fitted block the down projection's too."""
    fit: Coefficients | NewWeights | None = None
    """What was folded in instead of `scaling`, where it was fitted to activations."""
    index: int | None = None
    """Of its entry in ``config.geglu["sites"]``, where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """A converted block for which there is no way back whatever its weights are, and why."""

    path: str
    block: str
    reason: str


@dataclass(slots=True, kw_only=True)
class Collapsed(Steps):
    """The steps back from a collapse, and what is left of the conversion before it."""

    conversion: Undo | None
    gone: frozenset[str]
    """The `up` of each site of that conversion that is dense again."""


_GATED = "it was gated before the conversion too; its class has no dense form of it"


def origins(model: nn.Module) -> tuple[tuple[Origin, ...], tuple[Stuck, ...]]:
    """Every converted block of a variant: what it was, or why it cannot be that again.

    Raises:
        SurgeryError: the model is no variant whose blocks were expanded.
    """
    last = last_record(model)
    conversion = last if isinstance(last, Undo) else last.conversion if isinstance(last, Collapsed) else None
    if conversion is not None:
        gone = last.gone if isinstance(last, Collapsed) else frozenset()
        found = list(_recorded(model, conversion, gone))
    elif hasattr(getattr(model, "config", None), "geglu"):
        found = list(_rebuilt(model))
    else:
        found = []
    if not found:
        raise SurgeryError(
            f"this {type(model).__name__} has no block that hf_geglu expanded; expected a variant that was converted "
            "in this process, or a portable one that was loaded (its config has an entry `geglu`). A native variant "
            "was gated from the start"
        )
    return (
        tuple(each for each in found if isinstance(each, Origin)),
        tuple(each for each in found if isinstance(each, Stuck)),
    )


def _recorded(model: nn.Module, undo: Undo, gone: frozenset[str]) -> Iterator[Origin | Stuck]:
    geglu = getattr(getattr(model, "config", None), "geglu", None) or {}
    indices = {entry["up"]: index for index, entry in enumerate(geglu.get("sites", ()))}
    for entry in undo.plan.converted:
        site = entry.site
        if site.up in gone:
            continue
        if entry.conversion != "expand":
            yield Stuck(path=site.up, block=site.block, reason=_GATED)
            continue
        bias = bias_name(site.up, site.projection)
        line = undo.line(entry)
        held = {name: undo.parameters[name] for name in undo.parameters if name in _names(model, site)}
        yield Origin(
            site=site,
            scaling=entry.scaling,
            fit=None if isinstance(line, Scaling) else line,
            activation=None if site.activation_call is not None else undo.activations[site.up],
            biased=held.get(bias) is not None,
            parameters=held,
            index=indices.get(site.up),
        )


def _names(model: nn.Module, site: Site) -> set[str]:
    return {*parameters_of(model, site, down=True), bias_name(site.up, site.projection)}


def _rebuilt(model: nn.Module) -> Iterator[Origin | Stuck]:
    config: Any = model.config
    twin = skeleton(base_config(config), base_class_of(model))
    found = find_sites(twin).sites
    by_up = {site.up: site for site in found}
    for entry in located_sites(model, [{**entry, "index": index} for index, entry in enumerate(config.geglu["sites"])]):
        if entry["up"] is None:
            yield Stuck(path=entry["activation"], block=entry["activation"].rpartition(".")[0], reason=_GATED)
            continue
        if entry.get("fitted"):
            yield Stuck(
                path=entry["up"],
                block=entry["up"].rpartition(".")[0],
                reason="its conversion was fitted to activations, and only the process that converts it knows the base",
            )
            continue
        site = by_up.get(entry["up"])
        if site is None or site.gated or site.activation_path != entry["activation"]:
            yield Stuck(
                path=entry["up"],
                block=entry["up"].rpartition(".")[0],
                reason=f"no dense block is found there in {type(twin).__name__}, so it is not known what it was (it "
                "may have been named by hand); collapse it in the process that converts it",
            )
            continue
        yield Origin(
            site=site,
            scaling=find_scaling(site.activation, entry["gate"] or site.activation, gated=False),
            activation=None if entry["gate"] is None or "call" in entry else get_attribute(twin, entry["activation"]),
            biased=bias_name(site.up, site.projection) in parameters_of(twin, site),
            index=entry["index"],
        )
