"""What runs in a block, or a unit, that was optimised: kernels where they fit, and otherwise the module as it was.

An optimised module gets a subclass of its class, for itself alone, with another `forward`. Copies and pickles of it are
optimised too; what it holds, and so what is saved of it, is the same as before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_geglu.modeling_geglu import PackedGLU
from hf_geglu.ops import Form, Mode, ffn, packed_glu
from hf_geglu.ops.block import Weights
from hf_geglu.ops.choose import Call, choose
from hf_geglu.ops.feed_forward import chosen
from hf_geglu.optimizing.norms import NormRecipe
from hf_geglu.optimizing.plain import hooked, not_plain, tensors_of, watched

STATE = "_hf_geglu_ops"
"""The attribute of an optimised module that says how; without it, the module runs as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecipe:
    """How a block is computed from its parts; paths are relative to it. No tensors and no modules, so that copies are
    about the copy."""

    gate: str | None
    """None where `up` is packed."""
    up: str
    down: str
    activation: str
    activation_kind: Any
    """What was there: the class of a module, or a function."""
    form: Form
    between: str | None = None
    """Dropout between the unit and the down projection."""
    after: str | None = None
    """Dropout after the down projection."""
    idle: tuple[str, ...] = ()
    """Other dropouts, which must do nothing."""
    argument: str
    """Name of the only argument."""
    mode: Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRecipe:
    """How a packed unit is computed."""

    activation_kind: Any
    form: Form
    mode: Mode


def kind_of(activation: Any) -> Any:
    """What tells an activation from another one that was put in its place."""
    if isinstance(activation, PackedGLU):
        return PackedGLU, kind_of(activation.activation)
    return type(activation) if isinstance(activation, nn.Module) else activation


def obstacle(block: nn.Module, recipe: BlockRecipe, x_D: Any) -> str | None:
    """Why this call must go through the modules; None where kernels may compute it."""
    if not isinstance(x_D, torch.Tensor) or type(x_D) not in (torch.Tensor, nn.Parameter) or x_D.dim() < 2:
        return "it is called with something else than hidden states"
    why = watched()
    if why is not None:
        return why
    for path in (recipe.gate, recipe.up, recipe.down):
        if path is not None:
            why = not_plain(block.get_submodule(path))
            if why is not None:
                return why
    why = _changed(block, recipe)
    if why is not None:
        return why
    weights = _weights(block, recipe)
    tensors = [tensor for tensor in weights.flat() if tensor is not None]
    if any(tensor.device != x_D.device for tensor in tensors):
        return "hidden states and weights are on different devices"
    if not torch.is_autocast_enabled(x_D.device.type) and any(tensor.dtype != x_D.dtype for tensor in tensors):
        return "hidden states and weights have different dtypes"
    return None


def _changed(block: nn.Module, recipe: BlockRecipe) -> str | None:
    """What is no longer as it was when the block was optimised."""
    path, _, name = recipe.activation.rpartition(".")
    activation = getattr(block.get_submodule(path), name)
    if kind_of(activation) != recipe.activation_kind:
        return "its activation is another one by now"
    if isinstance(activation, nn.Module) and any(hooked(part) for part in activation.modules()):
        return "its activation has a hook, which must be called"
    for place in (recipe.between, recipe.after, *recipe.idle):
        dropout = None if place is None else block.get_submodule(place)
        if dropout is None:
            continue
        if type(dropout) is not nn.Dropout or (place != recipe.after and hooked(dropout)):
            return "a dropout has a hook, or is another module by now"
        if place in recipe.idle and dropout.training and dropout.p:
            return "a dropout is at work that was not when the block was optimised"
    return None


def run_block(block: nn.Module, recipe: BlockRecipe, x_D: torch.Tensor, mode: Mode, **how: Any) -> torch.Tensor:
    """The block by kernels; `how` goes to `hf_geglu.ops.ffn`."""
    weights = _weights(block, recipe)
    between: Any = None if recipe.between is None else block.get_submodule(recipe.between)
    probability = between.p if between is not None and between.training else 0.0
    gate, up, down = weights.gate, weights.up, weights.down
    answer_D = ffn(x_D, gate, up, down, form=recipe.form, dropout=probability, mode=mode, **how)
    if recipe.after is not None:
        answer_D = block.get_submodule(recipe.after)(answer_D)
    return answer_D


def _weights(block: nn.Module, recipe: BlockRecipe) -> Weights:
    gate = None if recipe.gate is None else tensors_of(block.get_submodule(recipe.gate))
    return Weights(gate, tensors_of(block.get_submodule(recipe.up)), tensors_of(block.get_submodule(recipe.down)))


def _forward_of_block(module: nn.Module, recipe: BlockRecipe, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The answer, or None where the module's own `forward` must give it."""
    if len(args) + len(kwargs) != 1 or (kwargs and recipe.argument not in kwargs):
        return None
    x_D = args[0] if args else kwargs[recipe.argument]
    if obstacle(module, recipe, x_D) is not None:
        return None
    mode = chosen(x_D, _weights(module, recipe), recipe.form, recipe.mode)
    return None if mode == "reference" else run_block(module, recipe, x_D, mode)


def _forward_of_unit(module: nn.Module, recipe: UnitRecipe, args: Any, kwargs: Any) -> torch.Tensor | None:
    """As above."""
    if len(args) != 1 or kwargs or type(args[0]) is not torch.Tensor or args[0].dim() < 2:
        return None
    packed_P: torch.Tensor = args[0]
    activation = module.activation
    if torch.compiler.is_compiling() or watched() is not None or kind_of(activation) != recipe.activation_kind:
        return None  # under the compiler, the unit is fused anyway
    if isinstance(activation, nn.Module) and hooked(activation):
        return None
    call = Call(
        tokens=packed_P.shape[:-1].numel(),
        width=packed_P.shape[-1] // 2,
        dtype=packed_P.dtype,
        device_type=packed_P.device.type,
        activation=recipe.form.activation,
        differentiated=packed_P.requires_grad and torch.is_grad_enabled(),
    )
    if recipe.mode == "auto" and choose(call) == "reference":
        return None
    return packed_glu(packed_P, recipe.form)


class Optimised:
    """What the subclass of an optimised module inherits beside the module's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class that it was made from, since its own is nowhere to be imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        kind = type(self)
        return (_new, (kind.__mro__[2],), *reduced[2:]) if kind.__mro__[1] is Optimised else reduced


def _new(base: type[nn.Module]) -> nn.Module:
    made = optimised_class(base)
    return made.__new__(made)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def optimised_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class that asks the module's recipe first; one for each class."""
    return _CLASSES.setdefault(base, _optimised_class(base)) if base not in _CLASSES else _CLASSES[base]


def _optimised_class(base: type[nn.Module]) -> type[nn.Module]:

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recipe = self.__dict__.get(STATE)
        answer: Any = None
        if type(recipe) is BlockRecipe:
            answer = _forward_of_block(self, recipe, args, kwargs)
        elif type(recipe) is UnitRecipe:
            answer = _forward_of_unit(self, recipe, args, kwargs)
        elif type(recipe) is NormRecipe:
            answer = recipe.answer(self, args, kwargs)
        return base.forward(self, *args, **kwargs) if answer is None else answer

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (Optimised, base), {**names, "forward": forward})


def install(module: nn.Module, recipe: BlockRecipe | UnitRecipe | NormRecipe) -> None:
    """From now on this one module runs by that recipe."""
    if not isinstance(module, Optimised):
        module.__class__ = optimised_class(type(module))
    module.__dict__[STATE] = recipe


def remove(module: nn.Module) -> None:
    """Take it out again. Where somebody has made a further subclass of the module's class, that stays."""
    module.__dict__.pop(STATE, None)
    kind = type(module)
    if len(kind.__mro__) > 2 and kind.__mro__[1] is Optimised:
        module.__class__ = kind.__mro__[2]
