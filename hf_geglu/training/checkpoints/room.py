"""No room on the disk: a sentence that says what was needed and what is left, in place of what a library raises."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from hf_geglu.errors import OutputError
from hf_geglu.files.folder import said_when_full, why_full
from hf_geglu.training.checkpoints.state import TrainingState
from hf_geglu.training.processes.tensor_file import Held

ON_DISK = 1.02
"""Beside the tensors there are names, logs, tokenizer: little, except in the smallest models."""


def weight_bytes(model: nn.Module) -> int:
    """Of a model on disk; what is tied counts once, and buffers that are not saved do not count."""
    saved = model.state_dict().keys()
    buffers = (buffer for name, buffer in model.named_buffers() if name in saved)
    return sum(_bytes(tensor) for tensor in [*model.parameters(), *buffers])


def checkpoint_bytes(state: TrainingState) -> int:
    """Of a checkpoint on disk."""
    kept = [state.moments, *state.companions.values()]
    return weight_bytes(state.model) + sum(_bytes(tensor) for each in kept for tensor in each.tensors().values())


def _bytes(tensor: Held) -> int:
    return tensor.shape.numel() * tensor.dtype.itemsize


def no_room(what: str, folder: Path, *, needed: int | None, reason: str, then: str) -> OutputError:
    """The error of a write that did not fit.

    Args:
        what: was to be written.
        folder: where it was to go.
        needed: bytes of it, if known.
        reason: in the words of the system.
        then: what is still there, and what to do next.
    """
    from accelerate.utils import convert_bytes

    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = convert_bytes(shutil.disk_usage(place).free)
    need = "" if needed is None else f" about {convert_bytes(int(needed * ON_DISK))}"
    return OutputError(
        f"{what} cannot be written into {folder.resolve().name} ({reason}): it needs{need or ' room'}, and {free} are "
        f"free there. {then}"
    )


def room_for(what: str, folder: Path, *, needed: int | None = None, then: str) -> AbstractContextManager[None]:
    """Raise `no_room` where the block runs out of it.

    Raises:
        OutputError: it does.
    """
    return said_when_full(lambda reason: no_room(what, folder, needed=needed, reason=reason, then=then))


def in_all_or_none(
    accelerator: Any, write: Callable[[], None], undo: Callable[[], None], full: Callable[[str], OutputError]
) -> None:
    """Let every process write; where one of them has no room, all of them raise, so that none waits for it.

    Args:
        accelerator: of this process.
        write: what this process writes.
        undo: takes away what was written; called by the main process.
        full: the error, given the words of the system.

    Raises:
        OutputError: what `full` makes.
    """
    failure: Exception | None = None
    try:
        write()
    except Exception as error:
        failure = error
    reason = None if failure is None else (why_full(failure) or "")
    reasons = [reason]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        reasons = gather_object(reasons)
    told = [each for each in reasons if each is not None]
    if not told:
        return
    if accelerator.is_main_process:
        undo()
    if failure is not None and not reason:
        raise failure
    raise full(max(told)) from failure
