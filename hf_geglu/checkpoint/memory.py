"""Is there memory to run the whole model, besides checking its blocks?"""

from __future__ import annotations

import psutil
import torch
from torch import nn

HEADROOM = 1.25
"""For outputs and whatever else the process needs."""


def needed_to_run(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that running `model` before and after its conversion takes.

    One copy in its own dtype; a model of 16 bits is run in float32 as well, in a second copy, twice as large.
    """
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return int(HEADROOM * (3 * size if dtype.itemsize == 2 else size))


def free_memory() -> int:
    """Bytes that the system can give to this process without swapping."""
    return int(psutil.virtual_memory().available)
