"""`python -m dit_policy_training.compare`: several checkpoints side by side, at the same moments from the same noise.

Writes to output_dir: `report.html`, one file that opens offline, and `report.json`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as TextTable

from dit_policy_ros.policy.sampling import Sampling
from dit_policy_training import cli
from dit_policy_training.data.table import load_table
from dit_policy_training.evaluate import progress_of
from dit_policy_training.judging.comparison import best, compare, figures
from dit_policy_training.judging.evaluation import on_training
from dit_policy_training.judging.held_out import rows_to_judge
from dit_policy_training.judging.opening import checkpoints_in, some_of
from dit_policy_training.judging.pages import comparison_page, told

_MANY_TASKS = 5  # columns of the table


@dataclass
class CompareConfig:
    """Compare checkpoints on recorded episodes; best on those that none of them was trained on."""

    checkpoints: list[Path]  # folders of checkpoints, or of runs, of which all that are kept are taken
    dataset_path: Path  # folder of a LeRobotDataset v3
    embodiment: Path | None = None  # the robot's YAML, for a dataset that brings none
    output_dir: Path = Path("outputs/compare")  # of report.html and report.json
    device: str = "cpu"  # cpu, cuda, cuda:1, ...
    episodes: list[int] = field(default_factory=list)  # only these
    held_out: bool = False  # only episodes that all of the runs held out, which none was trained on
    max_samples: int = 0  # moments at most, drawn at random; 0: all
    batch_size: int = 64  # moments at a time
    seed: int = 0  # of the noise, and of the moments drawn
    sampler: str = ""  # ddpm, ddim, dpm_solver++, or euler, heun, rk4; empty: as each checkpoint says
    denoising_steps: int = 0  # 0: as each checkpoint says
    guidance_scale: float = 0.0  # of the instruction; 0: as each checkpoint says


def run(config: CompareConfig, console: Console | None = None) -> dict[str, Any]:
    """Compare, write the reports, print the figures; what report.json holds."""
    console = console or Console()
    for name, least in (("batch_size", 1), ("max_samples", 0), ("seed", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
    folders = [folder for given in config.checkpoints for folder in checkpoints_in(Path(given))]
    if not folders:
        raise ValueError("no checkpoints: give --checkpoints='[FOLDER, FOLDER]'")
    table = load_table(config.dataset_path, config.embodiment)
    rows = rows_to_judge(table, folders, config.episodes, config.held_out)
    with progress_of(console) as advance:
        comparison = compare(
            folders,
            table,
            some_of(rows, config.max_samples, config.seed),
            device=config.device,
            sampling=Sampling(config.sampler or None, config.denoising_steps or None, config.guidance_scale or None),
            seed=config.seed,
            batch_size=config.batch_size,
            advance=advance,
        )
    report = figures(comparison)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (config.output_dir / "report.html").write_text(comparison_page(report), encoding="utf-8")
    _print(report, console)
    console.print(f"{config.output_dir / 'report.html'}, report.json", highlight=False, soft_wrap=True)
    return report


def _print(report: dict[str, Any], console: Console) -> None:
    settings, tasks = report["settings"], list(report["checkpoints"][0]["by_task"])
    tasks = tasks if len(tasks) <= _MANY_TASKS else []  # the report has them
    steps = settings["steps compared"]
    table = TextTable(
        title=f"{settings['moments']} moments of {report['dataset']['name']}, the first {steps} steps",
        title_justify="left",
        caption=f"mean |predicted - recorded|, {report['unit']['name']}; the best first",
    )
    table.add_column("checkpoint", overflow="fold")
    for heading in ("error", "executed", *tasks):
        table.add_column(heading, justify="right")
    for one in sorted(report["checkpoints"], key=lambda one: one["error"]):
        values = [one["error"], one["error_executed"], *(one["by_task"][task] for task in tasks)]
        table.add_row(one["name"], *(told(report, value) for value in values))
    for name, one in report["baselines"].items():
        table.add_row(name, told(report, one["error"]), style="dim")
    console.print(table)
    for one in report["checkpoints"]:
        console.print(f"- {one['name']}: {on_training(one)}", highlight=False, markup=False)
    for name, why in report["left_out"].items():
        console.print(f"[yellow]left out[/yellow] {name}: ", end="", highlight=False)
        console.print(why, highlight=False, markup=False)
    winner = best(report)["name"]
    alike = [
        ({one["of"], one["to"]} - {winner}).pop()
        for one in report["differences"]
        if winner in (one["of"], one["to"]) and not one["sure"]
    ]
    if alike:
        console.print(f"- {winner} cannot be told apart from {', '.join(alike)}.", highlight=False, markup=False)


def main() -> int:
    """The command line; returns the exit status."""

    def program(config: CompareConfig) -> int:
        run(config)
        return 0

    return cli.run(program, CompareConfig, "dit_policy_training.compare")


if __name__ == "__main__":
    raise SystemExit(main())
