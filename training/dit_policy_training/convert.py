"""`python -m dit_policy_training.convert`: rosbag2 recordings to a LeRobotDataset v3.

Each bag is read once. Its messages go, undecoded and with their header stamps, through the very buffer that
the policy node uses; frames are taken from it on an integer grid of 1/fps. One bag is one episode.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.observations import ObservationError
from dit_policy_training import cli
from dit_policy_training.bags import find_bags, read_messages
from dit_policy_training.commands import ControllerOptions
from dit_policy_training.episodes import Row, sample_rows, topics_of
from dit_policy_training.video import VideoOptions
from dit_policy_training.writing import DatasetWriter, replacing


@dataclass
class ConvertConfig:
    """Bags to a dataset. Exit status: 0 if every bag was converted, 1 if any was refused (the rest is written)."""

    bags: str  # a bag, a folder of bags, or a glob pattern
    embodiment: Path  # the robot's description (YAML); its fps is the dataset's
    output: Path  # folder of the dataset; appears only when complete
    overwrite: bool = False  # replace `output` if it exists
    use_videos: bool = True  # false: lossless PNG pictures inside the table
    controller: ControllerOptions = field(default_factory=ControllerOptions)
    video: VideoOptions = field(default_factory=VideoOptions)


@dataclass(frozen=True)
class Refusal:
    """A bag that was left out, and why."""

    bag: Path
    reason: str


def convert(config: ConvertConfig, console: Console | None = None) -> list[Refusal]:
    """Convert all bags; returns those that were refused. Raises ValueError if none could be converted."""
    console = console or Console()
    embodiment = Embodiment.load(config.embodiment)
    bags = find_bags(config.bags)
    refusals: list[Refusal] = []
    tasks: Counter[str] = Counter()
    started = time.perf_counter()
    with replacing(config.output, config.overwrite) as folder:
        with (
            DatasetWriter(folder, embodiment, config.use_videos, config.video) as writer,
            _progress(console) as bar,
        ):
            job = bar.add_task("converting", total=len(bags), speed="")
            for bag in bags:
                messages = read_messages(bag, topics_of(embodiment))
                episode_tasks: set[str] = set()
                try:
                    writer.write(_watched(sample_rows(messages, embodiment, config.controller), episode_tasks))
                except (ValueError, ObservationError) as error:
                    refusals.append(Refusal(bag, str(error)))
                    bar.console.print(f"[red]refused[/red] {bag}: {error}", highlight=False, soft_wrap=True)
                tasks.update(episode_tasks)
                bar.update(job, advance=1, speed=f"{writer.frames / (time.perf_counter() - started):.0f} frames/s")
            if len(refusals) == len(bags):
                raise ValueError(f"none of {len(bags)} bags could be converted; the reasons stand above")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    seconds = time.perf_counter() - started
    console.print(_summary(config.output, writer.frames, seconds, size, len(bags), refusals, tasks))
    return refusals


def _watched(rows: Iterable[Row], tasks: set[str]) -> Iterator[Row]:
    for row in rows:
        tasks.add(row.task)
        yield row


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("bags  {task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _summary(
    output: Path,
    frames: int,
    seconds: float,
    size: int,
    bags: int,
    refusals: list[Refusal],
    tasks: Counter[str],
) -> Table:
    table = Table(title=str(output), show_header=False, title_justify="left")
    table.add_row("episodes", f"{bags - len(refusals)} of {bags} bags")
    table.add_row("frames", f"{frames} in {seconds:.1f} s, {frames / seconds:.0f} frames/s, {size / 1e6:.1f} MB")
    for task, count in sorted(tasks.items()):
        table.add_row(f"task '{task}'", f"{count} episodes")
    for refusal in refusals:
        table.add_row(f"refused {refusal.bag.name}", refusal.reason)
    return table


def main() -> int:
    """The command line; returns the exit status."""
    return cli.run(lambda config: 1 if convert(config) else 0, ConvertConfig, "dit_policy_training.convert")


if __name__ == "__main__":
    raise SystemExit(main())
