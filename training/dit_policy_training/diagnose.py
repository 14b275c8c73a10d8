"""`python -m dit_policy_training.diagnose`: why does a policy stand still, or do the wrong task?

The loss does not tell: a policy that ignores the words, and pushes whichever block is nearest, reaches almost the same.
So the same moments of a dataset, with the same noise, are asked again with another instruction, with none, with each
camera blank and with the mean state; what it attends to must change the prediction. Then where the predicted robot
stands still, which task has how many examples, how far off it is at each, and how alike the instructions are to the
text encoder. Each finding comes with what to do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.table import Table as TextTable
from rich.text import Text

from dit_policy_training import cli
from dit_policy_training.data.table import load_table
from dit_policy_training.judging.diagnosis import Diagnosis, amount_of_work, diagnose
from dit_policy_training.judging.findings import Finding, findings
from dit_policy_training.judging.held_out import UNKNOWN, rows_to_judge
from dit_policy_training.judging.opening import open_subject

REPORT, PICTURE = "diagnosis.json", "diagnosis.png"
MOST_ROWS = 12
CLEAN = (
    "nothing stands out: at these moments it attends to what it is given, and moves about as far as was recorded. "
    "Whether it does the task, only the simulator or the robot tells."
)


@dataclass
class DiagnoseConfig:
    """Hold a policy against recorded episodes; best against those that it was not trained on."""

    checkpoint_dir: Path  # a checkpoint, or a run, whose last one is taken
    dataset_path: Path  # folder of a LeRobotDataset v3 of the same robot
    embodiment: Path | None = None  # the robot's YAML, for a dataset that brings none
    output_dir: Path | None = None  # folder for diagnosis.json and diagnosis.png; empty: they are not written
    held_out: bool = False  # only episodes that the run held out, which it was not trained on
    seconds: float = 2.0  # from each episode's start, where the words must tell the task: later the arm's pose does
    samples: int = 256  # moments in those first seconds, and as many over whole episodes
    idle_motion: float = 0.01  # idle: no executed action gets further than this share of its range
    batch_size: int = 64  # moments asked at once
    seed: int = 0  # of the noise
    device: str = "cpu"  # cpu, cuda, cuda:1, ...

    def validate(self) -> None:
        """Raises ValueError naming every setting that is out of range."""
        problems = [
            f"{name} must be positive, got {getattr(self, name)}"
            for name in ("seconds", "samples", "idle_motion", "batch_size")
            if not getattr(self, name) > 0
        ]
        if self.seed < 0:
            problems.append(f"seed must be at least 0, got {self.seed}")
        if problems:
            raise ValueError("settings that cannot be:\n  - " + "\n  - ".join(problems))


def run(config: DiagnoseConfig, console: Console | None = None) -> int:
    """Print the diagnosis, and write it if asked to; exit status 0."""
    config.validate()
    console = console or Console()
    subject = open_subject(config.checkpoint_dir, load_table(config.dataset_path, config.embodiment), config.device)
    among = rows_to_judge(subject.table, [subject.folder], held_out=config.held_out)
    columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=amount_of_work(subject, config.seconds, config.samples, among))
        diagnosis = diagnose(
            subject,
            seconds=config.seconds,
            samples=config.samples,
            idle_motion=config.idle_motion,
            seed=config.seed,
            batch_size=config.batch_size,
            among=among,
            advance=lambda count: progress.advance(task, count),
        )
    found = findings(diagnosis, subject.policy.config)
    console.print(Group(*_shown(diagnosis, found, config.seconds)))
    if config.output_dir is not None:
        _write(diagnosis, found, config.output_dir)
        console.print(f"{config.output_dir / REPORT}, {config.output_dir / PICTURE}", highlight=False)
    return 0


def _write(diagnosis: Diagnosis, found: list[Finding], folder: Path) -> None:
    # matplotlib: seconds to import, and only here.
    from dit_policy_training.judging.diagnosis_picture import draw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(diagnosis.to_json(found), encoding="utf-8")
    draw(diagnosis, folder / PICTURE)


def _shown(diagnosis: Diagnosis, found: list[Finding], seconds: float) -> Iterator[TextTable | Padding | Text]:
    unit = diagnosis.unit
    yield _attention(diagnosis, seconds)
    yield from _other_words(diagnosis)
    yield _tasks(diagnosis)
    if diagnosis.pairs:
        yield _pairs(diagnosis)
    idle = diagnosis.idling
    yield Text(
        f"idle chunks: {idle.predicted:.0%} predicted, {idle.recorded:.0%} recorded. Where the recorded robot moves, "
        f"{idle.stuck:.0%} are idle{_way(idle.way)}. Idle frames in the data: {idle.idle_frames} "
        f"({idle.idle_frames_share:.0%})"
    )
    still = (
        ""
        if diagnosis.standing_still is None
        else f", of a robot that does not move {unit.of(diagnosis.standing_still)}"
    )
    yield Text(f"error over whole episodes: {unit.of(diagnosis.error)} {unit.name}{still}")
    yield Text(f"{diagnosis.seen or UNKNOWN}\n")
    for finding in found:
        style = "bold red" if finding.severity == "problem" else "bold"
        yield Text(f"{finding.severity}: {finding.found}", style=style)
        yield Padding(Text(finding.advice), (0, 0, 0, 4))
    if not found:
        yield Text(CLEAN, style="bold green")


def _way(way: float | None) -> str:
    return "" if way is None else f", and the prediction goes {way:.0%} of the recorded way"


def _other_words(diagnosis: Diagnosis) -> Iterator[Text]:
    """Which words took the place of which."""
    for answer in diagnosis.answers:
        pairs = [f"'{other}' for '{task}'" for task, other in answer.words.items()]
        more = f", and {len(pairs) - MOST_ROWS} more" if len(pairs) > MOST_ROWS else ""
        if pairs:
            yield Text(f"{answer.asked}: {', '.join(pairs[:MOST_ROWS])}{more}")


def _attention(diagnosis: Diagnosis, seconds: float) -> TextTable:
    unit = diagnosis.unit
    table = TextTable(
        Column("asked", no_wrap=True),
        f"error ({unit.name})",
        f"change ({unit.name})",
        "times noise",
        "whole episodes: change",
        "times noise",
        title=f"{diagnosis.checkpoint}: the first {seconds:g} s of episodes",
        title_justify="left",
    )
    for answer, later in zip(diagnosis.answers, diagnosis.whole, strict=True):
        table.add_row(
            answer.asked,
            unit.of(answer.error),
            unit.of(answer.change),
            f"{answer.times_noise:.2f}",
            unit.of(later.change),
            f"{later.times_noise:.2f}",
        )
    return table


def _tasks(diagnosis: Diagnosis) -> TextTable:
    unit = diagnosis.unit
    table = TextTable("task", "episodes", "frames", f"error ({unit.name})")
    for task in diagnosis.tasks[:MOST_ROWS]:
        error = "not asked" if task.error is None else unit.of(task.error)
        table.add_row(Text(task.task), str(task.episodes), str(task.frames), error)
    if len(diagnosis.tasks) > MOST_ROWS:
        table.add_row(f"and {len(diagnosis.tasks) - MOST_ROWS} more", "", "", "")
    return table


def _pairs(diagnosis: Diagnosis) -> TextTable:
    table = TextTable("the most alike instructions", "", "text tower", "after projection")
    for pair in diagnosis.pairs[:3]:
        table.add_row(Text(pair.one), Text(pair.other), f"{pair.tower:.3f}", f"{pair.projected:.3f}")
    return table


def main() -> int:
    """The command line; returns the exit status."""
    return cli.run(run, DiagnoseConfig, "dit_policy_training.diagnose")


if __name__ == "__main__":
    raise SystemExit(main())
