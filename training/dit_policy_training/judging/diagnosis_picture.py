"""A diagnosis as one picture: what it attends to, where it idles, its tasks, how alike the instructions are."""

import textwrap
from pathlib import Path

import matplotlib
import numpy as np

from dit_policy_training.judging.colours import legible_on
from dit_policy_training.judging.diagnosis import Diagnosis
from dit_policy_training.judging.findings import HEARD_NOISE
from dit_policy_training.judging.listening import AS_RECORDED, OTHER_NOISE

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "0.6"
MOST_TASKS = 20


def draw(diagnosis: Diagnosis, path: Path) -> None:
    """Write the PNG."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    figure.suptitle(f"{diagnosis.checkpoint} on {diagnosis.dataset}", fontsize=10)
    _attention(axes[0, 0], diagnosis)
    _idling(axes[0, 1], diagnosis)
    _tasks(axes[1, 0], diagnosis)
    _words(axes[1, 1], diagnosis)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _attention(axes: Axes, diagnosis: Diagnosis) -> None:
    asked = [answer.asked for answer in diagnosis.answers if answer.asked not in (AS_RECORDED, OTHER_NOISE)]
    places = np.arange(len(asked))
    for answers, shift, colour, label in (
        (diagnosis.answers, -0.2, BLUE, "in the first seconds"),
        (diagnosis.whole, 0.2, ORANGE, "over whole episodes"),
    ):
        found = {answer.asked: answer.times_noise for answer in answers}
        axes.barh(places + shift, [_finite(found[name]) for name in asked], 0.38, color=colour, label=label)
    axes.set_yticks(places, asked)
    axes.invert_yaxis()
    axes.axvline(HEARD_NOISE, color="black", linestyle=":", label="below: it does not attend")
    axes.axvline(1, color=GREY, label="as far as by other noise")
    axes.set(title="how far the prediction moves", xlabel="times what other noise alone does")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)  # beside the bars
    axes.grid(alpha=0.3, axis="x")


def _idling(axes: Axes, diagnosis: Diagnosis) -> None:
    idle = diagnosis.idling
    tenths = np.arange(len(idle.recorded_by_tenth))
    for values, shift, colour, label in (
        (idle.recorded_by_tenth, -0.2, GREY, f"recorded, {idle.recorded:.0%} in all"),
        (idle.predicted_by_tenth, 0.2, ORANGE, f"predicted, {idle.predicted:.0%} in all"),
    ):
        axes.bar(tenths + shift, [0.0 if value is None else value for value in values], 0.38, color=colour, label=label)
    axes.set_xticks(tenths, [f"{10 * tenth}" for tenth in tenths])
    axes.set(
        title=f"idle chunks: no action gets further than {idle.motion:.0%} of its range",
        xlabel="place in the episode, %",
        ylabel="share of moments",
        ylim=(0, 1),
    )
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    axes.grid(alpha=0.3, axis="y")
    if idle.moments == 0:
        _say(axes, "no moment whose executed steps all lie in its episode was asked")
    elif idle.recorded == idle.predicted == 0:
        _say(axes, f"none of {idle.moments} chunks is idle,\nneither recorded nor predicted")


def _say(axes: Axes, why: str) -> None:
    """Why there is nothing in a panel."""
    axes.text(0.5, 0.5, why, ha="center", va="center", color="0.35", transform=axes.transAxes)


def _tasks(axes: Axes, diagnosis: Diagnosis) -> None:
    unit = diagnosis.unit
    tasks = sorted(diagnosis.tasks, key=lambda task: task.frames)[:MOST_TASKS]
    places = np.arange(len(tasks))
    axes.barh(places, [task.frames for task in tasks], color="lightsteelblue")
    axes.set_yticks(places, ["\n".join(textwrap.wrap(task.task, 28)) for task in tasks], fontsize=8)
    for place, task in zip(places, tasks, strict=True):
        error = "" if task.error is None else f", error {unit.of(task.error)} {unit.name}"
        axes.annotate(f" {task.episodes} episodes{error}", (0, place), va="center", fontsize=8)
    rest = "" if len(tasks) == len(diagnosis.tasks) else f", the {len(tasks)} smallest of {len(diagnosis.tasks)}"
    axes.set(title=f"tasks{rest}", xlabel="frames")


def _words(axes: Axes, diagnosis: Diagnosis) -> None:
    names = list(dict.fromkeys(name for pair in diagnosis.pairs for name in (pair.one, pair.other)))[:MOST_TASKS]
    if not names:
        axes.set_axis_off()
        _say(axes, "no two instructions to compare, or a policy that reads none")
        return
    cosines = np.eye(len(names))
    for pair in diagnosis.pairs:
        if pair.one in names and pair.other in names:
            i, j = sorted((names.index(pair.one), names.index(pair.other)))
            cosines[i, j], cosines[j, i] = pair.projected, pair.tower
    shown = axes.imshow(cosines, vmin=-1, vmax=1, cmap="coolwarm")
    if len(names) <= 8:
        for i, j in np.ndindex(cosines.shape):
            colour = legible_on(tuple(shown.cmap(shown.norm(cosines[i, j]))))
            axes.text(j, i, f"{cosines[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
    short = ["\n".join(textwrap.wrap(name, 22)) for name in names]
    axes.set_yticks(range(len(names)), short, fontsize=8)
    axes.set_xticks(range(len(names)), short, fontsize=7, rotation=20 if len(names) <= 4 else 90)
    axes.set_title("cosines of instructions: text tower below, after the projection above", fontsize=10)


def _finite(value: float) -> float:
    return value if np.isfinite(value) else 0.0
