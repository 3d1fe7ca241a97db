"""Running unknown code without leaving a trace of it in the process."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def _on_cpu() -> AbstractContextManager[object]:
    """New tensors go to the CPU. The mode that sees to it slows every call down: it is entered only where needed."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextmanager
def isolated() -> Iterator[None]:
    """Gradients on, tensors on the CPU, one thread, no autocast, no warnings; afterwards all is as it was.

    One thread, because operations on a few hundred numbers spend their time waiting for the others.
    """
    numpy = sys.modules.get("numpy")
    threads = torch.get_num_threads()
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        torch.set_num_threads(1)
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            _on_cpu(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
