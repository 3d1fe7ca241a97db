"""FFN blocks by the autograd graph of one real forward of the whole model.

The finder runs single blocks on made-up inputs and follows tagged tensors. Here the model runs as a whole, and what
autograd recorded is walked backwards: from the input of every product with a weight, through reshapes, elementwise
functions and norms, to the products that it came from. A block is a product (down) whose input comes, through a
nonlinearity, from one other product or from two that are multiplied and read the same tensor, and which leads back to
their input width; nothing else may feed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Node = Any
"""An autograd node; torch has no public type for it."""

_PRODUCTS = (
    "Mm",
    "Addmm",
    "Bmm",
    "Baddbmm",
    "Mv",
    "Addmv",
    "Convolution",
    "GroupedMm",
    "Linear",
    "grouped_mm_fallback",
)
_SHAPES = (
    "View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Expand", "Clone", "Slice", "Split",
    "SplitWithSizes", "Select", "Index", "IndexSelect", "Unsqueeze", "Squeeze", "ToCopy", "Alias", "AsStrided",
    "Detach", "Unbind", "Chunk", "Repeat", "Gather", "Movedim", "Flip", "Narrow", "Contiguous", "MaskedSelect",
    "ConstantPadNd", "TransformersGroupedMm", "Unsafe", "Roll", "Copy", "Flatten", "Unflatten", "UnsafeSplit",
    "CopySlices", "SwapAxes",
)  # fmt: skip
_LINEAR = ("Mul", "Div", "Add", "Sub", "Rsub", "Neg", "Where", "MaskedFill", "Cat", "Stack", "Lerp", "Addcmul")
_NORMS = (
    "NativeLayerNorm", "Rsqrt", "Mean", "Pow", "Var", "Std", "FusedRmsNorm", "RmsNorm", "LinalgVectorNorm", "Norm",
    "Sqrt", "Sum", "NativeGroupNorm", "NativeBatchNorm", "ClampMin", "Maximum", "Reciprocal",
)  # fmt: skip
_ACTIVATIONS = (
    "Gelu", "Silu", "Relu", "Hardswish", "LeakyRelu", "Elu", "Mish", "Softplus", "Threshold", "HardtanhBackward",
    "Hardtanh", "Relu6", "Celu", "Selu", "Prelu", "PreluKernel", "Erf", "LogSigmoid", "Glu", "Clamp",
)  # fmt: skip
_SATURATING = ("Tanh", "Sigmoid", "Hardsigmoid")
"""A nonlinearity by themselves only where their input is multiplied in again, as in the formulas of GELU and SiLU."""


@dataclass(frozen=True, slots=True)
class Block:
    """One FFN block as the graph shows it, by the names of its parameters."""

    ups: frozenset[str]
    """The weights that feed the nonlinearity: one (dense or packed), or two (gate and value)."""
    down: str
    functions: frozenset[str]
    """Names of the nonlinearities on the way."""


@dataclass(frozen=True, slots=True)
class _Link:
    """A product that feeds another one through a nonlinearity."""

    block: Block
    returns: bool
    """Whether it leads back to the width it came from. Links of a chain (a head of three layers) are no blocks."""


@dataclass(slots=True)
class Reading:
    """What one graph shows."""

    blocks: list[Block] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """Weights that take part in some product."""


@dataclass(slots=True)
class _Product:
    weight: str
    shape: tuple[int, int]
    """(in, out), or the last two of a stack of matrices in whatever order."""
    stacked: bool
    data: Node


@dataclass(slots=True)
class _Sources:
    products: dict[int, bool] = field(default_factory=dict)
    """id of a product's node -> whether a nonlinearity lies between."""
    functions: set[str] = field(default_factory=set)
    multiplied: bool = False
    others: set[str] = field(default_factory=set)
    """What else feeds it: embeddings, attention, pooling, convolutions over positions."""


def read_graph(model: nn.Module, outputs: Mapping[str, torch.Tensor]) -> Reading:
    """The FFN blocks that the graph behind these outputs shows."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    nodes = _all_nodes(tensor.grad_fn for tensor in outputs.values())
    products = {id(node): product for node in nodes if (product := _product(node, names)) is not None}
    kept = {id(node): node for node in nodes}  # ids stay valid while nodes are referenced
    reading = Reading(used={product.weight for product in products.values()})
    links = {link for product in products.values() if (link := _link(product, products)) is not None}
    ups, downs = {name for link in links for name in link.block.ups}, {link.block.down for link in links}
    for link in sorted(links, key=lambda link: link.block.down):
        chained = link.block.down in ups or link.block.ups & downs
        if link.returns and not chained:
            reading.blocks.append(link.block)
    del kept
    return reading


def _all_nodes(starts: Iterator[Node]) -> list[Node]:
    seen: dict[int, Node] = {}
    waiting = [node for node in starts if node is not None]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            waiting.extend(following for following, _ in node.next_functions if following is not None)
    return list(seen.values())


def _name(node: Node) -> str:
    plain: str = node.name().rpartition("::")[2]
    return plain.partition("Backward")[0]


def _product(node: Node, names: Mapping[int, str]) -> _Product | None:
    """A product of data with one weight; None for any other node."""
    if _name(node) not in _PRODUCTS:
        return None
    weights, data = [], []
    for following, _ in node.next_functions:
        if following is None:
            continue
        parameter = _parameter(following)
        if parameter is None or id(parameter) not in names:
            data.append(following)
        elif parameter.dim() > 1:
            weights.append(parameter)
    if len(weights) != 1 or len(data) > 1:
        return None
    weight = weights[0]
    if _name(node) == "Convolution" and any(size != 1 for size in weight.shape[2:]):
        return None
    return _Product(names[id(weight)], _shape(node, weight), weight.dim() == 3, data[0] if data else None)


def _shape(node: Node, weight: torch.Tensor) -> tuple[int, int]:
    """(in, out) of a product."""
    if _name(node) == "Convolution":
        return weight.shape[1] * int(getattr(node, "_saved_groups", 1)), weight.shape[0]
    for side in ("mat1", "mat2"):
        sizes = tuple(getattr(node, f"_saved_{side}_sym_sizes", ()))
        following = dict(zip(("mat1", "mat2"), [each for each, _ in node.next_functions][-2:], strict=False)).get(side)
        if len(sizes) == 2 and following is not None and _parameter(following) is weight:
            return (sizes[0], sizes[1]) if side == "mat2" else (sizes[1], sizes[0])
    return weight.shape[-1], weight.shape[-2]


def _parameter(node: Node) -> torch.Tensor | None:
    """The parameter that a node hands on unchanged but for its shape."""
    while True:
        if hasattr(node, "variable"):
            variable: torch.Tensor = node.variable
            return variable
        following = [each for each, _ in node.next_functions if each is not None]
        if len(following) != 1 or _name(node) not in _SHAPES:
            return None
        node = following[0]


def _link(down: _Product, products: Mapping[int, _Product]) -> _Link | None:
    if down.data is None:
        return None
    sources = _sources(down.data, products)
    # the experts of a list, or of a loop over a stack, are many products with one weight
    ups = list({products[key].weight: products[key] for key in sources.products}.values())
    if sources.others or not 1 <= len(ups) <= 2 or not _bends(sources):
        return None
    if len(ups) == 2 and not (sources.multiplied and _same_input(ups[0].data, ups[1].data)):
        return None
    if len({up.weight for up in ups} | {down.weight}) != len(ups) + 1:
        return None
    returns = all(_there_and_back(up, down, gated=len(ups) == 2) for up in ups)
    return _Link(Block(frozenset(up.weight for up in ups), down.weight, frozenset(sources.functions)), returns)


def _sources(start: Node, products: Mapping[int, _Product]) -> _Sources:
    found = _Sources()
    waiting: list[tuple[Node, bool]] = [(start, False)]
    seen: set[tuple[int, bool]] = set()
    while waiting:
        node, bent = waiting.pop()
        if (id(node), bent) in seen:
            continue
        seen.add((id(node), bent))
        name = _name(node)
        if id(node) in products:
            found.products[id(node)] = found.products.get(id(node), False) or bent
            continue
        if hasattr(node, "variable"):
            continue  # a bias, a norm's weight, a learned scale
        if name in _ACTIVATIONS or name in _SATURATING:
            found.functions.add(name)
            found.multiplied |= name == "Glu"
            bent = True
        elif name in _LINEAR or name in _NORMS:
            found.multiplied |= name == "Mul"
            if name == "Pow" and float(getattr(node, "_saved_exponent", 0.0)) == 2.0:
                found.functions.add("Square")
        elif name not in _SHAPES:
            found.others.add(name)
            continue
        waiting.extend((following, bent) for following, _ in node.next_functions if following is not None)
    return found


def _bends(sources: _Sources) -> bool:
    """Whether what lies between is a nonlinearity of an FFN block: not a saturating one alone, but for gates."""
    if sources.functions & set(_ACTIVATIONS):
        return True
    return bool(sources.functions & set(_SATURATING)) and sources.multiplied


def _same_input(one: Node, other: Node) -> bool:
    def origin(node: Node) -> Node:
        while node is not None and _name(node) in _SHAPES:
            following = [each for each, _ in node.next_functions if each is not None]
            if len(following) != 1:
                return node
            node = following[0]
        return node

    return origin(one) is origin(other)


def _there_and_back(up: _Product, down: _Product, *, gated: bool) -> bool:
    """Whether D leads to F (or 2F, packed) and F back to D. A dense block that narrows is a bottleneck (an adapter, a
    squeeze-excite), unless it is one of many experts. Stacks of matrices say not which side is which: any will do."""
    shapes = (up.shape, up.shape[::-1]) if up.stacked else (up.shape,)
    backs = (down.shape, down.shape[::-1]) if down.stacked else (down.shape,)
    for d_in, wide in shapes:
        for narrow, d_out in backs:
            packed = not gated and wide == 2 * narrow
            if d_in == d_out and (wide == narrow or packed):
                return gated or packed or up.stacked or narrow >= d_in
    return False
