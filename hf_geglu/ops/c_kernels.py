"""The unit on a CPU by loops in C (`unit.c`), compiled on the machine that runs them: forward, backward in place and
backward beside, each one pass over memory.

torch's compiler writes the same loops, but its exponential calls a library of vector functions, and each call of one of
its kernels costs 0.2 ms; these take about half of the time (docs/decisions.md, "Loops in C"). They are compiled when an
activation is first wanted, in about 0.3 s, into a temporary folder that is gone again when they are loaded. Where that
cannot be, the caller goes on with torch's compiler.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("unit.c")

FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fPIC", "-shared", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast"),
)
"""Nothing among them lets the compiler change the order of a sum, or forget about NaN."""

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

ENOUGH = 1 << 15
"""Elements for one thread, as in torch."""

SWITCH = "HF_GEGLU_NO_C"
"""An environment variable: 1 turns these kernels off."""

_LOCK = threading.Lock()
_LIBRARIES: dict[str, ctypes.CDLL] = {}
"""By activation."""
_KERNELS: dict[tuple[str, str, torch.dtype], Callable[..., None]] = {}
_UNAVAILABLE: list[str] = []
"""Why nothing could be compiled."""


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Why there are no such kernels; None as long as nothing is known against it."""
    if device_type != "cpu":
        return f"they are for CPUs, and this is {device_type}"
    if dtype not in TYPES:
        return f"they are written for float32 and bfloat16, and this is {str(dtype).removeprefix('torch.')}"
    if os.environ.get(SWITCH) == "1":
        return f"{SWITCH}=1 turns them off"
    if not sys.platform.startswith("linux"):
        return f"they were tried out on Linux only, and this is {sys.platform}"
    if _UNAVAILABLE:
        return _UNAVAILABLE[0]
    return None if compiler() is not None else "there is no C compiler: none in CC, and no cc, gcc or clang"


@cache
def compiler() -> str | None:
    """The C compiler of this machine."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def forward(gate_TF: torch.Tensor, value_TF: torch.Tensor, activation: str, offset: float) -> torch.Tensor | None:
    """activation(gate) * (value + offset) as a new contiguous tensor; None where there is no such kernel."""
    if not _fits(gate_TF, value_TF):
        return None
    hidden_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype)
    return hidden_TF if _run("forward", activation, offset, (gate_TF, value_TF, hidden_TF)) else None


def backward_(
    gate_TF: torch.Tensor, value_TF: torch.Tensor, hidden_TF: torch.Tensor, activation: str, offset: float
) -> bool:
    """In place: gate and value become their gradients, the gradient of the hidden state becomes the hidden state.
    False where there is no such kernel, and then nothing was done."""
    tensors = gate_TF, value_TF, hidden_TF
    return _fits(*tensors) and _run("backward_in_place", activation, offset, tensors)


def backward(
    gate_TF: torch.Tensor,
    value_TF: torch.Tensor,
    gradient_TF: torch.Tensor,
    activation: str,
    offset: float,
    out: tuple[torch.Tensor, torch.Tensor],
) -> bool:
    """Gradients of gate and value into `out`. False where there is no such kernel, and then nothing was done."""
    tensors = gate_TF, value_TF, gradient_TF, *out
    return _fits(*tensors) and _run("backward", activation, offset, tensors)


def _fits(first_TF: torch.Tensor, *others_TF: torch.Tensor) -> bool:
    if why_not(first_TF.device.type, first_TF.dtype) is not None or first_TF.numel() == 0 or first_TF.stride(1) != 1:
        return False
    shape, dtype = first_TF.shape, first_TF.dtype
    return all(each.shape == shape and each.dtype == dtype and each.stride(1) == 1 for each in others_TF)


def _run(which: str, activation: str, offset: float, tensors: tuple[torch.Tensor, ...]) -> bool:
    kernel = _KERNELS.get((which, activation, tensors[0].dtype)) or _kernel(which, activation, tensors[0].dtype)
    if kernel is None:
        return False
    rows, width = tensors[0].shape
    threads = max(1, min(torch.get_num_threads(), rows * width // ENOUGH))
    strides = [tensor.stride(0) for tensor in tensors]
    if all(stride == width for stride in strides):
        rows, width = 1, rows * width
    kernel(*[tensor.data_ptr() for tensor in tensors], *strides, rows, width, offset, threads)
    if which == "backward_in_place":
        torch.autograd.graph.increment_version(tensors)
    return True


def _kernel(which: str, activation: str, dtype: torch.dtype) -> Callable[..., None] | None:
    library = _compiled(activation)
    if library is None:
        return None
    kernel = getattr(library, f"{which}_{TYPES[dtype]}")
    tensors = {"forward": 3, "backward_in_place": 3, "backward": 5}[which]
    kernel.argtypes = [
        *[ctypes.c_void_p] * tensors,
        *[ctypes.c_int64] * (tensors + 2),
        *(ctypes.c_float, ctypes.c_int),
    ]
    kernel.restype = None
    _KERNELS[which, activation, dtype] = kernel
    return _KERNELS[which, activation, dtype]


def _compiled(activation: str) -> ctypes.CDLL | None:
    """The kernels of that activation; None where they cannot be compiled, which one warning tells."""
    with _LOCK:
        if activation in _LIBRARIES or _UNAVAILABLE:
            return _LIBRARIES.get(activation)
        try:
            _LIBRARIES[activation] = _compile(activation)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            _UNAVAILABLE.append(f"{type(error).__name__}: {' '.join(said.split())[:300]}")
            warnings.warn(
                f"hf_geglu could not compile its kernels in C and goes on with torch's compiler: {_UNAVAILABLE[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
        return _LIBRARIES.get(activation)


def _compile(activation: str) -> ctypes.CDLL:
    command = compiler()
    assert command is not None
    with tempfile.TemporaryDirectory(prefix="hf_geglu-") as folder:
        library = Path(folder) / "unit.so"
        options = [*FLAGS, f"-DACTIVATION={activation}", str(SOURCE), "-o", str(library), *_threads_of_torch()]
        subprocess.run([command, *options], check=True, capture_output=True, text=True, timeout=120)
        return ctypes.CDLL(str(library))  # loaded, it needs its file no longer


def _threads_of_torch() -> list[str]:
    """The OpenMP library that torch has loaded, so that there are not two pools of threads which wait for each other's
    processors."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return []
    names = ("libgomp", "libiomp5", "libomp")
    loaded = {line.split()[-1] for line in maps.splitlines() if Path(line.split()[-1]).name.startswith(names)}
    return ["-Wl,--as-needed", *sorted(loaded)[:1]]
