"""Bytes: what autograd keeps for a backward, and the peak of a process."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def saved_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps, each storage once, without the parameters."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


def peak_bytes(run: Callable[[], object], *, device: str) -> int:
    """What `run` needs at its highest beyond what was held before; of the whole process on a CPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    begin_high_water()
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def begin_high_water() -> None:
    """The high-water mark of the process begins anew, and memory that was freed is given back: filled again, what was
    freed before (weights in another type, say) would leave no trace."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status(entry: str) -> int:
    """Bytes that /proc says of this process: VmRSS now, VmHWM at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024
