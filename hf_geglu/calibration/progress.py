"""A bar that counts the batches of a calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_geglu.calibration.gather import Progress as Tell


@contextmanager
def batches_bar(description: str, console: Console | None = None) -> Iterator[Tell]:
    """What `calibrate` and `convert` take as `progress`; draws nothing where nobody looks (no terminal).

    Args:
        description: what is being done.
        console: where to draw; standard error otherwise.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = console or Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show
