"""What counts as a projection, and what can be read off one without touching its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

Form = Literal["linear", "conv1d", "pointwise", "convolution", "stack", "stack_transposed"]
"""linear: weight (out, in). conv1d: GPT-2's Conv1D, weight (in, out). pointwise: an nn.Conv* of kernel 1.
convolution: wider. stack: a parameter of a module that is no projection, (experts, out, in); stack_transposed:
(experts, in, out)."""


@dataclass(frozen=True, slots=True)
class Port:
    """The widths of a projection and the way its weight is stored."""

    d_in: int
    d_out: int
    form: Form
    groups: int = 1
    """Of a convolution: each group of outputs reads a group of inputs of its own."""

    @property
    def convolves(self) -> bool:
        """Whether channels come second in its input rather than last."""
        return self.form in ("pointwise", "convolution")

    @property
    def depthwise(self) -> bool:
        """Whether it mixes positions of one channel each."""
        return self.form == "convolution" and self.groups == self.d_in == self.d_out

    @property
    def stacked(self) -> bool:
        """Whether it is one of several matrices in one parameter."""
        return self.form in ("stack", "stack_transposed")


def read_port(module: nn.Module) -> Port | None:
    """The port of a projection, None for any other module.

    Apart from the classes of torch and transformers, anything with integer `in_features` and `out_features` counts if
    it holds no other modules (quantised linears) or wraps one as `base_layer` (PEFT's): both are called like a
    linear.
    """
    if isinstance(module, Conv1D):
        return Port(module.nx, module.nf, "conv1d")
    if isinstance(module, _ConvNd):
        if all(extent == 1 for extent in (*module.kernel_size, *module.stride)) and not _depthwise(module):
            return Port(module.in_channels, module.out_channels, "pointwise", module.groups)
        return Port(module.in_channels, module.out_channels, "convolution", module.groups)
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not (isinstance(d_in, int) and isinstance(d_out, int)):
        return None
    if isinstance(module, nn.Linear) or not module._modules or "base_layer" in module._modules:
        return Port(d_in, d_out, "linear")
    return None


def _depthwise(convolution: _ConvNd) -> bool:
    """Whether it only scales its channels, each by itself."""
    return convolution.groups > 1 and convolution.groups == convolution.in_channels


def leads_on(first: Port, second: Port) -> bool:
    """Whether the answer of one projection, or half of it, has the width that the other reads."""
    return first.d_out in (second.d_in, 2 * second.d_in)


def within(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module, Port]]:
    """Every projection below `module` as (path, module, port), in the order of registration."""
    found: list[tuple[str, nn.Module, Port]] = []
    for name, child in module._modules.items():
        if child is None:
            continue
        child_path = f"{path}.{name}" if path else name
        port = read_port(child)
        if port is not None:
            found.append((child_path, child, port))
        else:
            found.extend(within(child, child_path))
    return found
