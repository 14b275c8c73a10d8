"""`python -m dit_policy_training.diagnose`: does a policy listen to its instruction, and look at its cameras?

The loss does not tell: a policy that ignores the words, and pushes whichever block is nearest, reaches almost the same.
So the same frames, with the same noise, are asked again with another of the dataset's instructions, and with each
camera blanked. What the policy attends to must change the prediction, and for the worse.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as TextTable

from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.configuration import ACTION, ACTION_IS_PAD, TASK
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_training import cli
from dit_policy_training.data.frames import gather, open_frames
from dit_policy_training.data.table import Table, load_table
from dit_policy_training.data.windows import Windows

BLANK = 127  # the grey of a blanked picture


@dataclass
class DiagnoseConfig:
    """Compare predictions with the recorded actions; best on episodes that were not trained on."""

    checkpoint_dir: Path
    dataset_path: Path
    seconds: float = 2.0  # from each episode's start: later, the arm's pose tells the task
    batch_size: int = 64
    seed: int = 0  # of the noise
    device: str = "cpu"


@dataclass(frozen=True)
class Answer:
    """Means over all frames, steps and joints, rad: |predicted - recorded|, and how far the prediction moved."""

    asked: str
    error: float
    change: float


@torch.inference_mode()
def diagnose(policy: MultitaskDiTPolicy, table: Table, config: DiagnoseConfig) -> list[Answer]:
    """One answer for each way of asking; the first is as recorded."""
    windows = Windows(table, policy.config.n_obs_steps, policy.config.horizon)
    frames = open_frames(table)
    rows = np.flatnonzero(np.arange(len(table)) - table.episode_start < config.seconds * table.fps)
    sums: dict[str, np.ndarray] = {}
    for start in range(0, len(rows), config.batch_size):
        batch = gather(windows, frames, rows[start : start + config.batch_size])
        usual = None
        for asked, changed in _ways(batch, table.tasks):
            noise = torch.Generator(config.device).manual_seed(config.seed + start)
            predicted = policy.predict_chunk(changed, generator=noise).cpu()
            usual = predicted if usual is None else usual
            sums[asked] = sums.get(asked, np.zeros(3)) + _distances(predicted, usual, batch)
    return [Answer(asked, *(total[:2] / total[2])) for asked, total in sums.items()]


def _ways(batch: dict[str, Any], tasks: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "as recorded", batch
    for shift in range(1, len(tasks)):
        others = [tasks[(tasks.index(task) + shift) % len(tasks)] for task in batch[TASK]]
        yield f"another instruction ({shift})", batch | {TASK: others}
    for key, pictures in batch.items():
        if key.startswith("observation.images."):
            yield f"{key.removeprefix('observation.images.')} blank", batch | {key: torch.full_like(pictures, BLANK)}


def _distances(predicted: torch.Tensor, usual: torch.Tensor, batch: dict[str, Any]) -> np.ndarray:
    """Sums of |predicted - recorded| and |predicted - usual|, and how many numbers each adds up."""
    past = batch[ACTION].shape[1] - predicted.shape[1]
    keep = ~batch[ACTION_IS_PAD][:, past:]
    error = (predicted - batch[ACTION][:, past:]).abs()[keep]
    change = (predicted - usual).abs()[keep]
    return np.array([error.sum().item(), change.sum().item(), error.numel()])


def run(config: DiagnoseConfig, console: Console | None = None) -> int:
    """Print the answers; exit status 0."""
    policy = load_checkpoint(config.checkpoint_dir, config.device)
    answers = diagnose(policy, load_table(config.dataset_path), config)
    table = TextTable("asked", "error (mrad)", "change (mrad)", title=f"{config.checkpoint_dir}", title_justify="left")
    for answer in answers:
        table.add_row(answer.asked, f"{1000 * answer.error:.1f}", f"{1000 * answer.change:.1f}")
    (console or Console()).print(table)
    return 0


def main() -> int:
    """The command line; returns the exit status."""
    return cli.run(run, DiagnoseConfig, "dit_policy_training.diagnose")


if __name__ == "__main__":
    raise SystemExit(main())
