"""Pictures of a run: its curves, its samples as the encoder sees them, predicted over recorded actions. PNGs."""

import copy
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from dit_policy_ros.policy.configuration import TASK
from dit_policy_ros.policy.draws import Draws
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.preprocessing import Preprocessor
from dit_policy_training.data.table import Table
from dit_policy_training.judging.opening import AS_RECORDED, Unit, place_of, unit_of
from dit_policy_training.judging.predictions import Predictions

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CURVES = "curves.png"
SAMPLES = "samples.png"
PREDICTIONS = "predictions.png"

MOST_SAMPLES = 4
MOST_MOMENTS = 4
MOST_ACTIONS = 8

BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "0.6"


def curves(rows: Sequence[Mapping[str, float]], path: Path, unit: Unit = AS_RECORDED) -> None:
    """Draw what metrics.jsonl holds: loss, action error on held-out episodes, learning rate, gradient's norm.

    `unit` is the actions'.
    """
    if not rows:
        return
    measured = [row for row in rows if "validation_action_error" in row]
    panels = 4 if measured else 3
    figure, axes = plt.subplots(panels, 1, figsize=(11, 2.6 * panels), sharex=True, constrained_layout=True)
    loss = _series(rows, "loss")
    _smoothed(axes[0], *loss, "training loss")
    axes[0].set(ylabel="loss", title=f"step {int(rows[-1]['step'])}: loss {loss[1][-1]:.4f}" if len(loss[1]) else "")
    if measured:
        axes[0].plot(*_series(rows, "validation_loss"), color=ORANGE, marker=".", label="on held-out episodes")
        _action_error(axes[1], measured, unit)
    axes[-2].plot(*_series(rows, "lr"), color=BLUE)
    axes[-2].set(ylabel="learning rate")
    _smoothed(axes[-1], *_series(rows, "grad_norm"), "gradient norm")
    axes[-1].set(ylabel="gradient norm", xlabel="step")
    for each in axes:
        each.grid(alpha=0.3, which="both")
        if each.get_legend_handles_labels()[0]:
            # Beside the panel: inside it, wherever it stood, it would cover the end of some curve.
            each.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    _write(figure, path)


def _series(rows: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have one of that name: not each has all."""
    having = [row for row in rows if name in row]
    return np.array([row["step"] for row in having]), np.array([row[name] for row in having])


def _smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """The values, pale, and their running mean, on a logarithmic axis where all are above 0."""
    if len(values) == 0:
        return
    width = max(len(values) // 20, 1)
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    middle = steps[width // 2 :][: len(mean)]
    axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.35, marker="." if len(values) < 20 else None)
    axes.plot(middle, mean, color=BLUE, label=label if width == 1 else f"{label}, mean of {width} rows")
    if (values > 0).all():
        axes.set_yscale("log")


def _action_error(axes: Axes, rows: Sequence[Mapping[str, float]], unit: Unit) -> None:
    names = [name for name in rows[0] if name.startswith("validation_action_error/")]
    for name in names if len(names) <= MOST_ACTIONS else []:
        axes.plot(*_series(rows, name), linewidth=0.8, alpha=0.7, label=name.partition("/")[2])
    steps, errors = _series(rows, "validation_action_error")
    axes.plot(steps, errors, color="black", marker=".", label="all actions")
    best = int(np.argmin(errors))
    axes.axvline(steps[best], color=GREY, linestyle=":")
    title = f"held-out episodes: action error {errors[-1]:.4g}, least {errors[best]:.4g} at step {int(steps[best])}"
    axes.set(ylabel=f"action error ({unit.recorded})", title=title, ylim=(0, None))


def sample_frames(policy: MultitaskDiTPolicy, batch: Mapping[str, Any], path: Path, seed: int = 0) -> None:
    """Draw the newest frames of a batch's first samples, as given and as the encoder sees them in training.

    Augmentation is drawn anew, from `seed`: the run's own sequence of random numbers is left as it is.
    """
    cameras = policy.observation_encoder.cameras
    tasks = list(batch.get(TASK) or [])
    count = min(len(batch[cameras[0]]), MOST_SAMPLES) if cameras else 0
    if count == 0:
        return
    columns = 2 * len(cameras)
    figure, axes = plt.subplots(
        count, columns, figsize=(2.4 * columns, 2.6 * count + 0.4), squeeze=False, constrained_layout=True
    )
    for number, key in enumerate(cameras):
        given = torch.as_tensor(batch[key])[:count]
        seen = _augmented(policy, number, given, seed)
        name = key.removeprefix("observation.images.")
        for sample in range(count):
            for column, pictures, what in ((2 * number, given, "given"), (2 * number + 1, seen, "as trained on")):
                picture = pictures[sample, -1].permute(1, 2, 0).cpu().numpy()
                where = axes[sample, column]
                where.imshow(picture, interpolation="nearest")
                where.set_xticks([])
                where.set_yticks([])
                where.set_xlabel(f"{name}, {what}, {picture.shape[1]}x{picture.shape[0]}", fontsize=8)
    for sample, task in enumerate(tasks[:count]):
        axes[sample, 0].set_title("\n".join(textwrap.wrap(task, 25 * columns)), loc="left", fontsize=9)
    _write(figure, path)


@torch.no_grad()
def _augmented(policy: MultitaskDiTPolicy, camera: int, images: torch.Tensor, seed: int) -> torch.Tensor:
    """(B, n_obs, 3, H, W) -> what the camera's encoder is given, in [0, 1] as far as it was."""
    original = policy.observation_encoder.preprocessors[camera]
    assert isinstance(original, Preprocessor)
    preprocessor = copy.deepcopy(original).train()
    draws = Draws(torch.Generator().manual_seed(seed))
    seen = preprocessor(images.to(policy.device), draws)
    return (seen * preprocessor.std + preprocessor.mean).clamp(0, 1)


def predicted_actions(predictions: Predictions, table: Table, path: Path) -> None:
    """Draw predicted over recorded chunks of a few moments, evenly spread: a row a moment, a column an action.

    The panels of a column have one scale, so that a small deviation does not look like a large one.
    """
    names, unit = table.action_names, unit_of(table.embodiment).recorded
    padding = predictions.is_pad.sum(axis=1)
    fullest = np.flatnonzero(padding == padding.min())  # where an episode ends there is little to compare with
    moments = fullest[np.linspace(0, len(fullest) - 1, min(len(fullest), MOST_MOMENTS)).round().astype(int)]
    shown = min(len(names), MOST_ACTIONS)
    figure, axes = plt.subplots(
        len(moments),
        shown,
        figsize=(max(2.2 * shown, 6), 1.9 * len(moments) + 0.6),
        squeeze=False,
        sharex=True,
        constrained_layout=True,
    )
    rest = "" if shown == len(names) else f" (the first {shown} of {len(names)} actions)"
    figure.suptitle(f"held-out moments, in {unit}: recorded black, predicted orange{rest}", fontsize=10)
    seconds = np.arange(predictions.recorded.shape[1]) / table.fps
    for line, moment in enumerate(moments):
        recorded = np.where(predictions.is_pad[moment][:, None], np.nan, predictions.recorded[moment])
        for column in range(shown):
            where = axes[line, column]
            for sample in predictions.samples[moment]:
                where.plot(seconds, sample[:, column], color=ORANGE, linewidth=1.5)
            where.plot(seconds, recorded[:, column], color="black", linewidth=1.2)
            where.tick_params(labelsize=7)
            where.grid(alpha=0.3)
            if line == 0:
                where.set_title(names[column], fontsize=9)
            if line == len(moments) - 1:
                where.set_xlabel("s from now", fontsize=8)
        task = "\n".join(textwrap.wrap(predictions.tasks[moment], 20))
        episode, frame = place_of(table, int(predictions.rows[moment]))
        axes[line, 0].set_ylabel(f"episode {episode}\nframe {frame}\n{task}", fontsize=7)
    for column in axes.T:
        _scale_alike(column)
    _write(figure, path)


def _scale_alike(panels: Sequence[Axes]) -> None:
    """As much from bottom to top in each panel, around what each shows."""
    limits = [each.get_ylim() for each in panels]
    half = max(high - low for low, high in limits) / 2
    for each, (low, high) in zip(panels, limits, strict=True):
        each.set_ylim((low + high) / 2 - half, (low + high) / 2 + half)


def _write(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
