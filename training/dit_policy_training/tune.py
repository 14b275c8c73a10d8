"""`python -m dit_policy_training.tune`: which n_action_steps, sampler and denoising steps to run a policy with.

A policy of the simulated arm is tried in the simulator, in simulated time; any other is measured against recorded
episodes. Writes to output_dir `tune.json` and `tune.png`, a heat map a sampler, and, if --parameters names a copy of
config/dit_policy.yaml, the best values into it. Interrupted, the same command goes on with what is left.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as TextTable

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.configuration import PolicyConfig
from dit_policy_ros.policy.engine import PolicyEngine
from dit_policy_ros.policy.sampling import Sampling, samplers_of
from dit_policy_training import cli
from dit_policy_training.data.table import load_table
from dit_policy_training.evaluate import SIMULATED_ARM
from dit_policy_training.judging.colours import legible_on
from dit_policy_training.judging.node_file import read_with, write_values
from dit_policy_training.judging.opening import (
    Subject,
    Unit,
    checkpoint_in,
    open_subject,
    robot_of,
    some_of,
    unit_of,
)
from dit_policy_training.judging.rollouts import in_simulated_time
from dit_policy_training.judging.tuning import (
    Clock,
    Combination,
    Measured,
    Offline,
    Record,
    best_of,
    blank_observation,
    clock_of,
    digest,
)

How = Literal["auto", "simulator", "offline"]
MOST_GUIDANCE = 20  # that the node's parameter takes
_CAUTION = (
    "Offline nothing closes the loop: how soon the robot must react, which fewer n_action_steps would serve, it cannot "
    "know; and few denoising steps come near to the mean of what the policy could do, whose error is small even where "
    "there are two ways and the mean is none. Try the best, and its neighbours, on the robot."
)


@dataclass
class TuneConfig:
    """Try combinations of the node's parameters, and write the best into its parameter file."""

    checkpoint_dir: Path  # of the policy; or of a run, whose last checkpoint is taken
    how: How = "auto"  # simulator: of the simulated arm's policy; offline: on a dataset; auto: simulator if it can be
    dataset_path: Path | None = None  # folder of a LeRobotDataset v3; in the simulator it adds the error to the success
    embodiment: Path | None = None  # the robot's YAML, for a dataset that brings none
    n_action_steps: list[int] = field(default_factory=list)  # to try; empty: 1/4, 1/2, all of a chunk, the checkpoint's
    denoising_steps: list[int] = field(default_factory=lambda: [2, 5, 10])  # to try
    samplers: list[str] = field(default_factory=list)  # to try; empty: all of the policy's but ddpm
    guidance_scale: list[float] = field(default_factory=list)  # of the instruction, to try; empty: the checkpoint's
    episodes: int = 20  # scenes in the simulator, for each combination
    latency: float | None = None  # s that a chunk takes in the simulator; empty: what this machine takes
    workers: int = 1  # simulators at the same time
    max_samples: int = 200  # moments of the dataset
    seed: int = 0  # of the moments and the noise; in the simulator added to that of the first scene
    device: str = "cpu"  # cpu, cuda, cuda:1, ...
    output_dir: Path = Path("outputs/tune")  # of tune.json and tune.png
    parameters: Path | None = None  # the node's parameter file, into which the best is written
    output_parameters: Path | None = None  # write a copy of it instead

    def validate(self) -> None:
        """Raises ValueError naming every setting that cannot be."""
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in ("episodes", "workers", "max_samples")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} must be at least 0, got {value}"
            for name, value in (("latency", self.latency), ("seed", self.seed))
            if value is not None and not 0 <= value < inf
        ]
        problems += [
            f"{name} must be whole numbers of at least 1, got {getattr(self, name)}"
            for name in ("n_action_steps", "denoising_steps")
            if any(value < 1 for value in getattr(self, name))
        ]
        if any(not 0 < value <= MOST_GUIDANCE for value in self.guidance_scale):
            problems.append(f"guidance_scale must be above 0 and at most {MOST_GUIDANCE}, got {self.guidance_scale}")
        if not self.denoising_steps:
            problems.append("denoising_steps needs at least one number to try")
        if self.output_parameters is not None and self.parameters is None:
            problems.append("output_parameters needs --parameters, the file that it is a copy of")
        if self.output_parameters is not None and self.output_parameters.is_dir():
            problems.append(f"output_parameters {self.output_parameters} is a folder; give the name of a file in it")
        if problems:
            raise ValueError("settings that cannot be:\n  - " + "\n  - ".join(problems))


@dataclass(frozen=True)
class Study:
    """What is to be measured, and with what."""

    checkpoint: Path
    config: PolicyConfig
    robot: Embodiment | None
    simulated: bool
    subject: Subject | None
    clock: Clock
    fps: float
    combinations: list[Combination]

    @property
    def unit(self) -> Unit:
        """Of errors."""
        return unit_of(self.robot)


def run(config: TuneConfig, console: Console | None = None) -> dict[str, Any]:
    """Measure, draw, choose, write; what tune.json holds of the choice."""
    console = console or Console()
    config.validate()
    if config.parameters is not None:  # found out before the work, not after it
        read_with(config.parameters, _values(Combination("dpm_solver++", 1, 1)))
    study = prepare(config)
    record = Record(config.output_dir / "tune.json", _question(config, study))
    known = len([one for one in study.combinations if one in record.measured])
    if known:
        console.print(f"{known} of {len(study.combinations)} combinations are known from {config.output_dir}")
    for line in _plan(config, study, len(study.combinations) - known):
        console.print(line, highlight=False, soft_wrap=True)
    with _progress(console, known, len(study.combinations)) as done:
        try:
            for measured in _measurements(config, study, record):
                record.add(measured)
                done()
        except KeyboardInterrupt:
            kept = f"the same command goes on with {config.output_dir}/tune.json"
            said = kept if record.measured else "nothing is measured yet"
            raise KeyboardInterrupt(f"interrupted; {said}") from None
    every = [record.measured[one] for one in study.combinations]
    chosen, why = best_of(every, study.fps)
    choice = {"best": chosen.plain(), "why": why, "unit": study.unit.name, "scale": study.unit.scale}
    choice |= {} if study.simulated else {"caution": _CAUTION}
    record.write(choice)
    draw(every, chosen, study, config.output_dir / "tune.png")
    _print(every, chosen, why, study, console)
    if config.parameters is not None:
        target = config.output_parameters or config.parameters
        for line in write_values(config.parameters, _values(chosen.combination), config.output_parameters):
            console.print(f"{target}: {line}", highlight=False, soft_wrap=True)
    console.print(f"{config.output_dir / 'tune.png'}, tune.json", highlight=False, soft_wrap=True)
    return choice


def _plan(config: TuneConfig, study: Study, left: int) -> Iterator[str]:
    """What will be done, and what makes it less."""
    if left and study.simulated:
        yield (
            f"to measure: {left} combinations, each on {config.episodes} scenes in the simulator, {config.workers} at "
            "a time. Fewer --episodes, more --workers or --how=offline, which asks the dataset alone, take less"
        )
    elif left:
        yield f"to measure: {left} combinations, at {config.max_samples} moments of the dataset"


def _values(chosen: Combination) -> dict[str, int | float | str]:
    """The node's parameters of a combination. All of it: what the file says else would not be what was measured."""
    return asdict(chosen)


def prepare(config: TuneConfig) -> Study:
    """Load what is needed. Raises ValueError for what cannot be measured."""
    checkpoint = checkpoint_in(config.checkpoint_dir)
    robot = robot_of(checkpoint)
    can_simulate = robot is not None and robot.name == SIMULATED_ARM
    if config.how == "simulator" and not can_simulate:
        name = "a robot that is not described" if robot is None else f"'{robot.name}'"
        raise ValueError(
            f"{checkpoint} is of {name}, the simulator is of '{SIMULATED_ARM}': use --how=offline --dataset_path=FOLDER"
        )
    simulated = can_simulate and config.how != "offline"
    if not simulated and config.dataset_path is None:
        raise ValueError("measuring offline needs recorded episodes: give --dataset_path=FOLDER")
    subject = None
    if config.dataset_path is not None:
        subject = open_subject(checkpoint, load_table(config.dataset_path, config.embodiment), config.device)
    policy = load_checkpoint(checkpoint, config.device) if subject is None else subject.policy
    clock = Clock(PolicyEngine(policy), blank_observation(policy)) if subject is None else clock_of(subject)
    fps = robot.fps if robot is not None else subject.table.fps if subject is not None else 10
    combinations = combinations_of(config, policy.config)
    return Study(checkpoint, policy.config, robot, simulated, subject, clock, fps, combinations)


def combinations_of(config: TuneConfig, policy: PolicyConfig) -> list[Combination]:
    """What is tried. Raises ValueError for what the policy cannot follow."""
    most = policy.max_action_steps
    executed = sorted(set(config.n_action_steps or [max(most // 4, 1), max(most // 2, 1), policy.n_action_steps, most]))
    if executed[-1] > most:
        raise ValueError(f"n_action_steps {executed[-1]}: a chunk of this policy has {most} steps from now on")
    samplers = config.samplers or [name for name in samplers_of(policy.objective) if name != "ddpm"]
    scales = sorted({float(scale) for scale in config.guidance_scale or [policy.guidance_scale]})
    combinations = [
        Combination(sampler, steps, n, scale)
        for sampler in dict.fromkeys(samplers)
        for scale in scales
        for steps in sorted(set(config.denoising_steps))
        for n in executed
    ]
    for sampling in dict.fromkeys(one.sampling for one in combinations):
        sampling.resolve(policy)
    return combinations


def _question(config: TuneConfig, study: Study) -> dict[str, Any]:
    """What must be the same for a measurement to be used again."""
    table = None if study.subject is None else study.subject.table
    return {
        "checkpoint": digest(study.checkpoint),
        "simulated": study.simulated,
        "dataset": None if table is None else table.fingerprint,
        "episodes": config.episodes if study.simulated else 0,
        "latency": config.latency,
        "max_samples": config.max_samples,
        "seed": config.seed,
        "device": config.device,  # of the time of a chunk, and of the latency that follows from it
    }


def _measurements(config: TuneConfig, study: Study, record: Record) -> Iterator[Measured]:
    """What is not known yet, each as soon as it is done."""
    left = [one for one in study.combinations if one not in record.measured]
    if not study.simulated:
        for found in _errors(config, study, left):
            for one, (error, seam) in found.items():
                yield Measured(one, study.clock.milliseconds(one.sampling), error, seam)
        return
    timed = {one: study.clock.milliseconds(one.sampling) for one in left}
    errors = {one: told for found in _errors(config, study, left) for one, told in found.items()}
    with ThreadPoolExecutor(config.workers) as pool:
        jobs = {pool.submit(_roll_out, config, study, one, timed[one]): one for one in left}
        try:
            for job in as_completed(jobs):
                yield _simulated(job, jobs[job], timed, errors)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


Errors = dict[Combination, tuple[float, float | None]]


def _simulated(
    job: "Future[dict[str, Any]]", one: Combination, timed: dict[Combination, float], errors: Errors
) -> Measured:
    found = job.result()
    error, seam = errors.get(one, (None, None))
    return Measured(
        combination=one,
        chunk_ms=timed[one],
        error=error,
        seam=seam,
        episodes=found["episodes"],
        success=found["success"],
        wrong_block=found["wrong_block"],
        refused=found["refused"],
        latency=found["settings"]["latency"],
    )


def _errors(config: TuneConfig, study: Study, left: Sequence[Combination]) -> Iterator[Errors]:
    """On the dataset, if there is one: (error, seam) of those combinations that a sampling serves, together."""
    subject = study.subject
    if subject is None:
        return
    rows = some_of(np.arange(len(subject.table)), config.max_samples, config.seed)
    offline = Offline(subject, rows, config.seed)
    together: dict[Sampling, dict[int, Combination]] = {}
    for one in left:
        together.setdefault(one.sampling, {})[one.n_action_steps] = one
    for sampling, by_number in together.items():
        found = offline.measure(sampling, list(by_number))
        yield {by_number[n]: told for n, told in found.items()}


def _roll_out(config: TuneConfig, study: Study, one: Combination, milliseconds: float) -> dict[str, Any]:
    options: dict[str, Any] = {
        "episodes": config.episodes,
        "seed": 500_000 + config.seed,
        "n_action_steps": one.n_action_steps,
        "denoising_steps": one.denoising_steps,
        "sampler": one.sampler,
        "guidance_scale": one.guidance_scale,
        "latency": round(milliseconds / 1e3, 3) if config.latency is None else config.latency,
        "device": config.device,
    }
    return in_simulated_time(study.checkpoint, options)


@contextmanager
def _progress(console: Console, known: int, total: int) -> Iterator[Any]:
    columns = (TextColumn("combinations"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        job = progress.add_task("", total=total, completed=known)
        yield lambda: progress.update(job, advance=1)


def draw(every: Sequence[Measured], chosen: Measured, study: Study, path: Path) -> None:
    """A heat map a sampler and guidance scale, the value in each cell, the best framed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    maps = list(dict.fromkeys((one.combination.sampler, one.combination.guidance_scale) for one in every))
    steps = sorted({one.combination.denoising_steps for one in every})
    executed = sorted({one.combination.n_action_steps for one in every})
    known = {one.combination: one for one in every}
    values = {one: _value(known[one], study) for one in known}
    low, high = (0.0, 1.0) if study.simulated else (min(values.values()), max(values.values()))
    size = (max(1.5 * len(steps), 3.2) * len(maps) + 1.6, 0.95 * len(executed) + 2.2)
    figure, axes = pyplot.subplots(1, len(maps), figsize=size, squeeze=False, layout="constrained")
    shades = "YlGn" if study.simulated else "YlGn_r"
    image = None
    for axis, (sampler, scale) in zip(axes[0], maps, strict=True):
        cells = np.array([[values[Combination(sampler, s, n, scale)] for s in steps] for n in executed])
        image = axis.imshow(cells, cmap=shades, vmin=low, vmax=high, aspect="auto")
        for y, n in enumerate(executed):
            for x, s in enumerate(steps):
                one = known[Combination(sampler, s, n, scale)]
                colour = legible_on(image.cmap(image.norm(cells[y, x])))
                axis.text(x, y, _cell(one, study), ha="center", va="center", fontsize=9, color=colour)
                if one == chosen:
                    frame = Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="tab:red", linewidth=2.5)
                    axis.add_patch(frame)
        title = sampler if all(each == 1 for _, each in maps) else f"{sampler}, guidance {scale:g}"
        axis.set(title=title, xlabel="denoising_steps")
        axis.set_xticks(range(len(steps)), [str(each) for each in steps])
        axis.set_yticks(range(len(executed)), [str(each) for each in executed])
    axes[0, 0].set_ylabel("n_action_steps")
    what = "success" if study.simulated else f"error + jump / n_action_steps ({study.unit.name})"
    if image is not None:
        figure.colorbar(image, ax=axes[0], label=what, shrink=0.9)
    figure.suptitle(f"{study.checkpoint}: {what}\nframed: {chosen.combination}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _value(one: Measured, study: Study) -> float:
    return one.success_share if study.simulated else study.unit.scale * (one.score or 0.0)


def _cell(one: Measured, study: Study) -> str:
    lines = [f"{one.success} of {one.episodes}" if study.simulated else study.unit.of(one.score or 0.0)]
    if study.simulated and one.error is not None:
        lines.append(f"{study.unit.of(one.error)} {study.unit.name}")
    late = ", late" if one.is_late(study.fps) else ""
    return "\n".join([*lines, f"{one.chunk_ms:.0f} ms{late}"])


def _print(every: Sequence[Measured], chosen: Measured, why: str, study: Study, console: Console) -> None:
    table = TextTable(title=f"{study.checkpoint}", title_justify="left", caption=f"errors in {study.unit.name}")
    guided = any(one.combination.guidance_scale != 1 for one in every)
    for heading in ("sampler", "denoising", "executed", *(["guidance"] if guided else [])):
        table.add_column(heading)
    numbers = ["ms a chunk", *(["success", "wrong", "refused"] if study.simulated else [])]
    numbers += ["error", "jump", "score"] if chosen.error is not None else []
    for heading in numbers:
        table.add_column(heading, justify="right")
    for one in every:
        what = one.combination
        row = [what.sampler, str(what.denoising_steps), str(what.n_action_steps)]
        row += [*([f"{what.guidance_scale:g}"] if guided else []), f"{one.chunk_ms:.0f}"]
        if study.simulated:
            row += [f"{one.success} of {one.episodes}", str(one.wrong_block), str(one.refused)]
        if chosen.error is not None:
            told = (one.error, one.seam, one.score)
            row += ["" if value is None else study.unit.of(value) for value in told]
        table.add_row(*row, style="bold green" if one == chosen else None)
    console.print(table)
    console.print(f"best: {chosen.combination}: {why}", highlight=False, soft_wrap=True)
    if not study.simulated:
        console.print(_CAUTION, highlight=False, soft_wrap=True)


def main() -> int:
    """The command line; returns the exit status."""

    def program(config: TuneConfig) -> int:
        run(config)
        return 0

    return cli.run(program, TuneConfig, "dit_policy_training.tune")


if __name__ == "__main__":
    raise SystemExit(main())
