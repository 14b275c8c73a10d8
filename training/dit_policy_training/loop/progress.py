"""How far a run is: a bar on a terminal; where there is none, as under nohup or Slurm, a line for each row."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_TOLD = [
    ("loss", "loss", ".4f"),
    ("lr", "lr", ".1e"),
    ("validation_loss", "validation", ".4f"),
    ("validation_action_error", "action error", ".4g"),
]
_RATES = [("steps_per_s", "steps/s", ".1f"), ("samples_per_s", "samples/s", ".0f")]

SPEED_PERIOD = 300.0  # seconds that the time left is estimated from: validation and checkpoints must not make it jump


class TrainingProgress:
    """The progress of a run of `total` steps, `done` of which an earlier run did."""

    def __init__(self, console: Console, total: int, done: int = 0):
        self._total, self._done, self._first = total, done, done
        self._console = console
        self._started = time.monotonic()
        self.rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=SPEED_PERIOD,
        )
        """For the bars of other jobs, such as decoding; a task of it has the field `note`."""
        self._bar: TaskID | None = None

    def __enter__(self) -> Self:
        self.rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rich.stop()

    def advance(self, steps: int = 1) -> None:
        """So many steps more are done."""
        if self._bar is None:  # not earlier: what comes before the first step is no part of the time left
            self._started = time.monotonic()
            self._bar = self.rich.add_task("training", total=self._total, completed=self._done, note="")
        self._done += steps
        self.rich.update(self._bar, completed=self._done)

    def row(self, row: Mapping[str, float]) -> None:
        """Show a row of metrics.jsonl."""
        if self._bar is not None and self._console.is_terminal:
            self.rich.update(self._bar, note=figures(row))
        else:
            self.say(f"step {int(row['step'])}/{self._total}  {figures(row)}  {self._left()}")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.rich.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> str:
        done_here = self._done - self._first
        if done_here == 0:
            return ""
        return f"{duration((time.monotonic() - self._started) / done_here * (self._total - self._done))} left"


def figures(row: Mapping[str, float]) -> str:
    """A row of metrics.jsonl in a few words; one of a measurement alone has no training loss."""
    told = [f"{words} {row[name]:{form}}" for name, words, form in _TOLD if name in row]
    told += [f"{row[name]:{form}} {words}" for name, words, form in _RATES if name in row]
    return "  ".join(told)


def duration(seconds: float) -> str:
    """1:02:03 of 3723 seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
