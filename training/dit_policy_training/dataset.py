"""Training samples from a LeRobotDataset v3: its table in memory, its windows, and two ways to the pictures.

Decoding video for each sample is far slower than a small policy. If all pictures fit into a stated limit they
are decoded once, in order, and kept as uint8; otherwise DataLoader workers decode them through
LeRobotDataset. A window is what LeRobot's `delta_timestamps` give: beyond an episode's ends its first or last
row is repeated, and `action_is_pad` says where.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pandas as pd
import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.configuration import ACTION, ACTION_IS_PAD, STATE, TASK, Feature

IMAGES = "observation.images."
FORMAT = "v3.0"
PTS_TOLERANCE = 0.1  # of a frame's duration


class DatasetError(ValueError):
    """Not a sound dataset, or not one of its embodiment; the message says what was found and what to do."""


@dataclass(frozen=True)
class Table:
    """A dataset's rows without the pictures, N in all, episode after episode."""

    root: Path
    embodiment: Embodiment
    tasks: list[str]
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32
    task_index: np.ndarray  # (N,)
    episode_start: np.ndarray  # (N,) row where the row's episode starts
    episode_end: np.ndarray  # (N,) and one past its last

    def __len__(self) -> int:
        return len(self.state)

    @property
    def fps(self) -> int:
        """Rows a second."""
        return self.embodiment.fps

    @cached_property
    def image_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(3, H, W) by feature key, in the embodiment's order."""
        return {IMAGES + camera.name: (3, camera.height, camera.width) for camera in self.embodiment.cameras}

    @property
    def input_features(self) -> dict[str, Feature]:
        """What a policy trained on this dataset is given; the order of the cameras is the embodiment's."""
        images = {key: Feature("VISUAL", shape) for key, shape in self.image_shapes.items()}
        return images | {STATE: Feature("STATE", (self.state.shape[1],))}

    @property
    def output_features(self) -> dict[str, Feature]:
        """What such a policy predicts."""
        return {ACTION: Feature("ACTION", (self.action.shape[1],))}

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(np.unique(self.episode_start))


def load_table(root: Path) -> Table:
    """Read a dataset folder. Raises DatasetError if it is none, of another version, or does not fit its embodiment."""
    info = _read_info(root)
    embodiment = Embodiment.load(root / "embodiment.yaml")
    _check_features(root, info, embodiment)
    _check_absolute(root)
    rows = pd.concat(
        (pd.read_parquet(path, columns=[STATE, ACTION, "episode_index", "task_index"]) for path in _data_files(root)),
        ignore_index=True,
    )
    if len(rows) != info["total_frames"]:
        raise DatasetError(f"{root}: {len(rows)} rows in data/, meta/info.json promises {info['total_frames']}")
    episode = rows["episode_index"].to_numpy()
    start = np.searchsorted(episode, episode, side="left")
    end = np.searchsorted(episode, episode, side="right")
    table = Table(
        root=root,
        embodiment=embodiment,
        tasks=pd.read_parquet(root / "meta" / "tasks.parquet").sort_values("task_index").index.tolist(),
        state=np.stack(rows[STATE].to_list()).astype(np.float32),
        action=np.stack(rows[ACTION].to_list()).astype(np.float32),
        task_index=rows["task_index"].to_numpy(),
        episode_start=start,
        episode_end=end,
    )
    for key, values in ((STATE, table.state), (ACTION, table.action)):
        if not (finite := np.isfinite(values).all(axis=1)).all():
            row = int(np.argmin(finite))
            raise DatasetError(f"{root}: {key} is not finite in episode {episode[row]}, frame {row - start[row]}")
    return table


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    if not path.exists():
        raise DatasetError(
            f"{root} is not a LeRobotDataset: {path} is missing. "
            "Make one from bags with python -m dit_policy_training.convert"
        )
    info: dict[str, Any] = json.loads(path.read_text())
    if info["codebase_version"] != FORMAT:
        raise DatasetError(
            f"{root} has the format {info['codebase_version']}, {FORMAT} is needed; "
            "LeRobot's convert_dataset_v21_to_v30 script converts older ones"
        )
    if not (root / "embodiment.yaml").exists():
        raise DatasetError(
            f"{root} has no embodiment.yaml: copy the robot's description there, so that the checkpoint can carry it"
        )
    return info


def _check_features(root: Path, info: dict[str, Any], embodiment: Embodiment) -> None:
    expected: dict[str, Any] = {"fps": (embodiment.fps, info["fps"])}
    for camera in embodiment.cameras:
        found = info["features"].get(IMAGES + camera.name, {}).get("shape")
        expected[IMAGES + camera.name] = ([camera.height, camera.width, 3], found)
    for key, joints in ((STATE, embodiment.state.joints), (ACTION, embodiment.action_joints)):
        expected[key] = (list(joints), info["features"].get(key, {}).get("names"))
    wrong = [
        f"{key}: {there if there is not None else 'nothing'} in the dataset, {here} in embodiment.yaml"
        for key, (here, there) in expected.items()
        if here != there
    ]
    if wrong:
        raise DatasetError(f"{root} does not fit its embodiment.yaml:\n  - " + "\n  - ".join(wrong))


def _check_absolute(root: Path) -> None:
    """Whether the converter was asked for relative actions, whose names are those of absolute ones."""
    path = root / "conversion.json"
    settings: dict[str, Any] = json.loads(path.read_text())["settings"] if path.exists() else {}
    if settings.get("vectors", {}).get("action_mode", "absolute") != "absolute":
        raise DatasetError(
            f"{root} was converted with --vectors.action_mode=relative, and the node would take its actions for "
            "positions; convert with absolute ones, and let the trainer make them relative (--policy.action_mode)"
        )


def _data_files(root: Path) -> list[Path]:
    return sorted((root / "data").glob("chunk-*/file-*.parquet"))


@dataclass(frozen=True)
class Windows:
    """Which rows make a sample: n_obs_steps observations up to row i, horizon actions from i - n_obs_steps + 1 on."""

    table: Table
    n_obs_steps: int
    horizon: int

    def observed(self, rows: np.ndarray) -> np.ndarray:
        """(B,) -> (B, n_obs_steps) rows of the observations, earliest first."""
        return self._clamped(rows, np.arange(1 - self.n_obs_steps, 1))

    def commanded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B,) -> (B, horizon) rows of the actions, and where they lie outside the episode."""
        offsets = np.arange(1 - self.n_obs_steps, 1 - self.n_obs_steps + self.horizon)
        wanted = rows[:, None] + offsets
        inside = self._clamped(rows, offsets)
        return inside, wanted != inside

    def _clamped(self, rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        first, end = self.table.episode_start[rows, None], self.table.episode_end[rows, None]
        return np.clip(rows[:, None] + offsets, first, end - 1)

    def vectors(self, rows: np.ndarray) -> dict[str, Any]:
        """Everything of a batch but the pictures."""
        commanded, is_pad = self.commanded(rows)
        return {
            STATE: torch.from_numpy(self.table.state[self.observed(rows)]),
            ACTION: torch.from_numpy(self.table.action[commanded]),
            ACTION_IS_PAD: torch.from_numpy(is_pad),
            TASK: [self.table.tasks[index] for index in self.table.task_index[rows]],
        }


def relative_action_stats(windows: Windows, state_indices: list[int]) -> dict[str, np.ndarray]:
    """min, max, mean and std of (action - newest joints) over all steps of all windows that are not padding."""
    rows = np.arange(len(windows.table))
    commanded, is_pad = windows.commanded(rows)
    origin = windows.table.state[:, state_indices]
    moments = _Moments(windows.table.action.shape[1])
    for step in range(windows.horizon):
        keep = ~is_pad[:, step]
        moments.add(windows.table.action[commanded[keep, step]].astype(np.float64) - origin[keep])
    return moments.stats()


def stats(windows: Windows, action_mode: str) -> dict[str, dict[str, np.ndarray]]:
    """The statistics a policy normalises with, by feature key; relative actions are taken over all windows."""
    table = windows.table
    action = _stats_of(table.action)
    if action_mode == "relative":
        indices = table.embodiment.action_state_indices
        if indices is None:
            raise DatasetError(
                "action_mode relative needs every action joint in the state; this embodiment's lacks one"
            )
        action = relative_action_stats(windows, indices)
    return {STATE: _stats_of(table.state), ACTION: action}


def _stats_of(values: np.ndarray) -> dict[str, np.ndarray]:
    moments = _Moments(values.shape[1])
    moments.add(values.astype(np.float64))
    return moments.stats()


class _Moments:
    """Running min, max, mean and standard deviation over rows, in float64."""

    def __init__(self, dims: int):
        self.min, self.max = np.full(dims, np.inf), np.full(dims, -np.inf)
        self.count, self.total, self.squares = 0, np.zeros(dims), np.zeros(dims)

    def add(self, values: np.ndarray) -> None:
        if len(values) == 0:
            return
        self.min, self.max = np.minimum(self.min, values.min(0)), np.maximum(self.max, values.max(0))
        self.count += len(values)
        self.total += values.sum(0)
        self.squares += np.square(values).sum(0)

    def stats(self) -> dict[str, np.ndarray]:
        mean = self.total / self.count
        variance = np.maximum(self.squares / self.count - mean**2, 0.0)
        return {"min": self.min, "max": self.max, "mean": mean, "std": np.sqrt(variance)}


class FrameCache:
    """Every picture of a dataset in memory, uint8, (N, 3, H, W) a camera; each video is decoded once, in order.

    `resize`, by feature key, is what a policy does first with a float picture (1, 3, H, W) in [0, 1]; done here, it is
    not done again in every epoch, and the pictures it makes smaller need less memory.
    """

    def __init__(self, table: Table, resize: Mapping[str, Callable[[Tensor], Tensor]] | None = None):
        self._table = table
        self._resize = resize or {}
        self._shapes = {
            key: tuple(self._resized(key, torch.zeros(shape, dtype=torch.uint8)).shape)
            for key, shape in table.image_shapes.items()
        }
        self.frames: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes once it is filled."""
        return len(self._table) * sum(math.prod(shape) for shape in self._shapes.values())

    def _resized(self, key: str, picture: Tensor) -> Tensor:
        if key not in self._resize:
            return picture
        return (self._resize[key](picture.unsqueeze(0)).squeeze(0) * 255).round().to(torch.uint8)

    def fill(self, progress: Progress | None = None) -> None:
        """Decode everything. Raises DatasetError naming the file whose frames do not match the table."""
        info = json.loads((self._table.root / "meta" / "info.json").read_text())
        total = len(self._table) * len(self._shapes)
        job = progress.add_task("decoding", total=total, note="pictures") if progress else None
        for key, shape in self._shapes.items():
            frames = torch.empty((len(self._table), *shape), dtype=torch.uint8)
            video = info["features"][key]["dtype"] == "video"
            source = self._video_frames(key, info["video_path"]) if video else self._table_frames(key)
            filled = 0
            for row, picture in source:
                frames[row] = self._resized(key, torch.from_numpy(picture).permute(2, 0, 1))
                filled += 1
                if progress and job is not None and filled % 100 == 0:
                    progress.update(job, advance=100)
            if filled != len(self._table):
                raise DatasetError(f"{self._table.root}: {filled} pictures of {key} for {len(self._table)} rows")
            self.frames[key] = frames

    def _video_frames(self, key: str, template: str) -> Iterator[tuple[int, np.ndarray]]:
        meta = sorted((self._table.root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
        episodes = pd.concat((pd.read_parquet(path) for path in meta), ignore_index=True)
        chunk, file, start = (f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp"))
        for (chunk_index, file_index), group in episodes.groupby([chunk, file]):
            path = self._table.root / template.format(
                video_key=key, chunk_index=int(chunk_index), file_index=int(file_index)
            )
            due = [
                (row, from_timestamp + offset / self._table.fps)
                for from_timestamp, first, end in group[[start, "dataset_from_index", "dataset_to_index"]].to_numpy()
                for offset, row in enumerate(range(int(first), int(end)))
            ]
            yield from _decode(path, due, PTS_TOLERANCE / self._table.fps)

    def _table_frames(self, key: str) -> Iterator[tuple[int, np.ndarray]]:
        row = 0
        for path in _data_files(self._table.root):
            for cell in pd.read_parquet(path, columns=[key])[key]:
                png = np.frombuffer(cell["bytes"], dtype=np.uint8)
                yield row, cv2.cvtColor(cv2.imdecode(png, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
                row += 1


def _decode(path: Path, due: list[tuple[int, float]], tolerance: float) -> Iterator[tuple[int, np.ndarray]]:
    """(row, (H, W, 3) RGB) for each (row, seconds) due, in one pass over a video."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = container.decode(stream)
        for row, seconds in sorted(due, key=lambda entry: entry[1]):
            for frame in frames:
                if frame.time is not None and frame.time >= seconds - tolerance:
                    break
            else:
                raise DatasetError(f"{path} ends before row {row} at {seconds:.3f} s; convert the bags again")
            if frame.time > seconds + tolerance:
                raise DatasetError(
                    f"{path} has no frame for row {row} at {seconds:.3f} s, the next at {frame.time:.3f}"
                )
            yield row, frame.to_ndarray(format="rgb24")


class ShuffledRows(Sampler[list[int]]):
    """Batches of row numbers for ever: every epoch each row once, in an order that the seed decides.

    Each batch is full; the rows left at an epoch's end open the next batch together with the next epoch's
    first.
    """

    def __init__(self, rows: int, batch_size: int, seed: int):
        self._rows, self._batch_size = rows, batch_size
        self._generator = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[list[int]]:
        pending: list[int] = []
        while True:
            pending += self._generator.permutation(self._rows).tolist()
            while len(pending) >= self._batch_size:
                yield pending[: self._batch_size]
                pending = pending[self._batch_size :]


def cached_batches(windows: Windows, cache: FrameCache, order: ShuffledRows) -> Iterator[dict[str, Any]]:
    """Batches for ever, with the pictures from memory."""
    for batch in order:
        yield gather(windows, cache, np.asarray(batch))


def gather(windows: Windows, cache: FrameCache, rows: np.ndarray) -> dict[str, Any]:
    """The batch of these rows, (B,), with the pictures from memory."""
    observed = torch.from_numpy(windows.observed(rows))
    return windows.vectors(rows) | {key: frames[observed] for key, frames in cache.frames.items()}


def streamed_batches(windows: Windows, order: ShuffledRows, num_workers: int) -> Iterator[dict[str, Any]]:
    """Batches for ever, with the pictures decoded by DataLoader workers."""
    return iter(
        DataLoader(
            _StreamedSamples(windows),
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=_collate,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # of its own: the order of noise must not depend on how pictures are read
        )
    )


class _StreamedSamples(Dataset[dict[str, Any]]):
    """One sample a row; LeRobotDataset decodes its pictures."""

    def __init__(self, windows: Windows):
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows.table)

    @cached_property
    def _pictures(self) -> Any:
        from lerobot.datasets.lerobot_dataset import (
            LeRobotDataset,
        )  # a GB and seconds: only where it is needed

        table = self._windows.table
        steps = [step / table.fps for step in range(1 - self._windows.n_obs_steps, 1)]
        return LeRobotDataset(
            f"local/{table.root.name}",
            root=table.root,
            delta_timestamps=dict.fromkeys(table.image_shapes, steps),
            video_backend="pyav",
            return_uint8=True,
        )

    def __getitem__(self, row: int) -> dict[str, Any]:
        item = self._pictures[row]
        sample = self._windows.vectors(np.array([row]))
        for key in self._windows.table.image_shapes:
            picture = item[key]  # a PNG dataset gives floats in [0, 1] whatever return_uint8 says
            sample[key] = picture if picture.dtype == torch.uint8 else (picture * 255).round().to(torch.uint8)
            sample[key] = sample[key].view(1, self._windows.n_obs_steps, *picture.shape[-3:])
        return sample


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: [task for sample in samples for task in sample[key]]
        if key == TASK
        else torch.cat([sample[key] for sample in samples])
        for key in samples[0]
    }
