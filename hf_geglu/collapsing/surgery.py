"""Makes blocks of a live model dense again, all or nothing, and takes it back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_geglu.collapsing.config import base_class_of, collapsed_config
from hf_geglu.collapsing.judge import Verdict, down_port
from hf_geglu.collapsing.origin import Collapsed
from hf_geglu.conversions import collapse, scale_neurons
from hf_geglu.conversions.precision import all_finite
from hf_geglu.errors import SurgeryError, WeightsError
from hf_geglu.modeling_geglu import EXPOSED, WIDTH_NAMES, get_attribute, set_attribute
from hf_geglu.sites import Site
from hf_geglu.sites.projections import Form
from hf_geglu.sites.weights import bias_name, is_stack, output_dim, parameters_of, weight_name
from hf_geglu.surgery import Undo, last_record, record, share_config


def refuse_unready(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise where the model has no weights to look at, or runs other modules than it shows.

    Raises:
        SurgeryError: weights are on the meta device, or accelerate dispatches a block.
        WeightsError: NaN or infinite weights.
    """
    for path in paths:
        owner = model.get_submodule(path if _is_module(model, path) else path.rpartition(".")[0])
        if hasattr(owner, "_hf_hook"):
            raise SurgeryError(
                f"{path} is dispatched by accelerate (device_map), which runs the module it was loaded with; load "
                "without device_map, collapse, save, and load the result with device_map"
            )
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                raise SurgeryError(f"{path}.{name} is on the meta device and has no weights; load them first")
            if parameter.is_floating_point() and not all_finite(parameter.detach()):
                raise WeightsError(f"{path}.{name} holds NaN or infinite values; nothing was changed")


def _is_module(model: nn.Module, path: str) -> bool:
    return isinstance(get_attribute(model, path), nn.Module)


def apply(model: nn.Module, verdicts: Sequence[Verdict], *, whole: bool) -> Collapsed:
    """Install the dense blocks. An error half way leaves the model as it was.

    Args:
        model: a variant.
        verdicts: of the blocks that collapse.
        whole: no converted block stays.

    Returns:
        The record that `hf_geglu.revert` goes back by; it is on the model.
    """
    last = last_record(model)
    conversion = last if isinstance(last, Undo) else last.conversion if isinstance(last, Collapsed) else None
    before = last.gone if isinstance(last, Collapsed) else frozenset()
    steps = Collapsed(conversion=conversion, gone=before | {verdict.origin.site.up for verdict in verdicts})
    try:
        for verdict in verdicts:
            _rewrite(model, verdict, steps)
        for verdict in {verdict.origin.site.activation_path: verdict for verdict in verdicts}.values():
            _restore_activation(model, verdict, steps)
        _redeclare(model, verdicts, whole=whole, steps=steps)
    except BaseException:
        steps.roll_back()
        raise
    record(model, steps)
    return steps


def _rewrite(model: nn.Module, verdict: Verdict, steps: Collapsed) -> None:
    origin, site = verdict.origin, verdict.origin.site
    assert not hasattr(verdict.decision, "reason")
    parameters = parameters_of(model, site)
    dense: dict[str, nn.Parameter | None]
    if origin.fit is not None:
        dense = {name: old for name, old in origin.parameters.items() if old is not None or name in parameters}
    else:
        dense = {name: dense_parameter(parameter, name, verdict) for name, parameter in parameters.items()}
    if not is_stack(site.projection):
        _replace(model, site.up, _narrowed(model.get_submodule(site.up), site.width), steps)
    for name, parameter in dense.items():
        if parameter is None and is_stack(site.projection):
            _drop(model, name, steps)
        else:
            _replace(model, name, parameter, steps)
    if verdict.factors is not None:
        name = weight_name(site.down, site.projection)
        old = model.get_parameter(name)
        port = down_port(model, site)
        form, groups = (_form(old, site), 1) if port is None else (port.form, port.groups)
        scaled = scale_neurons(old, verdict.factors.to(old.device), form, groups=groups)
        _replace(model, name, nn.Parameter(scaled, requires_grad=old.requires_grad), steps)
    assert origin.biased or bias_name(site.up, site.projection) not in parameters_of(model, site)


def dense_parameter(packed: nn.Parameter, name: str, verdict: Verdict) -> nn.Parameter | None:
    """The dense form of a packed parameter, None for a bias that the dense block has not. Where nothing has moved since
    the conversion it is the original itself."""
    origin, site = verdict.origin, verdict.origin.site
    is_bias = name == bias_name(site.up, site.projection)
    if is_bias and not origin.biased:
        return None
    original = origin.parameters.get(name)
    if getattr(verdict.decision, "original", False) and original is not None:
        original.requires_grad_(packed.requires_grad)
        return original
    dim = packed.dim() - 1 if is_bias else output_dim(site.projection)
    return nn.Parameter(collapse(packed, origin.scaling, dim=dim, groups=site.groups), packed.requires_grad)


def _form(weight: torch.Tensor, site: Site) -> Form:
    """A stack may lie the other way round than that of the up projection: neurons are where there are F of them."""
    if weight.shape[-1] == weight.shape[-2]:
        return "stack" if site.projection == "stack" else "stack_transposed"
    return "stack" if weight.shape[-1] == site.width else "stack_transposed"


def _narrowed(up: nn.Module, width: int) -> nn.Module:
    """A copy of a packed projection that says it has `width` outputs; its parameters are put in next."""
    dense = copy.copy(up)
    for registry in ("_parameters", "_buffers", "_modules"):
        setattr(dense, registry, dict(getattr(up, registry)))
    setattr(dense, next(name for name in WIDTH_NAMES if hasattr(up, name)), width)
    return dense


def _restore_activation(model: nn.Module, verdict: Verdict, steps: Collapsed) -> None:
    site = verdict.origin.site
    assert site.activation_path is not None
    if site.activation_call is not None:
        _conceal(model, site.activation_path, steps)
        return
    packed = get_attribute(model, site.activation_path)
    original = verdict.origin.activation if verdict.origin.activation is not None else packed.activation
    if isinstance(original, nn.Module):
        if any(tensor.is_meta for tensor in (*original.parameters(), *original.buffers())):
            raise SurgeryError(
                f"the activation of {site.block} has weights of its own, which this variant does not keep; collapse it "
                "in the process that converts it, or leave the layer out with `layers=`"
            )
        if original is not packed.activation:
            _set_training(original, packed.training, steps)
    _replace(model, site.activation_path, original, steps)


def _set_training(module: nn.Module, training: bool, steps: Collapsed) -> None:
    before = module.training
    steps.steps.append(lambda: setattr(module, "training", before))
    module.training = training


def _conceal(model: nn.Module, path: str, steps: Collapsed) -> None:
    """A block whose `forward` called its activation does so again: its own class and no attribute."""
    owner, _, name = path.rpartition(".")
    assert name == EXPOSED
    module = model.get_submodule(owner)
    exposed, held = type(module), getattr(module, name)

    def expose() -> None:
        module.__class__ = exposed
        setattr(module, name, held)

    steps.steps.append(expose)
    delattr(module, name)
    module.__class__ = exposed.__bases__[0]


def _replace(model: nn.Module, path: str, new: Any, steps: Collapsed) -> None:
    old = get_attribute(model, path)
    owner, _, name = path.rpartition(".")
    held = model.get_submodule(owner)._parameters
    if name in held:
        steps.steps.append(lambda: held.__setitem__(name, old))
        held[name] = new
        return
    steps.steps.append(lambda: set_attribute(model, path, old))
    set_attribute(model, path, new)


def _drop(model: nn.Module, path: str, steps: Collapsed) -> None:
    owner, _, name = path.rpartition(".")
    held = model.get_submodule(owner)._parameters
    old = held.pop(name)
    steps.steps.append(lambda: held.__setitem__(name, old))


def _redeclare(model: nn.Module, verdicts: Sequence[Verdict], *, whole: bool, steps: Collapsed) -> None:
    """Class and config say what is left."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "geglu"):
        _allow_saving(model, whole=whole, steps=steps)
        return
    memo: dict[int, Any] = {}
    gone = {verdict.origin.index for verdict in verdicts if verdict.origin.index is not None}
    collapsed_config(config, gone, whole=whole, memo=memo)
    if whole:
        variant = type(model)
        base = base_class_of(model)
        steps.steps.append(lambda: setattr(model, "__class__", variant))
        model.__class__ = base
    share_config(model, memo, steps)


def _allow_saving(model: nn.Module, *, whole: bool, steps: Collapsed) -> None:
    """A conversion that no config describes forbade it."""
    refusal = model.__dict__.get("save_pretrained")
    if whole and refusal is not None:
        steps.steps.append(lambda: object.__setattr__(model, "save_pretrained", refusal))
        delattr(model, "save_pretrained")
