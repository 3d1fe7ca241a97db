"""Packed weights beside a block (`hf_geglu.ops.decode`), and whether they are still the block's weights.

What is packed is in no saved file, no copy and no pickle, and goes with the block. It goes, too, at the first call that
will be differentiated, and as soon as a weight is seen to have changed: another tensor, another version, another place
in memory, a step of any optimizer of torch (fused ones change no version), or other numbers at `PLACES` places (writes
through ``.data`` change nothing else). A write through ``.data`` that leaves all these numbers alone is not seen.

A block is packed when two calls in a row have found the same weights, so that weights that change at every call cost
nothing but the looking.

Decoding evicts everything from the caches between two visits of a block, Python's objects too: a look at one costs
more than what is done with it. Hence `Packing.answer` asks few of them, and what they hold is looked up beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_geglu.ops import decode
from hf_geglu.ops.block import Weights
from hf_geglu.ops.decode import MOST_TOKENS, PackedBlock
from hf_geglu.ops.form import Form, as_rows
from hf_geglu.optimizing.plain import watched

PLACES = 16
"""Numbers of a weight that are looked at in every call, each somewhere in memory that is not read otherwise."""

NAME = "_hf_geglu_packing"
"""The attribute of a block that holds its `Packing`."""


class _Steps:
    """How many steps any optimizer of torch has made since the first weight was looked at."""

    def __init__(self) -> None:
        self.count = 0
        self.counting = False

    def begin(self) -> None:
        if not self.counting:
            self.counting = True
            register_optimizer_step_post_hook(self._one_more)

    def _one_more(self, *_: Any) -> None:
        self.count += 1


_STEPS = _Steps()


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A weight or bias as it was."""

    own: dict[str, Any]
    """The parameters of its module."""
    name: str
    tensor: Tensor
    version: int
    address: int
    some: Tensor
    """A view of numbers of every part of it, in different rows and columns."""
    numbers: Tensor
    """What these were."""

    @classmethod
    def of(cls, own: dict[str, Any], name: str) -> _Tensor:
        tensor: Tensor = own[name]
        flat = tensor.detach().view(-1)
        step = max(1, flat.numel() // PLACES) | 1
        some = flat[: step * PLACES : step]
        return cls(own, name, tensor, tensor._version, tensor.data_ptr(), some, some.clone())

    def still(self) -> bool:
        tensor = self.own.get(self.name)
        return (
            tensor is self.tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.address
            and torch.equal(self.some, self.numbers)
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """A module that will not be called, and the proof that its call would have done no more."""

    siblings: dict[str, Any]
    name: str
    module: nn.Module
    kind: type
    state: dict[str, Any]

    @classmethod
    def of(cls, block: nn.Module, path: str) -> _Part:
        owner, _, name = path.rpartition(".")
        parent = block.get_submodule(owner)
        module = parent.get_submodule(name)
        return cls(parent._modules, name, module, type(module), module.__dict__)

    def still(self) -> bool:
        state = self.state
        return (
            self.siblings.get(self.name) is self.module
            and self.module.__class__ is self.kind
            and not (state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)
        )


class Packing:
    """What is packed of one block. It is empty, from the first call with these weights on seen, then packed."""

    __slots__ = ("absent", "dtype", "hidden", "modules", "packed", "parts", "steps", "tensors")

    def __init__(self) -> None:
        self.packed: PackedBlock | None = None
        self.tensors: tuple[_Tensor, ...] = ()
        self.absent: tuple[tuple[dict[str, Any], str], ...] = ()
        self.parts: tuple[_Part, ...] = ()

    def __reduce__(self) -> Any:
        return Packing, ()

    def see(self, block: nn.Module, weights: Weights, form: Form, paths: Sequence[str], parts: Sequence[str]) -> None:
        """Look at the weights, which are those of the projections at `paths`, and pack them if they are what was seen
        before. `parts` are other modules whose hooks count."""
        if self.tensors and self._current(block):
            self.packed = self.packed or decode.pack(weights, form)
            return
        self.__init__()  # type: ignore[misc]
        if decode.packable(weights) is not None:
            return
        own = [(block.get_submodule(path)._parameters, name) for path in paths for name in ("weight", "bias")]
        if any(name not in parameters for parameters, name in own):
            return  # tensors that are no parameters: a replica's
        _STEPS.begin()
        self.tensors = tuple(_Tensor.of(each, name) for each, name in own if each[name] is not None)
        self.absent = tuple((each, name) for each, name in own if each[name] is None)
        self.parts = tuple(_Part.of(block, path) for path in (*paths, *parts))
        self.steps, self.modules = _STEPS.count, block._modules
        self.dtype, self.hidden = weights.up[0].dtype, weights.up[0].shape[0 if form.transposed else 1]

    def _current(self, block: nn.Module) -> bool:
        return (
            self.modules is block._modules  # not so in a replica, which has the attributes of its original
            and self.steps == _STEPS.count
            and all([part.still() for part in self.parts])  # noqa: C419  no generator: see above
            and all([tensor.still() for tensor in self.tensors])  # noqa: C419
            and all([own.get(name) is None for own, name in self.absent])  # noqa: C419
        )

    def answer(self, block: nn.Module, x_D: Any) -> Tensor | None:
        """The block by packed weights; None where anything is not as it was, or the call is not one of few tokens that
        nobody differentiates. Whether a dropout is at work is not asked here."""
        packed = self.packed
        if packed is None or type(x_D) is not Tensor or torch.is_grad_enabled():
            return None
        shape = x_D.shape
        if x_D.dtype is not self.dtype or not x_D.is_cpu or len(shape) < 2 or shape[-1] != self.hidden:
            return None
        tokens = x_D.numel() // self.hidden
        if not 0 < tokens <= MOST_TOKENS or torch.is_autocast_enabled("cpu"):
            return None
        if torch.compiler.is_compiling() or watched() is not None or not self._current(block):
            return None
        return as_rows(decode.run(x_D.reshape(tokens, self.hidden), packed), shape[:-1])


def packing_of(block: nn.Module) -> Packing:
    """What is held for that block; made where there is none."""
    found: Packing = block.__dict__.setdefault(NAME, Packing())
    return found


def drop(block: nn.Module) -> None:
    """Hold nothing for that block any more."""
    block.__dict__.pop(NAME, None)
