"""What a training run tells while it runs and leaves behind: a progress bar, metrics.jsonl, loss.png, a model card."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dit_policy_training.data.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Metrics:
    """The rows of metrics.jsonl, one a log step: step, loss, lr, grad_norm, steps_per_s, samples_per_s, seconds."""

    def __init__(self, path: Path):
        self.rows: list[dict[str, float]] = []
        self._file = path.open("w", encoding="utf-8")

    def add(self, row: dict[str, float]) -> None:
        """Keep a row, on disk at once."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def training_progress(console: Console) -> Progress:
    """The bar of a training run; its tasks have the field `note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def figures(row: Mapping[str, float]) -> str:
    """A metrics row for the progress bar."""
    return (
        f"loss {row['loss']:.4f}  lr {row['lr']:.1e}  "
        f"{row['steps_per_s']:.1f} steps/s  {row['samples_per_s']:.0f} samples/s"
    )


def plot_loss(rows: list[dict[str, float]], path: Path) -> None:
    """Draw loss (logarithmic) and learning rate over the steps to a PNG; nothing if there is no row yet."""
    if not rows:
        return
    steps, loss, lr = (np.array([row[name] for row in rows]) for name in ("step", "loss", "lr"))
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.semilogy(steps, loss, color="tab:blue", linewidth=0.8, alpha=0.4, label="loss")
    width = max(len(loss) // 20, 1)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    axes.semilogy(steps[width - 1 :], smooth, color="tab:blue", label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="training loss", title=f"loss {smooth[-1]:.4f} at step {int(steps[-1])}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper right")
    rate = axes.twinx()
    rate.plot(steps, lr, color="tab:orange", linewidth=0.8)
    rate.set_ylabel("learning rate", color="tab:orange")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def model_card(table: Table, settings: str, results: Mapping[str, Any]) -> str:
    """Markdown that says what a policy was trained on, how, and how far: `settings` is YAML, `results` name: value."""
    counts = Counter(table.tasks[index] for index in table.task_index[np.unique(table.episode_start)])
    embodiment = table.embodiment
    assert embodiment is not None
    cameras = ", ".join(f"{camera.name} {camera.width}x{camera.height}" for camera in embodiment.cameras)
    lines = [
        f"# Multitask DiT policy for `{embodiment.name}`",
        "",
        "Takes camera images, joint positions and an instruction; gives a chunk of joint positions. Weights: "
        "the exponential moving average of training.",
        "",
        "## Data",
        "",
        f"- dataset `{table.name}`: {table.episodes} episodes, {len(table)} frames at {table.fps} Hz",
        f"- cameras: {cameras}",
        f"- state: {', '.join(embodiment.state.joints)}",
        f"- action: {', '.join(embodiment.action_joints)}",
        "- instructions, by episodes they begin:",
        *(f"  - `{task}`: {counts[task]}" for task in table.tasks),
        "",
        "An instruction not in this list is outside what the policy was trained on. So are another robot, other camera "
        "poses and other objects.",
        "",
        "## Training",
        "",
        *(f"- {name}: {value}" for name, value in results.items()),
        "",
        "```yaml",
        settings.rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)
