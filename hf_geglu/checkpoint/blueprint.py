"""The decision for a whole checkpoint: what becomes of each stored tensor. Reads headers, and tensors only where two
may be tied; writes none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_geglu.checkpoint.described import build, read_config, resolve_dtype
from hf_geglu.checkpoint.holdings import held, lacking, tied
from hf_geglu.checkpoint.layout import Change, Output
from hf_geglu.checkpoint.merged import Merged, merges
from hf_geglu.checkpoint.rules import (
    arrivals,
    loaded_dtypes,
    note_generation,
    parts_of,
    save_without_weights,
    saving_order,
)
from hf_geglu.checkpoint.stored import Stored, Zeros
from hf_geglu.conversions import Rewrite, rewrites
from hf_geglu.declaration import declare_config, site_entry
from hf_geglu.errors import PlanError, WeightsError
from hf_geglu.modeling_geglu import set_config_entry, variant_model_class
from hf_geglu.plan import GeluForm, Plan
from hf_geglu.planning import make_plan
from hf_geglu.selection import Layers
from hf_geglu.sites import GivenSite, find_sites
from hf_geglu.sites.weights import weight_name
from hf_geglu.skeleton import skeleton
from hf_geglu.surgery import Fits, check_fits

Loaded = Callable[[str, torch.dtype], torch.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a caller asked for; see `convert_checkpoint`."""

    plan: Plan | None
    variant: str
    layers: Layers
    gelu: GeluForm
    sites: Sequence[GivenSite] | None
    dtype: str | torch.dtype
    model_class: Any
    trust_remote_code: bool
    fits: Fits = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """The decision."""

    plan: Plan
    base: nn.Module
    """The model as it is, without weights."""
    variant: nn.Module
    """The model as it will be, without weights, of the class that will load it."""
    outputs: tuple[Output, ...]
    """What will be written, in the order of saving."""
    parameters: Mapping[str, Stored]
    """Parameter of `base` -> the stored tensor that it is. Merged ones are left out."""
    names: Mapping[str, str]
    """Parameter of `variant` -> what it is saved as. Merged ones are left out."""
    dropped: tuple[str, ...]
    """Stored tensors that the class has no use for, as `from_pretrained` drops them."""
    absent: tuple[str, ...]
    """Parameters that the checkpoint does not hold: heads and poolers that loading makes up, before and after."""
    tied: Mapping[str, str]
    """Parameter that shares its numbers with others -> the one that speaks for them."""
    merged: tuple[Merged, ...]
    """Parameters that are put together from several stored tensors."""
    dtype: torch.dtype
    """That the checkpoint is loaded in."""
    fits: Fits
    """What the plan's fits are made of."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """A parameter that changes, and the weight it lies beside (itself, for a weight)."""

    rewrite: Rewrite
    weight: str


def draw(folder: Path, stored: Sequence[Stored], wish: Wish, *, papers: Path) -> Blueprint:
    """Decide everything, and write config, generation config and modelling code into `papers`.

    Raises:
        HfGegluError: whatever stands in the way; see `convert_checkpoint`.
    """
    config = read_config(folder, stored, trust_remote_code=wish.trust_remote_code)
    dtype = resolve_dtype(config, wish.dtype, stored)
    base = build(config, wish.model_class, stored, trust_remote_code=wish.trust_remote_code)
    goes = arrivals(base, [tensor.name for tensor in stored])
    parameters = held(base, stored, goes)
    merged = merges(base, stored, goes)
    same = tied(base, parameters)
    absent = lacking(base, {*parameters, *same, *(name for group in merged for name in group.parameters)})
    plan = _plan(base, wish)
    check_fits(plan, wish.fits)
    changes = _changes(base, plan, wish.fits)
    variant = _variant(base, plan, folder)
    new = [name for name, planned in changes.items() if not planned.rewrite.present]
    names = save_without_weights(variant, papers, same, dict.fromkeys([*parameters, *same, *new]))
    outputs = _outputs(stored, parameters, same, names, changes, loaded_dtypes(base, dtype))
    outputs |= _merged_outputs(base, merged, changes, loaded_dtypes(base, dtype))
    inverse = {parameter: name for name, parameter in names.items()}
    parts = {group.first: _parts(variant, group) for group in merged}
    order = [
        name for parameter in saving_order(variant) for name in (inverse.get(parameter), *parts.get(parameter, ()))
    ]
    listed = tuple(outputs[name] for name in order if name is not None)
    _check_arrival(variant, listed, inverse, same)
    return Blueprint(
        plan=plan,
        base=base,
        variant=variant,
        outputs=listed,
        parameters=parameters,
        names=inverse,
        dropped=tuple(tensor.name for tensor in stored if tensor.name not in goes),
        absent=absent,
        tied=same,
        merged=merged,
        dtype=dtype,
        fits=wish.fits,
    )


def _plan(base: nn.Module, wish: Wish) -> Plan:
    plan = wish.plan
    if plan is None:
        found = None if wish.sites is None else find_sites(base, sites=wish.sites)
        plan = make_plan(base, wish.variant, layers=wish.layers, gelu=wish.gelu, found=found)
    elif (wish.variant, wish.layers, wish.gelu, wish.sites) != ("geglu", None, "owner", None):
        raise PlanError("a plan and its settings were both given; put variant, layers, gelu and sites into make_plan")
    kind = type(base).__name__
    if plan.model_class != kind:
        raise PlanError(f"the plan is for a {plan.model_class}, but the checkpoint opens as {kind}; make a new one")
    if plan.refused:
        listed = "; ".join(f"{entry.path}: {entry.reason}" for entry in plan.refused)
        raise PlanError(f"{len(plan.refused)} selected FFN blocks cannot be converted: {listed}")
    if plan.narrows:
        raise PlanError(
            "this plan makes blocks narrower, which takes the weights of whole blocks; convert in memory: "
            "hf_geglu.convert(model, width=..., calibration=...), then save_folder"
        )
    if plan.tier == "in-memory":
        raise PlanError(f"this conversion cannot be saved: {plan.tier_reason}")
    return plan


def _changes(base: nn.Module, plan: Plan, fits: Fits) -> dict[str, _Planned]:
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    found = {}
    for entry in plan.converted:
        weight = weight_name(entry.site.up, entry.site.projection)
        try:
            for rewrite in rewrites(entry.site, fits.get(entry.site.up, entry.scaling), shapes):
                found[rewrite.name] = _Planned(rewrite, rewrite.name if rewrite.present else weight)
        except KeyError as error:
            raise PlanError(f"the plan names {error}, which this checkpoint does not have; make a new plan") from error
    return found


def _variant(base: Any, plan: Plan, folder: Path) -> Any:
    """The model as it will be: config and class as surgery on a live model would set them."""
    config, model_class = copy.deepcopy(base.config), type(base)
    if plan.tier == "native":
        for key, value in plan.config_changes.items():
            set_config_entry(config, key, value)
    else:
        declare_config(config, type(base), [site_entry(entry, base) for entry in plan.converted], plan)
        model_class = variant_model_class(type(base), type(base.config))
    variant: Any = skeleton(config, model_class)
    if hasattr(base, "_weight_conversions"):  # saving undoes what loading did
        variant._weight_conversions = base._weight_conversions
    note_generation(variant, folder)
    return variant


def _outputs(
    stored: Sequence[Stored],
    parameters: Mapping[str, Stored],
    same: Mapping[str, str],
    names: Mapping[str, str],
    changes: Mapping[str, _Planned],
    loaded: Loaded,
) -> dict[str, Output]:
    """What is written of the parameters that are one stored tensor each, and of biases that are new."""
    outputs = {}
    for name, parameter in names.items():
        planned = changes.get(parameter)
        if planned is not None and not planned.rewrite.present:
            weight = parameters.get(planned.weight)
            if weight is None:
                raise WeightsError(
                    f"{planned.weight} is not stored as one tensor, so {parameter} has no place beside it"
                )
            dtype = loaded(planned.weight, weight.dtype)
            source: Stored = Zeros(name=weight.name, file=weight.file, dtype=dtype, shape=planned.rewrite.old_shape)
        else:
            source = parameters[parameter if parameter in parameters else same[parameter]]
            dtype = loaded(parameter, source.dtype)
        outputs[name] = Output(
            name=name,
            dtype=dtype,
            shape=source.shape if planned is None else planned.rewrite.new_shape,
            source=source,
            cast=dtype,
            change=None if planned is None else _change(planned.rewrite),
        )
    return outputs


def _change(rewrite: Rewrite) -> Change:
    return Change(rewrite.function, rewrite.dim, rewrite.rows)


def _merged_outputs(
    base: nn.Module, merged: Sequence[Merged], changes: Mapping[str, _Planned], loaded: Loaded
) -> dict[str, Output]:
    """What is written of parameters that are stored in parts: the parts, under their own names, as saving would."""
    outputs = {}
    for group in merged:
        touched = [group.changes(changes[name].rewrite, base) for name in group.parameters if name in changes]
        for part in group.parts:
            found = [of_parts[part.name] for of_parts in touched if part.name in of_parts]
            if len(found) > 1:
                raise PlanError(
                    f"{part.name} is part of two parameters that change; leave that layer out with `layers=`"
                )
            cast = loaded(group.first, part.dtype)
            outputs[part.name] = Output(
                name=part.name,
                dtype=cast,
                shape=part.shape,
                source=part,
                cast=cast,
                change=found[0] if found else None,
            )
    return outputs


def _parts(variant: nn.Module, group: Merged) -> list[str]:
    """The names of a group's tensors, in the order of saving. Raises PlanError where saving would make others of it."""
    names = parts_of(variant, group.parameters)
    if sorted(names) != sorted(part.name for part in group.parts):
        raise PlanError(
            f"{group.first} is stored in {len(group.parts)} tensors, but {type(variant).__name__} would be saved with "
            f"{len(names)} of other names; convert in memory: hf_geglu.from_pretrained(...), then save_pretrained"
        )
    return names


def _check_arrival(variant: Any, outputs: Sequence[Output], names: Mapping[str, str], same: Mapping[str, str]) -> None:
    """What will be written is what the variant's class will read: each name arrives at its parameter, in its shape."""
    used = getattr(variant, "_weight_conversions", None)
    goes = arrivals(variant, [output.name for output in outputs])
    if used is not None:
        variant._weight_conversions = used
    parameters = {name: parameter for parameter, name in names.items()}
    known = variant.state_dict()
    for output in outputs:
        arrival = goes.get(output.name)
        wanted = parameters.get(output.name)
        reached = None if arrival is None else same.get(arrival.parameter, arrival.parameter)
        if reached is None or (wanted is not None and same.get(wanted, wanted) != reached):
            raise PlanError(
                f"{output.name} would be read as {reached or 'nothing'}, not as {wanted or 'a part'}, by "
                f"{type(variant).__name__}; convert in memory: hf_geglu.from_pretrained(...), then save_pretrained"
            )
        if wanted is not None and tuple(known[wanted].shape) != output.shape:
            raise PlanError(
                f"{output.name} would have the shape {output.shape}, {type(variant).__name__} has "
                f"{tuple(known[wanted].shape)}; please report this with the model's name"
            )
