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

from hf_geglu.modeling_geglu import PackedGLU, get_attribute
from hf_geglu.ops import Form, Mode, ffn, packed_glu
from hf_geglu.ops.block import Weights
from hf_geglu.ops.choose import Call, always_too_small, choose, packing_pays
from hf_geglu.ops.feed_forward import chosen, differentiated
from hf_geglu.optimizing import decoding
from hf_geglu.optimizing.norms import NormRecipe
from hf_geglu.optimizing.plain import hooked, not_plain, part, tensors_of, watched

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
    width: int
    """Intermediate size."""
    mode: Mode
    decode: bool = False
    """Whether calls of few tokens may go through a second, packed copy of the weights."""


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
            why = not_plain(part(block, path))
            if why is not None:
                return why
    why = _changed(block, recipe)
    if why is not None:
        return why
    tensors = [tensor for tensor in weights_of(block, recipe).flat() if tensor is not None]
    device, dtype = x_D.device, x_D.dtype
    if any(tensor.device != device for tensor in tensors):
        return "hidden states and weights are on different devices"
    if any(tensor.dtype != dtype for tensor in tensors) and not torch.is_autocast_enabled(device.type):
        return "hidden states and weights have different dtypes"
    return None


def _changed(block: nn.Module, recipe: BlockRecipe) -> str | None:
    """What is no longer as it was when the block was optimised."""
    path, _, name = recipe.activation.rpartition(".")
    activation = getattr(part(block, path), name)
    if kind_of(activation) != recipe.activation_kind:
        return "its activation is another one by now"
    if isinstance(activation, nn.Module) and any(hooked(part) for part in activation.modules()):
        return "its activation has a hook, which must be called"
    for place in (recipe.between, recipe.after, *recipe.idle):
        dropout = None if place is None else part(block, place)
        if dropout is None:
            continue
        if type(dropout) is not nn.Dropout or (place != recipe.after and hooked(dropout)):
            return "a dropout has a hook, or is another module by now"
        if place in recipe.idle and dropout.training and dropout.p:
            return "a dropout is at work that was not when the block was optimised"
    return None


def run_block(block: nn.Module, recipe: BlockRecipe, x_D: torch.Tensor, mode: Mode, **how: Any) -> torch.Tensor:
    """The block by kernels; `how` goes to `hf_geglu.ops.ffn`."""
    weights = weights_of(block, recipe)
    gate, up, down = weights.gate, weights.up, weights.down
    answer_D = ffn(x_D, gate, up, down, form=recipe.form, dropout=_noise(block, recipe), mode=mode, **how)
    return _after(block, recipe, answer_D)


def _noise(block: nn.Module, recipe: BlockRecipe) -> float:
    """Probability of the dropout in the middle, 0 where none is at work."""
    between: Any = None if recipe.between is None else part(block, recipe.between)
    return between.p if between is not None and between.training else 0.0


def _after(block: nn.Module, recipe: BlockRecipe, answer_D: torch.Tensor) -> torch.Tensor:
    return answer_D if recipe.after is None else part(block, recipe.after)(answer_D)


def weights_of(block: nn.Module, recipe: BlockRecipe) -> Weights:
    """The tensors of its projections."""
    gate = None if recipe.gate is None else tensors_of(part(block, recipe.gate))
    return Weights(gate, tensors_of(part(block, recipe.up)), tensors_of(part(block, recipe.down)))


def _forward_of_block(module: nn.Module, recipe: BlockRecipe, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The answer, or None where the module's own `forward` must give it."""
    if len(args) + len(kwargs) != 1 or (kwargs and recipe.argument not in kwargs):
        return None
    x_D = args[0] if args else kwargs[recipe.argument]
    few = recipe.decode and not torch.compiler.is_compiling()
    quiet = few and not _more_than_parts(module, recipe)
    if quiet:
        answer_D = decoding.packing_of(module).answer(module, x_D)
        if answer_D is not None:
            return _after(module, recipe, answer_D)
    if recipe.mode == "auto" and not few and _too_small(x_D, recipe.width):
        return None  # before anything else is asked, which takes as long as a small block
    if obstacle(module, recipe, x_D) is not None:
        return None
    weights = weights_of(module, recipe)
    if few:
        _look_at_weights(module, recipe, weights, x_D, quiet=quiet)
    mode = chosen(x_D, weights, recipe.form, recipe.mode)
    return None if mode == "reference" else run_block(module, recipe, x_D, mode)


def _too_small(x_D: Any, width: int) -> bool:
    return isinstance(x_D, torch.Tensor) and x_D.dim() > 0 and always_too_small(x_D.shape[:-1].numel(), width)


def _more_than_parts(block: nn.Module, recipe: BlockRecipe) -> bool:
    """What `Packing` does not ask: a dropout at work; an activation that is no module, or holds one, and is another."""
    if not isinstance(recipe.activation_kind, type) and _changed(block, recipe) is not None:
        return True
    dropouts: Any = [part(block, path) for path in (recipe.between, *recipe.idle) if path is not None]
    return any(dropout.training and dropout.p for dropout in dropouts)


def _look_at_weights(
    block: nn.Module, recipe: BlockRecipe, weights: Weights, x_D: torch.Tensor, *, quiet: bool
) -> None:
    """After a call that packed weights did not answer: pack them for the next one, or hold none any longer."""
    if differentiated(x_D, weights):
        decoding.drop(block)  # they are going to change
        return
    plain = quiet and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x_D.device.type)
    if plain and packing_pays(x_D.shape[:-1].numel(), x_D.shape[-1], recipe.width):
        paths = [path for path in (recipe.gate, recipe.up, recipe.down) if path is not None]
        decoding.packing_of(block).see(block, weights, recipe.form, paths, _other_parts(block, recipe))


def _other_parts(block: nn.Module, recipe: BlockRecipe) -> list[str]:
    """Modules beside the projections that the packed path does not call: activation and dropouts."""
    activation = get_attribute(block, recipe.activation)
    inside = [path for path, _ in activation.named_modules()] if isinstance(activation, nn.Module) else []
    paths = [f"{recipe.activation}.{path}" if path else recipe.activation for path in inside]
    return [*paths, *(path for path in (recipe.between, *recipe.idle) if path is not None)]


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
    decoding.drop(module)
    kind = type(module)
    if len(kind.__mro__) > 2 and kind.__mro__[1] is Optimised:
        module.__class__ = kind.__mro__[2]
