"""The `accelerate.Accelerator` of a run, and what of its doing must not outlive it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from hf_geglu.errors import ConfigurationError
from hf_geglu.training.processes.strategy import settle_strategy, stay_on_cpu
from hf_geglu.training.settings.run import TrainSettings


def make_accelerator(settings: TrainSettings, *, trackers: Sequence[str] = (), folder: Path | None = None) -> Any:
    """An `accelerate.Accelerator` for these settings, for the process that `accelerate launch` or plain python started.

    Args:
        settings: of the training.
        trackers: that it reports to, by accelerate's names.
        folder: where those that keep files put them.

    Raises:
        ConfigurationError: accelerate is not installed, the precision does not go with the device, the strategy is
            not supported, or a tracker is not there.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ConfigurationError(
            "accelerate is not installed: expected it for training. Run: pip install 'hf_geglu[train]'"
        ) from error
    check_trackers(trackers)
    # accelerate keeps one state a process and refuses another precision; a second run in the same process may want one.
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(
            mixed_precision=settings.precision(),
            cpu=stay_on_cpu(settings.use_cpu),
            log_with=list(trackers) or None,
            project_dir=folder if trackers else None,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=settings.ddp_find_unused_parameters)],
        )
    except ImportError as error:
        raise ConfigurationError(
            f"{error} Expected what the launch asks for. Install it, or launch another way."
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"mixed_precision={settings.precision() or 'as launched'}: {error} Use --mixed_precision bf16 or no, or "
            "another device."
        ) from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigurationError(
            "fp16 mixed precision on a CPU: expected a GPU, which has fp16 arithmetic. Use bf16, or no mixed precision."
        )
    # The loop weighs forwards by tokens; accelerate would divide by their number once more (`accelerate launch` can
    # set it).
    accelerator.gradient_accumulation_steps = 1
    settle_strategy(accelerator)
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Accelerate would leave out a tracker that is not installed, and say nothing.

    Raises:
        ConfigurationError: a name that it does not know, or whose package is missing.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(kind) for kind in LoggerType]
    available = ["all", *map(str, get_available_trackers())]
    for name in names:
        if name not in known:
            raise ConfigurationError(f"--report_to {name}: expected one or several of {', '.join(known)}. Correct it.")
        if name not in available:
            raise ConfigurationError(f"--report_to {name}: {name} is not installed. Install it, or leave it out.")


@contextmanager
def without_marks(model: nn.Module) -> Iterator[None]:
    """Take off what accelerate hangs on the instance (a wrapped `forward`, a mark that it is prepared).

    They would outlive the accelerator: the next `train` would take the model for prepared, and a later conversion
    would keep calling the old forward.
    """
    before = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - before:
            vars(model).pop(name)
