"""Where the numbers of a projection are, and how its outputs lie in them.

Legend of suffixes: E experts, D inputs, O outputs, N a selection of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from hf_geglu.modeling_geglu import stack_bias
from hf_geglu.sites.site import Projection, Site

_OUTPUT_DIM: Mapping[Projection, int] = MappingProxyType(
    {"linear": 0, "conv1d": 1, "pointwise": 0, "stack": 1, "stack_transposed": 2}
)


def is_stack(projection: Projection) -> bool:
    """Whether the experts' matrices are one parameter, rather than each a module's weight. Of three dimensions, or of
    two where the experts' rows lie one after the other (DBRX)."""
    return projection in ("stack", "stack_transposed")


def weight_name(path: str, projection: Projection) -> str:
    """Name of the weight of the projection at `path`, as in ``model.named_parameters()``."""
    return path if is_stack(projection) else f"{path}.weight"


def bias_name(path: str, projection: Projection) -> str:
    """Name of its bias, which need not be there."""
    return stack_bias(path) if is_stack(projection) else f"{path}.bias"


def output_dim(projection: Projection) -> int:
    """The dimension of the weight that counts outputs; biases have them last."""
    return _OUTPUT_DIM[projection]


def rows(
    weight: torch.Tensor, projection: Projection, outputs_N: torch.Tensor, experts_N: torch.Tensor
) -> torch.Tensor:
    """Those rows of the matrix as (N, D), of those experts where it is a stack."""
    if projection == "stack" and weight.ndim == 3:
        return weight[experts_N, outputs_N]
    if projection == "stack_transposed":
        return weight[experts_N, :, outputs_N]
    return weight[:, outputs_N].T if projection == "conv1d" else weight[outputs_N].flatten(1)


def experts_in(weight_shape: Sequence[int], site: Site) -> int:
    """How many experts the weight of a site's up projection holds, 1 where it is no stack."""
    if not is_stack(site.projection):
        return 1
    return weight_shape[0] if len(weight_shape) == 3 else weight_shape[0] // site.width


def entries(bias: torch.Tensor, outputs_N: torch.Tensor, experts_N: torch.Tensor) -> torch.Tensor:
    """Those entries of a bias as (N,)."""
    return bias[experts_N, outputs_N] if bias.dim() == 2 else bias[outputs_N]


def parameters_of(model: nn.Module, site: Site, *, down: bool = False) -> dict[str, nn.Parameter]:
    """Weights and biases of the gate and up projections by name, all that a conversion changes; with `down` the down
    projection's too."""
    paths = dict.fromkeys((site.gate, site.up, *([site.down] if down else ())))
    found: dict[str, nn.Parameter] = {}
    for name in (name(path, site.projection) for path in paths for name in (weight_name, bias_name)):
        owner, _, attribute = name.rpartition(".")
        parameter = model.get_submodule(owner)._parameters.get(attribute)
        if parameter is not None:
            found[name] = parameter
    return found
