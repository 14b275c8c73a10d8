"""What a person sees while bags are converted, and at the end."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dit_policy_training.conversion import jobs
from dit_policy_training.conversion.assembling import Contents, Findings
from dit_policy_training.conversion.manifest import Refusal, ShardRecord

_NAMED = 3  # bags in work that are named
_WARNINGS = 5  # that are shown; the report has all
_ROOMY = 110  # columns, so that there is room for names


class ProgressBar:
    """Bags and frames done, frames a second, time left (by the bags' sizes), and which bags are in work."""

    def __init__(self, console: Console, work: Sequence[jobs.Job], bags: int):
        """`work`: the jobs to come, of a run's `bags`."""
        self._work = {job.number: job for job in work}
        self._bags, self._done = bags, bags - len(work)
        self._in_work: dict[int, jobs.Progress] = {}
        self._finished_bytes = 0.0
        self._finished_frames = 0
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[names]}", style="dim"),
            console=console,
        )
        total = sum(job.size for job in work)
        self._task = self._bar.add_task("converting", total=max(total, 1), counts=self._counts(), names="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, event: jobs.Event) -> None:
        """Take an event in."""
        if isinstance(event, jobs.Begun):
            self._in_work[event.number] = jobs.Progress(event.number, 0.0, 0)
        elif isinstance(event, jobs.Progress):
            self._in_work[event.number] = event
        else:
            self._finish(event)
        work = self._in_work.values()
        self._bar.update(
            self._task,
            completed=self._finished_bytes + sum(self._work[bag.number].size * bag.share for bag in work),
            counts=self._counts(),
            names=self._names(),
        )

    def _finish(self, event: jobs.Done) -> None:
        self._in_work.pop(event.number, None)
        job, outcome = self._work[event.number], event.outcome
        self._finished_bytes += job.size
        if isinstance(outcome, ShardRecord):
            self._done += 1
            self._finished_frames += outcome.frames
            if not self._bar.console.is_terminal:  # a batch job's log has no moving bar
                print_line(
                    self._bar.console, f"{job.given}: {counted(outcome.episodes, 'episode')}, {outcome.frames} frames"
                )
        elif isinstance(outcome, Refusal):
            self._done += 1
            print_refusal(self._bar.console, outcome)

    def _counts(self) -> str:
        frames = self._finished_frames + sum(bag.frames for bag in self._in_work.values())
        elapsed = (self._bar.tasks[0].elapsed or 0.0) if self._bar.tasks else 0.0
        speed = f"  {frames / elapsed:.0f} frames/s" if elapsed > 0 else ""
        return f"{self._done}/{self._bags} bags  {frames} frames{speed}"

    def _names(self) -> str:
        if self._bar.console.width < _ROOMY:
            return ""
        names = [self._work[number].given.name for number in self._in_work]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return escape(", ".join(names[:_NAMED]) + more)


def print_line(console: Console, text: str) -> None:
    """A line as it is: no markup, no breaks, so that it can be searched."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_refusal(console: Console, refusal: Refusal) -> None:
    """A bag that was left out, in red."""
    console.print(f"[red]refused[/red] {escape(f'{refusal.bag}: {refusal.reason}')}", highlight=False, soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """Such as "1 bag", "2 bags"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Summary:
    """The figures of a run, for the table at its end."""

    def __init__(self, output: Path):
        self._output = output
        self._started = time.perf_counter()
        self.converted = 0  # bags that this run read
        self.removed = 0  # shards that no bag needs any more

    def table(self, contents: Contents, findings: Findings) -> Table:
        """Of what the dataset holds, how it was checked, what was refused, and what to look at."""
        table = Table(title=str(self._output), show_header=False, title_justify="left")
        seconds = time.perf_counter() - self._started
        frames = sum(shard.frames for shard in contents.shards)
        episodes = sum(shard.episodes for shard in contents.shards)
        converted = f"{len(contents.shards)} of " if contents.refusals else ""
        table.add_row("episodes", f"{episodes} from {converted}{counted(len(contents.outcomes), 'bag')}")
        table.add_row("frames", f"{frames}, {_megabytes(self._output)}")
        table.add_row("this run", f"{counted(self.converted, 'bag')} read in {seconds:.1f} s")
        if self.removed:
            table.add_row("removed", f"{counted(self.removed, 'shard')} that no bag needs any more")
        for task, count in _tasks(contents.shards).items():
            table.add_row("task", escape(f"{task}: {counted(count, 'episode')}"))
        for refusal in contents.refusals:
            table.add_row(Text("refused", "red"), escape(f"{refusal.bag}: {refusal.reason}"))
        table.add_row("checked", _checked(findings.figures))
        for warning in findings.warnings[:_WARNINGS]:
            table.add_row(Text("warning", "yellow"), escape(warning))
        if len(findings.warnings) > _WARNINGS:
            table.add_row(Text("warnings", "yellow"), f"{len(findings.warnings) - _WARNINGS} more, in the report")
        table.add_row("report", str(self._output / "report.html"))
        return table


def _checked(figures: dict[str, Any]) -> str:
    if figures["mode"] == "off":
        return "not at all (--verify=off)"
    worst = [found["min"] for found in figures["psnr_db"].values() if found["min"] is not None]
    quality = f"of {min(worst):.1f} dB or more" if worst else "identical"  # none has a figure: all are lossless
    pictures = f"{counted(figures['pictures_compared'], 'picture')} {quality}"
    return f"--verify={figures['mode']}: {figures['values_compared']} values exact, {pictures}; all frames there"


def _tasks(shards: Sequence[ShardRecord]) -> Counter[str]:
    """Episodes by task, in order of appearance; one with several tasks counts for each."""
    kept = [e for shard in shards for e in shard.account["episodes"] if e["left_out"] is None]
    return Counter(task for episode in kept for task in dict.fromkeys(task for _, task in episode["tasks"]))


def _megabytes(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"
