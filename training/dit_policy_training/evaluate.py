"""`python -m dit_policy_training.evaluate`: how far a policy's chunks are from what was recorded, and in closed loop.

Writes to output_dir: `report.html`, one file that opens offline, and `report.json`. Best on episodes that were not
trained on; the error of those that were shows how well they are remembered.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as TextTable

from dit_policy_ros.policy.sampling import Sampling
from dit_policy_training import cli
from dit_policy_training.data.table import load_table
from dit_policy_training.judging import rollouts
from dit_policy_training.judging.evaluation import (
    STILL,
    Choice,
    Evaluation,
    evaluate,
    figures,
    on_samples,
    on_training,
    verdicts,
)
from dit_policy_training.judging.opening import Subject, open_subject
from dit_policy_training.judging.pages import evaluation_page, told

ClosedLoop = Literal["none", "simulated_time", "node"]
SIMULATED_ARM = "sim_arm"
_LEAST = {
    "max_samples": 0,
    "sampled_moments": 1,
    "drawn_episodes": 0,
    "batch_size": 1,
    "seed": 0,
    "closed_loop_episodes": 1,
}


@dataclass
class EvaluateConfig:
    """Measure a policy on recorded episodes; best on those that it was not trained on."""

    checkpoint_dir: Path  # of the policy; or of a run, whose last checkpoint is taken
    dataset_path: Path  # folder of a LeRobotDataset v3
    embodiment: Path | None = None  # the robot's YAML, for a dataset that brings none
    output_dir: Path = Path("outputs/evaluate")  # of report.html and report.json
    device: str = "cpu"  # cpu, cuda, cuda:1, ...
    episode: int | None = None  # only this one
    episodes: list[int] = field(default_factory=list)  # only these
    held_out: bool = False  # only episodes that the run held out, which it was not trained on
    max_samples: int = 0  # moments at most, drawn at random; 0: all
    samples: int = 8  # chunks of one moment from different noise, to see how far they are apart
    sampled_moments: int = 200  # moments of which so many chunks are predicted
    drawn_episodes: int = 3  # whose chunks are drawn: the worst, the median and the best
    batch_size: int = 64  # moments at a time
    seed: int = 0  # of the noise, and of the moments drawn
    sampler: str = ""  # ddpm, ddim, dpm_solver++, or euler, heun, rk4; empty: as the checkpoint says
    denoising_steps: int = 0  # 0: as the checkpoint says
    guidance_scale: float = 0.0  # of the instruction; 0: as the checkpoint says
    closed_loop: ClosedLoop = "none"  # of the simulated arm's policy: in simulated time, or with the node in real time
    closed_loop_episodes: int = 20  # scenes there

    def choice(self) -> Choice:
        """The same for the library. Raises ValueError for what cannot be."""
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        return Choice(
            episodes=[*self.episodes, *([] if self.episode is None else [self.episode])],
            held_out=self.held_out,
            most=self.max_samples,
            samples=self.samples,
            sampled_moments=self.sampled_moments,
            drawn_episodes=self.drawn_episodes,
            seed=self.seed,
            batch_size=self.batch_size,
            sampling=Sampling(self.sampler or None, self.denoising_steps or None, self.guidance_scale or None),
        )


def run(config: EvaluateConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluate, write the reports, print the figures; what report.json holds."""
    console = console or Console()
    choice = config.choice()
    table = load_table(config.dataset_path, config.embodiment)
    subject = open_subject(config.checkpoint_dir, table, config.device)
    check_closed_loop(subject, config.closed_loop)
    with progress_of(console) as advance:
        evaluation = evaluate(subject, choice, advance)
    report = figures(evaluation)
    _write(evaluation, report, config.output_dir)
    _print(report, console)
    if config.closed_loop != "none":  # after the rest is written: the simulator may fail, or be interrupted
        with console.status("in closed loop"):
            report["closed_loop"] = _closed_loop(subject, config)
        _write(evaluation, report, config.output_dir)
        _print_closed_loop(report["closed_loop"], console)
    console.print(f"{config.output_dir / 'report.html'}, report.json", highlight=False, soft_wrap=True)
    return report


def _write(evaluation: Evaluation, report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.html").write_text(evaluation_page(evaluation, report), encoding="utf-8")


def check_closed_loop(subject: Subject, way: ClosedLoop) -> None:
    """Raises ValueError where there is no simulator for the robot."""
    if way != "none" and (subject.embodiment is None or subject.embodiment.name != SIMULATED_ARM):
        robot = "a robot that is not described" if subject.embodiment is None else f"'{subject.embodiment.name}'"
        raise ValueError(
            f"--closed_loop={way} is for policies of the simulated arm ('{SIMULATED_ARM}'); {subject.folder} is of "
            f"{robot}: leave it out"
        )


def _closed_loop(subject: Subject, config: EvaluateConfig) -> dict[str, Any]:
    try:
        return _rolled_out(subject, config)
    except rollouts.ClosedLoopError as error:
        page = config.output_dir / "report.html"
        raise rollouts.ClosedLoopError(f"the closed loop failed; all else is in {page}\n{error}") from error


def _rolled_out(subject: Subject, config: EvaluateConfig) -> dict[str, Any]:
    given = {name: getattr(config, name) for name in ("sampler", "denoising_steps", "guidance_scale")}
    parameters = {name: value for name, value in given.items() if value}
    if config.closed_loop == "node":
        device = {"device": config.device}
        output = config.output_dir / "closed_loop"
        return rollouts.with_node(subject.folder, config.closed_loop_episodes, output, parameters | device)
    options = {"episodes": config.closed_loop_episodes, "device": config.device}
    return rollouts.in_simulated_time(subject.folder, options | parameters)


@contextmanager
def progress_of(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that is told of: (what, done, of how many)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
    bars: dict[str, TaskID] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:

        def advance(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done)

        yield advance


def _print(report: dict[str, Any], console: Console) -> None:
    unit = report["unit"]["name"]
    title = f"{report['checkpoint']} on {report['dataset']['name']}: {report['settings']['moments']} moments"
    table = TextTable(title=title, title_justify="left", caption=f"mean |predicted - recorded|, {unit}")
    table.add_column("")
    for heading in ("error", "executed steps", *report["baselines"]):
        table.add_column(heading, justify="right")
    baselines = list(report["baselines"].values())
    every = [report["error"], report["error_executed"], *(baseline["error"] for baseline in baselines)]
    table.add_row("all", *(told(report, value) for value in every), end_section=True)
    for number, action in enumerate(report["actions"]):
        others = [baseline["by_action"][number] for baseline in baselines]
        values = [action["error"], action["error_executed"], *others]
        table.add_row(
            action["name"], *(told(report, value) for value in values), end_section=number + 1 == len(report["actions"])
        )
    for task in report["tasks"]:
        still = [told(report, task[STILL])] if STILL in report["baselines"] else []
        table.add_row(task["task"], told(report, task["error"]), told(report, task["error_executed"]), *still)
    console.print(table)
    for text in [*(text for _, text in verdicts(report)), on_training(report), on_samples(report)]:
        if text:
            console.print(f"- {text}", highlight=False)


def _print_closed_loop(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"- Closed loop {found['how']}: {found['success']} of {found['episodes']} succeeded, the wrong block moved "
        f"{found['wrong_block']} times, {found['refused']} chunks refused.",
        highlight=False,
    )


def main() -> int:
    """The command line; returns the exit status."""

    def program(config: EvaluateConfig) -> int:
        run(config)
        return 0

    return cli.run(program, EvaluateConfig, "dit_policy_training.evaluate")


if __name__ == "__main__":
    raise SystemExit(main())
