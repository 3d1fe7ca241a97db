"""What a run tells: train_log.jsonl and eval_log.jsonl for programs, a progress bar and lines for people.

train_log.jsonl has one object a step: {"step", "loss", "learning_rate", "grad_norm", "tokens", "predicted", "seconds",
"tokens_per_second"}; eval_log.jsonl one an evaluation: {"step", "nll", "perplexity", "tokens", "metrics",
"loss_name"}; sample_log.jsonl one a completion, before and after: {"step", "prompt", "completion"}. What is not finite
is null, and so is the perplexity of what are no tokens.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_geglu.training.reports.records import EvalRecord, SampleRecord, StepRecord

TRAIN_LOG = "train_log.jsonl"
EVAL_LOG = "eval_log.jsonl"
SAMPLE_LOG = "sample_log.jsonl"
BEFORE = -1
"""`resumed_at` of a training that begins with step 0 in a folder that may hold lines of its interrupted beginning."""


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinity become null, absolute paths their last part."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str) and os.path.isabs(value):
        return Path(value).name  # where something lay on this machine is nobody's business elsewhere
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@dataclass
class RunLog:
    """The two files. They are opened when the first record comes, so that a run that cannot start leaves nothing
    behind.

    Attributes:
        folder: where.
        prepare: called before the first write; makes the folder.
        resumed_at: step that the run goes on from. What the files say about later steps belongs to the lost end of the
            run before and is taken out.
    """

    folder: Path
    prepare: Callable[[], None]
    resumed_at: int | None = None
    _ready: bool = field(default=False, init=False)

    def step(self, record: StepRecord) -> None:
        """Write a step."""
        self._append(TRAIN_LOG, {**asdict(record), "tokens_per_second": round(record.tokens_per_second, 1)})

    def evaluation(self, record: EvalRecord) -> None:
        """Write an evaluation."""
        self._append(EVAL_LOG, asdict(record))

    def samples(self, records: Sequence[SampleRecord]) -> None:
        """Write completions; those that the file has of the same or a later step are replaced."""
        if not records:
            return
        self._get_ready()
        path = self.folder / SAMPLE_LOG
        earlier = _whole_lines(path, before=records[0].step)
        _rewrite(path, [*earlier, *(to_json(asdict(record)) + "\n" for record in records)])

    def _append(self, name: str, content: dict[str, Any]) -> None:
        self._get_ready()
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(to_json(content) + "\n")

    def _get_ready(self) -> None:
        if self._ready:
            return
        self._ready = True
        self.prepare()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.resumed_at is not None:
            for path in (self.folder / TRAIN_LOG, self.folder / EVAL_LOG):
                if path.exists():
                    _rewrite(path, _whole_lines(path, before=self.resumed_at + 1))


def _whole_lines(path: Path, *, before: int) -> list[str]:
    """Those of earlier steps. A line that was cut off by a crash has no newline; it is later than any checkpoint."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [line + "\n" for line in lines if json.loads(line)["step"] < before]


def _rewrite(path: Path, lines: Sequence[str]) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text("".join(lines), encoding="utf-8")
    os.replace(draft, path)


class Narrator:
    """Progress for people, on stderr: a bar on a terminal, and a line every so many steps anywhere.

    Args:
        name: which of the models is trained, at the head of each line.
        total: steps of the run.
        done: steps that a resumed run has behind it.
        every: steps between lines; 0 for none.
        quiet: say nothing (the processes besides the main one).
    """

    def __init__(self, name: str, *, total: int, done: int = 0, every: int = 10, quiet: bool = False) -> None:
        self._name, self._total, self._done, self._every, self._quiet = name, total, done, every, quiet
        self._seconds = 0.0
        self._console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, speed="-")

    def __enter__(self) -> Narrator:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, markup=False)

    def step(self, record: StepRecord) -> None:
        """Move the bar; now and then print a line."""
        self._seconds += record.seconds
        speed = f"{record.tokens_per_second:,.0f}"
        self._bar.update(self._task, completed=record.step, speed=speed)
        if self._every and (record.step % self._every == 0 or record.step == self._total):
            left = self._seconds / (record.step - self._done) * (self._total - record.step)
            self.say(
                f"{self._name}  step {record.step}/{self._total}  loss {record.loss:.4f}  lr "
                f"{record.learning_rate:.2e}  grad norm {record.grad_norm:.2f}  {speed} tokens/s  {clock(left)} left"
            )

    def samples(self, records: Sequence[SampleRecord]) -> None:
        """Print prompts with what was written to them."""
        for record in records:
            end, written = (" ".join(text.split()) for text in (record.prompt[-60:], record.completion))
            self.say(f"{self._name}  step {record.step}/{self._total}  ...{end} -> {written[:200]}")

    def evaluation(self, record: EvalRecord) -> None:
        """Print a line."""
        told = {record.loss_name: f"{record.nll:.4f}"}
        if record.perplexity is not None:
            told["perplexity"] = f"{record.perplexity:.2f}"
        told |= {name: f"{value:.4f}" for name, value in record.metrics.items()}
        line = "  ".join(f"{name} {value}" for name, value in told.items())
        self.say(f"{self._name}  step {record.step}/{self._total}  evaluation: {line}  ({record.tokens:,} predicted)")


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
