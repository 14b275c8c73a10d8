"""What a run says at its start and its end, in a few lines."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_training.data.table import Table
from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.state import Best

_NEXT = ("inference", "evaluate", "diagnose", "tune")


def opening(
    config: TrainConfig,
    table: Table,
    policy: MultitaskDiTPolicy,
    rows: tuple[int, int],
    processes: int,
    device: torch.device,
    notes: Sequence[str],
) -> list[str]:
    """What will be trained, on what, with what. rows: how many are trained on, and how many held out."""
    trained = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in policy.parameters()) - trained
    held_out = f"{rows[1]} frames held out" if rows[1] else "none held out"
    precision = f"{config.amp_dtype} products, float32 weights" if config.use_amp else "float32"
    samples = config.batch_size * processes * config.gradient_accumulation_steps
    parts = [f"{config.batch_size} a batch"]
    parts += [f"{processes} processes"] if processes > 1 else []
    parts += [f"{config.gradient_accumulation_steps} batches"] if config.gradient_accumulation_steps > 1 else []
    epoch = max(rows[0] / samples, 1e-9)
    return [
        f"dataset   {table.name}: {table.episodes} episodes, {len(table)} frames at {table.fps} Hz, "
        f"{len(table.tasks)} instruction{'s' * (len(table.tasks) != 1)}; {held_out}",
        *(f"          {note}" for note in table.notes),
        f"policy    {_count(trained)} parameters trained, {_count(frozen)} frozen",
        f"device    {device}, {precision}{', compiled' if config.compile else ''}",
        f"steps     {config.train_steps} of {samples} samples ({' x '.join(parts)}); an epoch is {epoch:.1f} steps, "
        f"the run {config.train_steps / epoch:.1f} epochs",
        *(f"changed   {note}" for note in notes),
    ]


def ending(checkpoint: Path, done: str, best: Best | None, dataset: Path | None, embodied: bool) -> list[str]:
    """Where the policy is, how good, and what to do with it. `done`: how far the run came."""
    data = f" --dataset_path={shlex.quote(str(dataset))}" if dataset else " --dataset_path=FOLDER"
    lines = [f"{checkpoint}: {done}"]
    if best is not None:
        checkpoint = checkpoint.with_name("best")
        lines.append(f"{checkpoint}: step {best.step}, {best.figure} {best.value:.4g}, the lowest of those kept")
    given = f"--checkpoint_dir={shlex.quote(str(checkpoint))}{data}"
    lines += ["next", *(f"  python -m dit_policy_training.{program} {given}" for program in _NEXT)]
    if embodied:
        files = [shlex.quote(str(place)) for place in (checkpoint, checkpoint / "embodiment.yaml")]
        lines.append(f"  ros2 launch dit_policy_ros robot.launch.py checkpoint:={files[0]} embodiment:={files[1]}")
    return lines


def command_to_go_on(checkpoint: Path, processes: int) -> str:
    """What continues a run, to be typed; on several machines the launcher is what it was."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    launcher = f"torchrun --nproc_per_node={processes}" if here == processes else "torchrun (as before)"
    program = "-m dit_policy_training.train"
    return f"{'python' if processes == 1 else launcher} {program} --checkpoint_path={shlex.quote(str(checkpoint))}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else str(parameters)
