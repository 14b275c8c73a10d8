"""The rows of one or several LeRobotDatasets v3 without the pictures, as one table."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.configuration import ACTION, ENVIRONMENT_STATE, STATE, Feature
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.features import Features, agreeing, read_features
from dit_policy_training.data.rows import load_rows
from dit_policy_training.data.sources import ResolvedSource


@dataclass(frozen=True)
class Part:
    """One dataset of those that a table is made of. `weight`: its share of the samples, relative; 0: its rows."""

    root: Path
    name: str
    first: int  # its first row in the table
    rows: int
    weight: float
    features: Features


@dataclass(frozen=True)
class Table:
    """The rows without the pictures, N in all, episode after episode, dataset after dataset."""

    parts: tuple[Part, ...]
    embodiment: Embodiment | None
    fps: int  # rows a second
    tasks: list[str]
    state_names: list[str]
    action_names: list[str]
    image_shapes: dict[str, tuple[int, int, int]]  # (3, H, W) by feature key, in the order that a policy sees them
    state: np.ndarray  # (N, S) float32; S is 0 where there is none
    action: np.ndarray  # (N, A) float32
    environment_state: np.ndarray | None  # (N, E) float32
    task_index: np.ndarray  # (N,)
    episode_start: np.ndarray  # (N,) row where the row's episode starts
    episode_end: np.ndarray  # (N,) and one past its last
    fingerprint: str  # SHA-256 of all of this: the same rows in the same order
    notes: list[str] = field(default_factory=list)  # what of the datasets is not used, a line each

    def __len__(self) -> int:
        return len(self.action)

    @property
    def name(self) -> str:
        """The datasets' names."""
        return " + ".join(part.name for part in self.parts)

    @property
    def input_features(self) -> dict[str, Feature]:
        """What a policy trained on this is given."""
        features = {key: Feature("VISUAL", shape) for key, shape in self.image_shapes.items()}
        if self.state.shape[1]:
            features[STATE] = Feature("STATE", (self.state.shape[1],))
        if self.environment_state is not None:
            features[ENVIRONMENT_STATE] = Feature("ENV", (self.environment_state.shape[1],))
        return features

    @property
    def output_features(self) -> dict[str, Feature]:
        """What such a policy predicts."""
        return {ACTION: Feature("ACTION", (self.action.shape[1],))}

    @property
    def episode_starts(self) -> np.ndarray:
        """The first row of each episode, in order."""
        return np.flatnonzero(self.episode_start == np.arange(len(self)))

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.episode_starts)

    @property
    def action_state_indices(self) -> list[int] | None:
        """Where each of the action's names stands in the state; None if one is not there, or there twice."""
        places = {name: index for index, name in enumerate(self.state_names)}
        if len(places) < len(self.state_names) or not set(self.action_names) <= set(places):
            return None
        return [places[name] for name in self.action_names]


def load_table(root: Path, embodiment: Path | None = None) -> Table:
    """Read a dataset folder. `embodiment` is the robot's YAML, for a dataset that has none beside it.

    Raises DatasetError if it is no dataset, of another version, contradicts itself, or does not fit its embodiment;
    EmbodimentError for a wrong YAML.
    """
    return load_tables([ResolvedSource(Path(root), 0.0, Path(root).name)], embodiment)


def load_tables(sources: Sequence[ResolvedSource], embodiment: Path | None = None) -> Table:
    """Several datasets as one table: rows one after the other, tasks united by their text.

    Raises what load_table raises, and DatasetError naming what differs where they do not have the same features.
    """
    if not sources:
        raise DatasetError("no dataset is given: --dataset_path=FOLDER, --dataset_repo_id=NAME or --datasets")
    robot = _robot(sources, embodiment)
    every = [(source.name, read_features(source.root, robot)) for source in sources]
    features = agreeing(every)
    loaded = [load_rows(source.root, each) for source, (_, each) in zip(sources, every, strict=True)]
    tasks = list(dict.fromkeys(task for one in loaded for task in one.tasks))
    firsts = np.cumsum([0, *(len(one.action) for one in loaded)])[:-1]
    parts = tuple(
        Part(source.root, source.name, int(first), len(one.action), source.weight, each)
        for source, (_, each), one, first in zip(sources, every, loaded, firsts, strict=True)
    )
    places = {task: place for place, task in enumerate(tasks)}
    numbers = [np.array([places[task] for task in one.tasks], dtype=np.int64) for one in loaded]
    starts = [one.episode_start + first for one, first in zip(loaded, firsts, strict=True)]
    ends = [one.episode_end + first for one, first in zip(loaded, firsts, strict=True)]
    table = Table(
        parts=parts,
        embodiment=robot,
        fps=features.fps,
        tasks=tasks,
        state_names=features.state_names,
        action_names=features.action_names,
        image_shapes=features.image_shapes,
        state=np.concatenate([one.state for one in loaded]),
        action=np.concatenate([one.action for one in loaded]),
        environment_state=np.concatenate([one.environment for one in loaded]) if features.environment_names else None,
        task_index=np.concatenate([each[one.task_index] for each, one in zip(numbers, loaded, strict=True)]),
        episode_start=np.concatenate(starts),
        episode_end=np.concatenate(ends),
        fingerprint="",
        notes=_notes(every),
    )
    return replace(table, fingerprint=_fingerprint(table))


def _robot(sources: Sequence[ResolvedSource], given: Path | None) -> Embodiment | None:
    """The embodiment that was given, else the datasets' own; those of several datasets must not contradict."""
    if given is not None:
        return Embodiment.load(given)
    own = [(source, path) for source in sources if (path := source.root / "embodiment.yaml").exists()]
    robots = [(source, Embodiment.load(path)) for source, path in own]
    for source, robot in robots[1:]:
        if wrong := robots[0][1].incompatibilities(robot):
            raise DatasetError(
                f"{robots[0][0].name} (here) and {source.name} (there) are of robots that differ:\n  - "
                + "\n  - ".join(wrong)
            )
    return robots[0][1] if robots else None


def _notes(every: list[tuple[str, Features]]) -> list[str]:
    if len(every) == 1:
        return every[0][1].notes
    return [f"{name}: {note}" for name, features in every for note in features.notes]


def _fingerprint(table: Table) -> str:
    digest = hashlib.sha256()
    described = [table.tasks, table.state_names, table.action_names, table.fps, sorted(table.image_shapes.items())]
    digest.update(json.dumps(described).encode())
    for values in (table.state, table.action, table.environment_state, table.task_index, table.episode_start):
        if values is not None:
            digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()
