"""Parameters that several processes hold shares of (FSDP2): a share, the whole, and the way between them.

A plain tensor is its own and only share, so nobody has to ask which of the two it is. torch's `DTensor` is told by what
it can do: importing it takes a second that an unsharded run need not spend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Spread(Protocol):
    """A tensor of which every process holds a part, wherever that is."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the whole."""

    def whole(self) -> Tensor:
        """All of it, on the CPU; every process must ask at the same time."""


def is_shared(tensor: Tensor | Spread) -> bool:
    """Whether other processes hold the rest of it."""
    return not isinstance(tensor, Tensor) or hasattr(tensor, "full_tensor")


def share(tensor: Tensor) -> Tensor:
    """What this process holds, detached; writing into it writes into the parameter."""
    kept: Any = tensor.detach()
    local: Tensor = kept.to_local() if is_shared(tensor) else kept
    return local


def whole(tensor: Tensor) -> Tensor:
    """All of it, on the CPU. Of a shared tensor every process must ask at the same time."""
    kept: Any = tensor.detach()
    full: Tensor = kept.full_tensor() if is_shared(tensor) else kept
    return full.cpu()


def part_of(full: Any, like: Tensor) -> Tensor:
    """The part of a whole that this process holds of `like`.

    Args:
        full: a tensor, or a slice of a safetensors file (then only the part is read), of the shape of `like`; where a
            dimension is 1 it counts for all.
        like: a parameter, shared or not.
    """
    if not is_shared(like):
        read: Tensor = full if isinstance(full, Tensor) else full[...]
        return read
    shape = full.shape if isinstance(full, Tensor) else full.get_shape()
    shared: Any = like
    chunk = shared.__create_chunk_list__()[0]  # what torch.distributed.checkpoint asks of it, too
    index = tuple(
        slice(None) if count == 1 else slice(start, start + size)
        for count, start, size in zip(shape, chunk.offsets, chunk.sizes, strict=True)
    )
    part: Tensor = full[index]
    return part


def joined(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of which this process holds `part`, dealt out as `like` is."""
    if not is_shared(like):
        return part
    from torch.distributed.tensor import DTensor

    shared: Any = like
    return DTensor.from_local(
        part.to(share(like).device),
        shared.device_mesh,
        shared.placements,
        run_check=False,
        shape=shared.shape,
        stride=shared.stride(),
    )


@dataclass(frozen=True)
class Share:
    """This process's part of a tensor that belongs to a parameter: an average of it, or its best value so far.

    Attributes:
        local: the part, on any device.
        like: the parameter.
    """

    local: Tensor
    like: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the part and the whole."""
        return self.local.dtype

    def whole(self) -> Tensor:
        """All of it, on the CPU; every process must ask at the same time."""
        return whole(joined(self.local, self.like))


def held(local: Tensor, like: Tensor) -> Tensor | Share:
    """A tensor that belongs to a parameter, for a file: itself, or this process's share of it."""
    return Share(local, like) if is_shared(like) else local
