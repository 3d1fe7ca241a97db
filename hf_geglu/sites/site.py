"""The words of the finder: what a site is, what a rejection is, and what a search returns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["module", "split", "inline", "experts", "conv"]
Layout = Literal["dense", "separate", "packed", "interleaved"]
GateHalf = Literal["first", "last"]
Projection = Literal["linear", "conv1d", "pointwise", "stack", "stack_transposed"]

_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place in a model that holds an FFN block: its projections and its activation.

    All paths are dotted module paths from the model's root, as in ``model.named_modules()``. `D` is the hidden size and
    `F` the intermediate size of the block: ``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))`` for a
    dense one.
    """

    block: str
    """The smallest module that holds both projections (the layer itself for an inline block)."""
    gate: str
    """Projection (D -> F) that goes through the activation. Equal to `up` for dense and packed sites."""
    up: str
    """Linear value projection (D -> F); the packed projection (D -> 2F) for packed and interleaved sites."""
    down: str
    """Projection (F -> D) back to the model width."""
    kind: Kind
    layout: Layout
    activation: str
    """Name in transformers' ``ACT2FN`` of what was observed: "gelu" is the erf form, "gelu_pytorch_tanh" the tanh
    form."""
    activation_path: str | None
    """Attribute that holds the activation (a module or a function). Where `activation_call` is set, the one that
    exposing it makes; None where the activation can be neither exchanged nor exposed."""
    activation_call: str | None = None
    """The call of a function in ``forward`` that is the activation, such as "F.silu(_)"; None where an attribute is."""
    gate_half: GateHalf | None = None
    """Which half of a packed projection is the gate; for interleaved ones "first" means the even positions."""
    projection: Projection = "linear"
    """How gate and up lie in memory. "linear": weight (out, in), as in nn.Linear. "conv1d": (in, out), as in GPT-2's
    Conv1D. "pointwise": (out, in, 1...), a convolution of kernel 1. "stack": a parameter (experts, out, in);
    "stack_transposed": (experts, in, out); their paths are those of the parameters."""
    groups: int = 1
    """Of a pointwise convolution, whose groups of outputs read groups of inputs."""
    dim: int = -1
    """The dimension of what the activation is given that counts neurons: 1 between convolutions."""
    value_offset: float = 0.0
    """Constant added to the value branch before the product (1.0 in gpt-oss)."""
    limit: float | None = None
    """Where the block clamps its branches: the gate from above before the activation, the value from both sides."""
    d_in: int
    width: int
    """F: how many neurons the block has, not the number of rows of a packed projection."""
    d_out: int

    @property
    def layer(self) -> int | None:
        """Index of the layer: the first number in the path, None where the path has none."""
        match = _INDEX.search(self.block) or _INDEX.search(self.up)
        return int(match.group(1)) if match else None

    @property
    def gated(self) -> bool:
        """Whether the block already multiplies two branches."""
        return self.layout != "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A place that was looked at and not taken, with the reason in one sentence."""

    path: str
    class_name: str
    reason: str


@dataclass(frozen=True, slots=True)
class FoundSites:
    """What a search returns: every site in the model's own order, and everything looked at and not taken."""

    sites: tuple[Site, ...]
    rejected: tuple[Rejection, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def innermost(paths: Iterable[str]) -> str:
    """Path of the innermost module that holds all of these modules or parameters; "" for the model itself."""
    first, *others = (path.split(".")[:-1] for path in paths)
    shared = [name for at, name in enumerate(first) if all(other[: at + 1] == first[: at + 1] for other in others)]
    return ".".join(shared)
