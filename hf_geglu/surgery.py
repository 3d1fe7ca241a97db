"""Installs what a plan says in a live model, all or nothing, and takes it out again.

Every change goes through an `Undo` record, which lives on the model until `revert`. What another model shares with
this one is not touched: a converted model gets a config of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers.activations import ACT2FN

from hf_geglu.conversions import Coefficients, Line, NewWeights, rewrites, scale_at_run_time
from hf_geglu.conversions.precision import all_finite
from hf_geglu.declaration import declare_config, site_entry, unit_settings
from hf_geglu.errors import PlanError, SurgeryError, WeightsError
from hf_geglu.modeling_geglu import (
    PackedGLU,
    ScaledActivation,
    expose_activation,
    get_attribute,
    set_attribute,
    set_config_entry,
    variant_model_class,
    widen,
)
from hf_geglu.plan import Plan, SitePlan
from hf_geglu.sites import Site
from hf_geglu.sites.weights import is_stack, parameters_of, weight_name

_UNDO = "_hf_geglu_undo"

Fits = Mapping[str, Coefficients | NewWeights]
"""What a plan's fits are made of, by the `up` of their sites."""


@dataclass(slots=True, kw_only=True)
class Steps:
    """How to put a model back."""

    steps: list[Callable[[], None]] = field(default_factory=list)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copied or pickled model comes without its originals: the steps would undo this one, not the copy."""
        return type(None), ()

    def roll_back(self) -> None:
        """Undo every step, the last one first."""
        while self.steps:
            self.steps.pop()()


@dataclass(slots=True, kw_only=True)
class Undo(Steps):
    """The steps back from a conversion, and what its sites were made of before, for the verification."""

    plan: Plan
    fits: Fits = field(default_factory=dict)
    parameters: dict[str, nn.Parameter | None] = field(default_factory=dict)
    """The original of every parameter that changed, by name; None for one that was not there."""
    activations: dict[str, Any] = field(default_factory=dict)
    """The original activation of every site, by its `up`."""
    originals: dict[str, Any] = field(default_factory=dict)
    installed: dict[str, tuple[bool, str]] = field(default_factory=dict)

    def line(self, entry: SitePlan) -> Line:
        """What was folded into a site: its fit, or the row of the table that the plan names."""
        return self.fits.get(entry.site.up, entry.scaling)


def applied(model: nn.Module) -> Undo | None:
    """The record of the conversion that `model` carries, None for a model that was not converted in this process."""
    last = last_record(model)
    return last if isinstance(last, Undo) else None


def last_record(model: nn.Module) -> Steps | None:
    """The record of the last change, which `revert` undoes: of a conversion, or of what followed it."""
    return model.__dict__.get(_UNDO)


def record(model: nn.Module, steps: Steps) -> None:
    """Keep a record on the model, for `revert`; one that is there already comes back when this one is undone."""
    before = model.__dict__.get(_UNDO)
    if before is not None:
        steps.steps.insert(0, lambda: model.__dict__.__setitem__(_UNDO, before))
    model.__dict__[_UNDO] = steps


def apply(model: nn.Module, plan: Plan, fits: Fits | None = None) -> Undo:
    """Carry out `plan` on `model`, in place. An error half way leaves the original model.

    Args:
        model: that the plan was made for.
        plan: what to do.
        fits: the numbers of those sites whose plan has a `fit`.

    Raises:
        SurgeryError: the model is converted already, or has no weights (meta device).
        PlanError: the plan was made for another model, or refuses a selected site, or fits are missing.
        WeightsError: NaN or infinite weights.
    """
    _check(model, plan)
    check_fits(plan, fits or {})
    undo = Undo(plan=plan, fits=fits or {})
    try:
        for entry in plan.converted:
            _install(model, entry, undo)
        if plan.converted:
            _declare(model, plan, undo)
    except BaseException:
        undo.roll_back()
        raise
    record(model, undo)
    return undo


@contextmanager
def installed(model: nn.Module, plan: Plan, fits: Fits, *, paths: Callable[[str], bool]) -> Iterator[None]:
    """Some blocks of a plan are converted inside, and nothing else: config and class stay as they are.

    Args:
        model: of which those blocks have their weights.
        plan: what to do.
        fits: see `apply`.
        paths: which blocks, by the `up` of their sites.
    """
    undo = Undo(plan=plan, fits=fits)
    try:
        for entry in plan.converted:
            if paths(entry.site.up):
                _install(model, entry, undo)
        yield
    finally:
        undo.roll_back()


def _install(model: nn.Module, entry: SitePlan, undo: Undo) -> None:
    _expose_activation(model, entry.site, undo)
    _rewrite_parameters(model, entry, undo)
    _replace_activation(model, entry, undo)


def revert(model: nn.Module) -> None:
    """Put a model back as it was before the last `convert` or `collapse`, bit for bit: modules, weights, class, config.

    What was trained since at the converted sites is dropped; parameters outside them stay as they are now.

    Raises:
        SurgeryError: the model was not converted in this process (a loaded variant carries no original).
    """
    undo = model.__dict__.pop(_UNDO, None)
    if undo is None:
        raise SurgeryError(
            f"this {type(model).__name__} was not converted in this process, so there is nothing to put back; the "
            "original "
            "is the base model that its config or card names"
        )
    undo.roll_back()


def forget_original(model: nn.Module) -> None:
    """Give up `revert` and free the original weights that it keeps."""
    model.__dict__.pop(_UNDO, None)


def _check(model: nn.Module, plan: Plan) -> None:
    if applied(model) is not None or hasattr(getattr(model, "config", None), "geglu"):
        raise SurgeryError(
            f"this {type(model).__name__} is a GeGLU variant already; call hf_geglu.revert(model) first, or load the "
            "base model"
        )
    if plan.refused:
        listed = "; ".join(f"{entry.path}: {entry.reason}" for entry in plan.refused)
        raise PlanError(f"{len(plan.refused)} selected FFN blocks cannot be converted: {listed}")
    if plan.model_class != type(model).__name__:
        raise PlanError(
            f"the plan was made for a {plan.model_class}, but this is a {type(model).__name__}; make a new one"
        )
    for entry in plan.sites:
        for path in (entry.site.gate, entry.site.up, entry.site.down):
            module = path.rpartition(".")[0] if is_stack(entry.site.projection) else path
            try:
                get_attribute(model, path)
            except AttributeError as error:
                raise PlanError(f"the plan names {path!r}, which this model does not have; make a new plan") from error
            if hasattr(model.get_submodule(module), "_hf_hook"):
                raise SurgeryError(
                    f"{path} is dispatched by accelerate (device_map), which runs the module it was loaded with; "
                    "load without device_map, convert, save, and load the variant with device_map"
                )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SurgeryError(
                f"{name} is on the meta device and has no weights; load them first (where they are offloaded: load "
                "without device_map)"
            )
        if parameter.is_floating_point() and not all_finite(parameter.detach()):
            raise WeightsError(
                f"{name} holds NaN or infinite values; nothing was converted. Check where the checkpoint comes from, "
                "or the dtype it was loaded in"
            )


def check_fits(plan: Plan, fits: Fits) -> None:
    """Raise PlanError unless every fitted site of the plan has its tensors, and no other site has any."""
    wanted = {entry.site.up: entry for entry in plan.converted if entry.fitted}
    missing = [path for path in wanted if path not in fits]
    if missing:
        raise PlanError(
            f"{len(missing)} sites of this plan were fitted to calibration data, {missing[0]} first, and a plan holds "
            "no tensors; hand in the fits that belong to it (a saved variant keeps them beside its manifest), or "
            "calibrate again: convert(model, calibration=...)"
        )
    for path, fit in fits.items():
        if path not in wanted:
            raise PlanError(f"there is a fit for {path}, which the plan converts without one; expected one plan's fits")
        if (fit.width or wanted[path].site.width) != wanted[path].width:
            raise PlanError(f"the fit of {path} has {fit.width} neurons, the plan says {wanted[path].width}")


def _rewrite_parameters(model: nn.Module, entry: SitePlan, undo: Undo) -> None:
    """New parameters for one site, each computed by its pure function."""
    site = entry.site
    parameters = parameters_of(model, site, down=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    changes = rewrites(site, undo.line(entry), shapes)
    if entry.conversion == "expand" and not is_stack(site.projection):
        up = model.get_submodule(site.up)
        _replace(model, site.up, widen(up, entry.width), undo)
    if entry.width != site.width:
        _resize(model, site.down, "in", entry.width, undo)
        outputs = entry.width if site.layout == "separate" else 2 * entry.width
        for path in dict.fromkeys((site.gate, site.up)) if site.gated else ():
            _resize(model, path, "out", outputs, undo)
    weight = parameters[weight_name(site.up, site.projection)]
    for change in changes:
        old = parameters.get(change.name)
        given = weight.new_zeros(change.old_shape) if old is None else old.detach()
        new = nn.Parameter(change.function(given), requires_grad=(weight if old is None else old).requires_grad)
        undo.parameters[change.name] = old
        _replace(model, change.name, new, undo)


def _resize(model: nn.Module, path: str, end: Literal["in", "out"], width: int, undo: Undo) -> None:
    """A copy of a projection that says it has another width at that end; its parameters follow."""
    original = model.get_submodule(path)
    module = copy.copy(original)
    for name, value in vars(original).items():
        if isinstance(value, dict):  # its own parameters and hooks, so that the original keeps what it has
            vars(module)[name] = value.copy()
    for name in ("in_features", "nx") if end == "in" else ("out_features", "nf"):  # nn.Linear, and GPT-2's Conv1D
        if hasattr(module, name):
            setattr(module, name, width)
    _replace(model, path, module, undo)


def _expose_activation(model: nn.Module, site: Site, undo: Undo) -> None:
    """Where `forward` calls a function, give it the attribute that is then exchanged."""
    if site.activation_call is None:
        return
    assert site.activation_path is not None
    path, _, name = site.activation_path.rpartition(".")
    module = model.get_submodule(path)
    kind = type(module)
    if hasattr(module, name):  # two blocks of one layer go through one call
        return

    def conceal() -> None:
        delattr(module, name)
        module.__class__ = kind

    expose_activation(module, site.activation_call)
    undo.steps.append(conceal)


def _replace_activation(model: nn.Module, entry: SitePlan, undo: Undo) -> None:
    path, packed = entry.site.activation_path, entry.conversion == "expand"
    assert path is not None
    if path in undo.installed:  # two blocks of one layer go through one attribute
        if undo.installed[path] != (packed, entry.scaling.gate):
            raise PlanError(
                f"{path} serves two FFN blocks that need different activations; leave one out with `layers=`"
            )
        undo.activations[entry.site.up] = undo.originals[path]
        return
    if any(left.path != entry.site.up and left.activation_path == path for left in undo.plan.unselected):
        raise PlanError(
            f"{path} serves two FFN blocks, of which only one is selected; select both or none with `layers=`"
        )
    original = get_attribute(model, path)
    gate = original if entry.keeps_activation else ACT2FN[entry.scaling.gate]
    scale = scale_at_run_time(entry.site, entry.scaling)
    replacement = ScaledActivation(gate, *scale) if scale is not None else gate
    if packed:
        replacement = PackedGLU(gate, **unit_settings(entry))
    if isinstance(replacement, nn.Module) and replacement is not original:
        # the flag alone, not .train(): the kept activation inside has its own mode already
        replacement.training = original.training if isinstance(original, nn.Module) else model.training
    undo.activations[entry.site.up] = undo.originals[path] = original
    undo.installed[path] = (packed, entry.scaling.gate)
    _replace(model, path, replacement, undo)


def _replace(model: nn.Module, path: str, new: Any, undo: Undo) -> None:
    old = get_attribute(model, path)
    undo.steps.append(lambda: set_attribute(model, path, old))
    set_attribute(model, path, new)


def _declare(model: nn.Module, plan: Plan, undo: Undo) -> None:
    """Make the model say what it is: its config, and for the portable tier its class."""
    if plan.tier == "in-memory":
        _forbid_saving(model, plan, undo)
        return
    old_config: Any = model.config
    memo: dict[int, Any] = {}
    new_config = copy.deepcopy(old_config, memo)
    for key, value in plan.config_changes.items():
        set_config_entry(new_config, key, value)
    if plan.tier == "portable":
        base_class, base_config = type(model), type(old_config)
        declare_config(new_config, base_class, [site_entry(entry, model) for entry in plan.converted], plan)
        undo.steps.append(lambda: setattr(model, "__class__", base_class))
        model.__class__ = variant_model_class(base_class, base_config)
    share_config(model, memo, undo)


def _forbid_saving(model: nn.Module, plan: Plan, undo: Undo) -> None:
    """What no config describes would be saved as if it were the base model, and might even load."""
    if not hasattr(model, "save_pretrained"):
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise SurgeryError(f"this conversion cannot be saved: {plan.tier_reason}")

    undo.steps.append(lambda: delattr(model, "save_pretrained"))
    object.__setattr__(model, "save_pretrained", refuse)


def share_config(model: nn.Module, memo: dict[int, Any], undo: Steps) -> None:
    """Every submodule that held the old config (or a nested one) holds its copy; other models keep the old one."""
    for module in model.modules():
        old = module.__dict__.get("config")
        new = memo.get(id(old))
        if new is not None:
            undo.steps.append(lambda module=module, old=old: module.__dict__.__setitem__("config", old))  # type: ignore[misc]
            module.__dict__["config"] = new
