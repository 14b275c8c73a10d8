"""What the benchmarks on the demo's task share: its dataset, and its recipe trained with something changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_policy_training.data.frames import gather, open_frames
from dit_policy_training.data.table import load_table
from dit_policy_training.data.windows import Windows

from dit_policy_ros.policy.configuration import PolicyConfig

DATASET = Path("outputs/demo-train/dataset")
FLOW = Path("checkpoints/demo")


def trained(output: Path, *changes: str, dataset: Path = DATASET) -> Path:
    """The checkpoint of the demo's recipe with changes to its settings; trained, in ten minutes, if it is not there."""
    last = output / "checkpoints" / "last"
    if not (output / "done").exists():
        arguments = ("--config_path=config/training/demo.yaml", f"--dataset_path={dataset}", f"--output_dir={output}")
        command = [sys.executable, "-m", "dit_policy_training.train", *arguments, "--overwrite=true", *changes]
        subprocess.run(command, check=True)
        (output / "done").touch()  # an interrupted training leaves a checkpoint as well
    return last


def rolled_out(checkpoint: Path, report: Path, episodes: int, control: str) -> dict[str, Any]:
    """The report of unseen scenes in simulated time, run if it is not there."""
    if not report.exists():
        arguments = (f"--checkpoint={checkpoint}", f"--episodes={episodes}", f"--control={control}")
        command = [sys.executable, "-m", "dit_policy_ros.sim.rollout", *arguments, f"--output={report}"]
        subprocess.run(command, check=True)
    return dict(json.loads(report.read_text()))


def diffusion_checkpoint() -> Path:
    """The recipe by diffusion instead of flow matching."""
    output = Path("outputs/bench/diffusion-demo")
    return trained(output, "--policy.objective.type=diffusion", "--policy.objective.denoising_steps=10")


def prefix_checkpoint() -> Path:
    """The recipe with committed steps given clean in training."""
    return trained(Path("outputs/bench/prefix-demo"), "--policy.max_delay=6")


def observations(config: PolicyConfig, count: int, ago: int = 0) -> list[dict[str, Any]]:
    """Batches of moments from all over the dataset, the same each time: those of `ago` steps before, and those.

    The moments have `ago` steps before them and a whole chunk after them in their episode. With ago 0 there is one
    batch, of any moments.
    """
    table = load_table(DATASET)
    windows = Windows(table, config.n_obs_steps, config.horizon)
    frames = open_frames(table)
    rows = np.arange(len(table))
    if ago:
        rows = rows[(rows - table.episode_start >= ago) & (table.episode_end - rows > config.horizon)]
    chosen = np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
    return [gather(windows, frames, chosen - back) for back in ((ago, 0) if ago else (0,))]


def milliradians(differences: torch.Tensor) -> float:
    """Their root mean square, of differences in rad."""
    return 1e3 * differences.square().mean().sqrt().item()
