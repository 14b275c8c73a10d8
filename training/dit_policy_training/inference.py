"""`python -m dit_policy_training.inference`: one recorded moment, what the policy sees of it, and what it would do.

The cameras' pictures as recorded and as the encoder gets them, the instruction, and several predicted chunks over the
recorded actions, joint by joint. In a window where there is a screen, else as a PNG. With --instruction other words,
to see whether it listens: the chunks that the recorded words give stay there for comparison.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dit_policy_ros.policy.configuration import TASK
from dit_policy_ros.policy.preprocessing import Preprocessor
from dit_policy_ros.policy.sampling import Sampling
from dit_policy_training import cli
from dit_policy_training.data.frames import gather
from dit_policy_training.data.table import load_table
from dit_policy_training.judging.opening import PRISMATIC, Subject, open_subject, place_of, rows_of_episodes
from dit_policy_training.judging.predictions import Predictions, predict

OUTPUT = Path("outputs/inference.png")
_MOST_TOLD = 5  # instructions that it was trained on


@dataclass
class InferenceConfig:
    """Show what a policy predicts at one recorded moment."""

    checkpoint_dir: Path  # of the policy; or of a run, whose last checkpoint is taken
    dataset_path: Path  # folder of a LeRobotDataset v3
    embodiment: Path | None = None  # the robot's YAML, for a dataset that brings none
    device: str = "cpu"  # cpu, cuda, cuda:1, ...
    episode: int | None = None  # of the moment; empty: any
    frame: int | None = None  # of the moment in its episode, from 0; empty: any
    seed: int = 0  # of the moment, as far as it is not given, and of the noise
    samples: int = 8  # chunks predicted from different noise
    instruction: str = ""  # other words than the recorded ones, to see whether it listens
    sampler: str = ""  # ddpm, ddim, dpm_solver++, or euler, heun, rk4; empty: as the checkpoint says
    denoising_steps: int = 0  # 0: as the checkpoint says
    guidance_scale: float = 0.0  # of the instruction; 0: as the checkpoint says
    output: Path | None = None  # PNG; empty: a window, or without a screen outputs/inference.png


@dataclass(frozen=True)
class Moment:
    """What is shown: the table's row, the batch of it, and what is predicted, also by other words if there are any."""

    row: int
    batch: dict[str, Any]
    predictions: Predictions
    other_words: str = ""
    asked_otherwise: Predictions | None = None


def infer(subject: Subject, config: InferenceConfig) -> Moment:
    """Predict at the moment that the options choose. Raises ValueError for one that is not there."""
    for name, least in (("samples", 1), ("seed", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
    row = choose(subject, config)
    rows = np.array([row])
    sampling = Sampling(config.sampler or None, config.denoising_steps or None, config.guidance_scale or None)
    options: dict[str, Any] = {"sampling": sampling, "seed": config.seed, "samples": config.samples}
    usual = predict(subject.policy, subject.windows, subject.frames, rows, **options)
    otherwise = None
    if config.instruction:
        words = [config.instruction]
        changed = predict(
            subject.policy, subject.windows, subject.frames, rows, change=lambda batch: batch | {TASK: words}, **options
        )
        otherwise = changed
    return Moment(row, gather(subject.windows, subject.frames, rows), usual, config.instruction, otherwise)


def choose(subject: Subject, config: InferenceConfig) -> int:
    """The row of the moment."""
    table, rng = subject.table, np.random.default_rng(config.seed)
    rows = np.arange(len(table)) if config.episode is None else rows_of_episodes(table, [config.episode])
    if config.frame is None:
        return int(rng.choice(rows))
    found = rows[rows - table.episode_start[rows] == config.frame]
    if len(found) == 0:
        where = (
            f"episode {config.episode} has {len(rows)} frames" if config.episode is not None else "no episode has it"
        )
        raise ValueError(f"frame {config.frame}: {where}, and the first is 0")
    return int(rng.choice(found))


def draw(subject: Subject, moment: Moment) -> Any:
    """The matplotlib figure: pictures above, a panel for each action below."""
    from matplotlib import pyplot

    names, cameras = subject.table.action_names, list(subject.policy.config.cameras)
    columns = max(min(len(names), 4), min(2 * len(cameras), 6), 2)
    lines = -(-2 * len(cameras) // columns)
    panels = -(-len(names) // columns)
    figure = pyplot.figure(figsize=(3.1 * columns, 2.9 * lines + 2.0 * panels + 0.9), layout="constrained")
    above, below = (
        figure.subfigures(2, 1, height_ratios=(2.9 * lines + 0.9, 2.0 * panels)) if cameras else (None, figure)
    )
    if above is not None:
        _draw_pictures(above, subject, moment, lines, columns)
    _draw_actions(below, subject, moment, panels, columns)
    figure.suptitle(_title(subject, moment), fontsize=10, x=0.01, ha="left")
    return figure


def _title(subject: Subject, moment: Moment) -> str:
    episode, frame = place_of(subject.table, moment.row)
    seconds = frame / subject.table.fps
    error = subject.unit.of(moment.predictions.error)
    lines = [
        f"{subject.table.name}, episode {episode}, frame {frame} ({seconds:.1f} s): '{moment.predictions.tasks[0]}'",
        f"{subject.folder}: mean |predicted - recorded| {error} {subject.unit.name} (first sample)",
    ]
    return "\n".join(lines)


def _draw_pictures(figure: Any, subject: Subject, moment: Moment, lines: int, columns: int) -> None:
    """The newest frame of each camera, as recorded and as its encoder gets it."""
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    encoder = subject.policy.observation_encoder
    shown = []
    for key, preprocessor in zip(encoder.cameras, encoder.preprocessors, strict=True):
        recorded = moment.batch[key]
        name = key.removeprefix("observation.images.")
        assert isinstance(preprocessor, Preprocessor)
        with subject.policy.evaluating():
            seen = preprocessor.augmented(recorded.to(subject.policy.device)).clamp(0, 1).cpu()
        shown += [(recorded[0, -1] / 255, f"{name}, recorded"), (seen[0, -1], f"{name}, as the policy sees it")]
    for axis, (picture, title) in zip(axes, shown, strict=False):
        axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(f"{title}\n{picture.shape[2]} x {picture.shape[1]}", fontsize=9)
    for axis in axes:
        axis.set_axis_off()


def _draw_actions(figure: Any, subject: Subject, moment: Moment, lines: int, columns: int) -> None:
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    found, table = moment.predictions, subject.table
    steps = np.arange(found.recorded.shape[1]) / table.fps
    ours = "predicted" if moment.asked_otherwise is None else "predicted, recorded words"
    for index, (axis, name) in enumerate(zip(axes, table.action_names, strict=False)):
        axis.plot(steps, found.samples[0, :, :, index].T, color="tab:orange", linewidth=1, alpha=0.6, label=ours)
        if moment.asked_otherwise is not None:
            chunks = moment.asked_otherwise.samples[0, :, :, index].T
            axis.plot(steps, chunks, color="tab:blue", linewidth=1, alpha=0.6, label="predicted, other words")
        recorded = np.where(found.is_pad[0], np.nan, found.recorded[0, :, index])
        axis.plot(steps, recorded, color="black", linewidth=1.8, label="recorded")
        axis.axvline(subject.executed / table.fps, color="0.6", linestyle=":", linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes[len(table.action_names) :]:
        axis.set_axis_off()
    for axis in axes[max(len(table.action_names) - columns, 0) : len(table.action_names)]:
        axis.set_xlabel("s from now", fontsize=8)
        axis.tick_params(labelbottom=True)
    for axis in axes[: len(table.action_names) : columns]:
        axis.set_ylabel(subject.unit.recorded, fontsize=8)
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    title = "dotted: where the executed steps end"
    if subject.embodiment is not None:
        title += f"; {subject.unit.recorded}, {PRISMATIC}"
    if moment.asked_otherwise is not None:
        title += f"; other words: '{moment.other_words}'"
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        fontsize=8,
        title=title,
        title_fontsize=8,
    )


def has_screen() -> bool:
    """Whether a window can be shown."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def run(config: InferenceConfig, console: Console | None = None) -> int:
    """Show it, or say where the PNG is; exit status 0."""
    import matplotlib

    console = console or Console()
    path = _png(config.output or OUTPUT)
    window = config.output is None and has_screen()
    if not window:
        matplotlib.use("Agg")
    subject = open_subject(config.checkpoint_dir, load_table(config.dataset_path, config.embodiment), config.device)
    moment = infer(subject, config)
    figure = draw(subject, moment)
    console.print(_title(subject, moment), highlight=False, markup=False)
    if moment.asked_otherwise is not None:
        apart = np.abs(moment.asked_otherwise.samples - moment.predictions.samples).mean()
        console.print(
            f"'{config.instruction}' changes the prediction by {subject.unit.of(float(apart))} {subject.unit.name} "
            f"(its samples' spread: {subject.unit.of(float(np.nanmean(moment.predictions.spread())))})",
            highlight=False,
            markup=False,
        )
        if config.instruction not in subject.policy.config.tasks:
            known = "', '".join(subject.policy.config.tasks[:_MOST_TOLD])
            console.print(f"it was not trained on these words, but on: '{known}'", highlight=False, markup=False)
    if window:
        from matplotlib import pyplot

        if pyplot.get_backend().lower() != "agg":
            pyplot.show()
            return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    console.print(f"drawn to {path}", highlight=False, soft_wrap=True)
    return 0


def _png(output: Path) -> Path:
    """The file to draw to; raises ValueError for a folder."""
    if output.is_dir():
        raise ValueError(f"output {output} is a folder; give the name of a PNG in it, such as {output / OUTPUT.name}")
    return output if output.suffix else output.with_suffix(".png")


def main() -> int:
    """The command line; returns the exit status."""
    return cli.run(run, InferenceConfig, "dit_policy_training.inference")


if __name__ == "__main__":
    raise SystemExit(main())
