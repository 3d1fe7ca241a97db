"""A block whose projections are all new: what a conversion to another width, or one that was trained, has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from hf_geglu.errors import ConversionError
from hf_geglu.sites import Site
from hf_geglu.sites.weights import bias_name, is_stack, weight_name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewWeights:
    """The gated block ``(f(x gate^T + gate_bias) * (x up^T + up_bias)) down^T + down_bias``.

    Matrices are (out, in) as in nn.Linear, whatever way the model keeps them: gate and up (F', D), down (D, F'). Of one
    block, not of stacked experts.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def width(self) -> int | None:
        """F', the number of neurons."""
        return self.gate.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is to be saved."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.contiguous() for name, value in held.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> NewWeights:
        """What `tensors` gave."""
        return cls(**tensors)

    def parameters(self, site: Site) -> dict[str, torch.Tensor]:
        """The parameters of the converted block by name, in the shapes that the model keeps them in.

        Raises:
            ConversionError: experts in one parameter, or a grouped convolution.
        """
        if is_stack(site.projection) or site.groups > 1:
            raise ConversionError(
                f"{site.up} holds several matrices in one parameter; expected a block with one gate and one value "
                "matrix. Leave it out with `layers=`"
            )
        gate, value = (self.gate, self.gate_bias), (self.up, self.up_bias)
        branches = (
            [(site.gate, gate), (site.up, value)]
            if site.layout == "separate"
            else [(site.up, _packed(site, gate, value))]
        )
        found = {}
        for path, (weight, bias) in (*branches, (site.down, (self.down, self.down_bias))):
            kept = weight.T.contiguous() if site.projection == "conv1d" else weight
            found[weight_name(path, site.projection)] = kept
            if bias is not None:
                found[bias_name(path, site.projection)] = bias
        return found


Branch = tuple[torch.Tensor, torch.Tensor | None]


def _packed(site: Site, gate: Branch, value: Branch) -> Branch:
    """Both branches in one projection: in the block's own order, or [gate | value] where it was dense."""
    halves = (value, gate) if site.gate_half == "last" else (gate, value)
    join = torch.stack if site.layout == "interleaved" else torch.cat
    weight = join([half[0] for half in halves], dim=1 if site.layout == "interleaved" else 0)
    weight = weight.reshape(-1, gate[0].shape[1])
    if site.gated and gate[1] is None and value[1] is None:
        return weight, None
    biases = [torch.zeros(len(half[0])).to(half[0]) if half[1] is None else half[1] for half in halves]
    return weight, join(biases, dim=-1).flatten()
