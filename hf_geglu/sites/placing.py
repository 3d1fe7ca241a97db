"""What was seen inside a block, in the words of the whole model."""

from __future__ import annotations

from torch import nn

from hf_geglu.sites.locating import Seen
from hf_geglu.sites.projections import within
from hf_geglu.sites.site import Kind, Site, innermost
from hf_geglu.sites.verdict import Observation


def as_site(block: nn.Module, path: str, seen: Seen) -> Site:
    """What was seen in a block at `path`, in the words of the whole model."""
    one = seen.observation

    def absolute(relative: str) -> str:
        return f"{path}.{relative}" if path else relative

    form = one.up.port.form
    holder = innermost(one.projections) if one.up.port.stacked else ""
    return Site(
        block=absolute(holder) if holder else path,
        gate=absolute(one.gate.path),
        up=absolute(one.up.path),
        down=absolute(one.down.path),
        kind=_kind(block, one),
        layout=one.fit.layout,
        activation=one.fit.activation,
        activation_path=None if seen.activation_path is None else absolute(seen.activation_path),
        activation_call=seen.activation_call,
        gate_half=one.fit.gate_half,
        projection="linear" if form == "convolution" else form,
        groups=one.up.port.groups,
        dim=seen.dim,
        value_offset=one.fit.offset,
        limit=one.fit.limit,
        d_in=one.up.port.d_in,
        width=one.down.port.d_in,
        d_out=one.down.port.d_out,
    )


def _kind(block: nn.Module, one: Observation) -> Kind:
    if one.up.port.stacked:
        return "experts"
    if one.up.port.convolves:
        return "conv"
    if len({path.rpartition(".")[0] for path in one.projections}) > 1:
        return "split"
    return "module" if len(within(block)) == len(one.projections) else "inline"
