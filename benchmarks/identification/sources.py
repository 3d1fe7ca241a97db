"""A second opinion on a class that runs nothing: the names in its source, and the names of what its attributes hold.

It shares no code with `hf_geglu.identify`: that runs modules and reads no name, this reads names and runs no module.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_CLASSES = {
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "PytorchGELUTanh": "gelu_pytorch_tanh",
    "GELUTanh": "gelu_pytorch_tanh",
    "NewGELUActivation": "gelu_pytorch_tanh",
    "FastGELUActivation": "gelu_pytorch_tanh",
    "AccurateGELUActivation": "gelu_pytorch_tanh",
    "BloomGelu": "gelu_pytorch_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "ReLU6": "relu6",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "LeakyReLU": "leaky_relu",
    "Mish": "mish",
    "Hardswish": "hardswish",
    "GLU": "sigmoid",
}
_CALLS = {
    "gelu": "gelu",
    "silu": "silu",
    "relu": "relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "quick_gelu": "quick_gelu",
    "squared_relu": "relu2",
    "glu": "sigmoid",
    "softplus": "softplus",
}


@dataclass(frozen=True, slots=True)
class Opinion:
    """What names say: the activations that are mentioned, and whether an activated thing is multiplied by another."""

    activations: frozenset[str]
    gated: bool | None
    """None where the source does not show it."""


def opinion(module: nn.Module) -> Opinion:
    """What the class and the attributes of a module are called."""
    names: set[str] = set()
    holders = {name for name, value in _held(module)}
    for _, value in _held(module):
        named = _CLASSES.get(type(value).__name__) or _CALLS.get(getattr(value, "__name__", ""))
        if type(value).__name__ == "GELU" and getattr(value, "approximate", "none") == "tanh":
            named = "gelu_pytorch_tanh"
        names.add(named or f"?{type(value).__name__}")
    gated: bool | None = None
    for tree in _sources(type(module)):
        for node in ast.walk(tree):
            called = _called(node)
            if called in _CALLS and not _belongs_to_self(node):
                names.add("gelu_pytorch_tanh" if called == "gelu" and "tanh" in ast.unparse(node) else _CALLS[called])
        gated = _is_gated(tree, holders)
        break
    return Opinion(frozenset(names), gated)


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes whose name or class says that they are activations."""
    for name, value in [*vars(module).items(), *module._modules.items()]:
        looks = re.search(r"act|gelu|silu|nonlin", name, re.IGNORECASE) is not None
        if type(value).__name__ in _CLASSES or (
            looks and (inspect.isfunction(value) or inspect.isbuiltin(value) or isinstance(value, nn.Module))
        ):
            yield name, value


def _sources(kind: type) -> Iterator[ast.AST]:
    """The forward that is run, as a tree."""
    try:
        yield ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return


def _called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _belongs_to_self(node: ast.AST) -> bool:
    function = getattr(node, "func", None)
    return isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self"


def _is_gated(tree: ast.AST, holders: set[str]) -> bool:
    """Whether something that an activation made is multiplied by something else: followed through assignments."""
    activated: set[str] = set()

    def acts(node: ast.AST) -> bool:
        for inner in ast.walk(node):
            if _called(inner) in (_CALLS.keys() | holders) and _called(inner) != "glu":
                return True
            if isinstance(inner, ast.Name) and inner.id in activated:
                return True
        return False

    found = False
    for node in ast.walk(tree):
        if _called(node) == "glu":
            return True
    for node in _in_order(tree):
        for inner in ast.walk(node):
            if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Mult):
                left, right = acts(inner.left), acts(inner.right)
                plain = inner.right if left else inner.left
                found = found or (left != right and not isinstance(plain, ast.Constant) and _is_tensor(plain))
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    (activated.add if acts(node.value) else activated.discard)(target.id)
    return found


def _is_tensor(node: ast.AST) -> bool:
    text = ast.unparse(node)
    return not re.search(r"scale|weight|score|mask|gamma|alpha|prob|top_k|routing", text)


def _in_order(tree: ast.AST) -> Iterator[ast.stmt]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef):
            yield node
        yield from _in_order(node)


def misnamed_gate(module: nn.Module, gate_half: str | None) -> str | None:
    """The line of a forward that calls the value half `gate`; None where names agree with what was observed."""
    for tree in _sources(type(module)):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and _called(node.value):
                names = [getattr(one, "id", "") for one in node.targets[0].elts]
                if len(names) == 2 and sum("gate" in name for name in names) == 1 and gate_half:
                    called_gate = "first" if "gate" in names[0] else "last"
                    if called_gate != gate_half:
                        return ast.unparse(node)
    return None
