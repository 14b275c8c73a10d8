"""What is judged: a checkpoint and the dataset it is held against, which must be of the same robot."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.configuration import ACTION
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_training.data.frames import Frames, open_frames
from dit_policy_training.data.table import Table
from dit_policy_training.data.windows import Windows

CONFIG = "config.json"


@dataclass(frozen=True)
class Unit:
    """How distances of actions are told: `scale` of them make one of the dataset's units, which `recorded` names."""

    name: str
    scale: float
    recorded: str

    def of(self, value: float) -> str:
        """A distance without its unit's name, three digits."""
        scaled = self.scale * value
        return f"{scaled:.1f}" if abs(scaled) >= 10 else f"{scaled:.2f}" if self.scale > 1 else f"{scaled:.3g}"


# mm and m for a prismatic joint, which an embodiment does not tell from a hinge.
MILLIRADIANS = Unit("mrad", 1000.0, "rad")
AS_RECORDED = Unit("units", 1.0, "units of the dataset")
PRISMATIC = "m for a prismatic joint"


def unit_of(robot: Embodiment | None) -> Unit:
    """Of actions: known only of a robot that is described."""
    return AS_RECORDED if robot is None else MILLIRADIANS


@dataclass(frozen=True)
class Subject:
    """A policy and the dataset it is held against."""

    folder: Path
    policy: MultitaskDiTPolicy
    table: Table
    frames: Frames
    embodiment: Embodiment | None  # the checkpoint's, else the dataset's

    @cached_property
    def windows(self) -> Windows:
        """The policy's windows of the dataset."""
        return Windows(self.table, self.policy.config.n_obs_steps, self.policy.config.horizon)

    @property
    def unit(self) -> Unit:
        """Of actions."""
        return unit_of(self.embodiment)

    @property
    def executed(self) -> int:
        """Steps of a chunk that are executed, by the checkpoint."""
        return self.policy.config.n_action_steps


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint that a folder is, or the last one of the run it is. Raises ValueError."""
    for candidate in (folder, folder / "last", folder / "checkpoints" / "last"):
        if (candidate / CONFIG).is_file():
            return candidate
    raise ValueError(
        f"no checkpoint in {folder}: expected config.json and model.safetensors there, or a run's checkpoints/last"
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint that a folder is, or all those of the run it is, by their steps. Raises ValueError."""
    if (folder / CONFIG).is_file():
        return [folder]
    for parent in (folder / "checkpoints", folder):
        found = [path for path in sorted(parent.glob("[0-9]*")) if (path / CONFIG).is_file()]
        if found:
            return sorted(found, key=lambda path: (len(path.name), path.name))
    return [checkpoint_in(folder)]


def robot_of(checkpoint: Path) -> Embodiment | None:
    """The robot that a checkpoint describes; None if it has the empty form that training writes for want of one.

    Raises EmbodimentError for a description that is wrong, or half filled in.
    """
    description = checkpoint / "embodiment.yaml"
    if not description.is_file():
        return None
    document = yaml.safe_load(description.read_text(encoding="utf-8"))
    if isinstance(document, dict) and str(document.get("name", "")).startswith("TODO"):
        return None
    return Embodiment.load(description)


def open_subject(folder: Path, table: Table, device: str, frames: Frames | None = None) -> Subject:
    """Load a checkpoint to hold against a dataset, whose pictures are decoded as they are needed.

    Raises ValueError saying what differs where they are not of the same robot.
    """
    checkpoint = checkpoint_in(folder)
    policy = load_checkpoint(checkpoint, device)
    robot = robot_of(checkpoint)
    if wrong := misfits(policy, robot, table):
        raise ValueError(f"{checkpoint} does not fit the dataset {table.name}:\n  - " + "\n  - ".join(wrong))
    return Subject(checkpoint, policy, table, frames or open_frames(table, cache="off"), robot or table.embodiment)


def misfits(policy: MultitaskDiTPolicy, robot: Embodiment | None, table: Table) -> list[str]:
    """Why a policy cannot be held against a dataset, a line each: features, fps, names."""
    there = table.input_features | table.output_features
    wrong = [
        f"{key}: the policy takes {feature.shape}, the dataset has {there[key].shape if key in there else 'none'}"
        for key, feature in (policy.config.input_features | policy.config.output_features).items()
        if key not in there or tuple(there[key].shape) != tuple(feature.shape)
    ]
    if robot is not None and not wrong:
        for what, ours, theirs in (
            ("fps", robot.fps, table.fps),
            (ACTION, list(robot.action_joints), table.action_names),
            ("observation.state", list(robot.state.joints), table.state_names),
        ):
            if ours != theirs and (what == "fps" or len(ours) == len(theirs)):  # type: ignore[arg-type]
                wrong.append(f"{what}: the policy was trained on {ours}, the dataset has {theirs}")
    return wrong


def rows_of_episodes(table: Table, episodes: Sequence[int]) -> np.ndarray:
    """All rows of these episodes, in order. Raises ValueError for an episode that is not there."""
    if unknown := [number for number in episodes if not 0 <= number < table.episodes]:
        raise ValueError(f"episode {unknown[0]}: {table.name} has episodes 0 to {table.episodes - 1}")
    starts = table.episode_starts
    return np.concatenate([np.arange(starts[n], table.episode_end[starts[n]]) for n in sorted(set(episodes))])


def some_of(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of the rows (0: all), drawn without repetition and in order."""
    if not 0 < most < len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def place_of(table: Table, row: int) -> tuple[int, int]:
    """(episode, frame) of a row."""
    return int(np.searchsorted(table.episode_starts, row, side="right")) - 1, int(row - table.episode_start[row])
