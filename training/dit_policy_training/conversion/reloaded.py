"""A finished dataset as LeRobot reads it: its rows, its episodes, its frames."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dit_policy_training.conversion import lerobot_format

VISUAL = ("image", "video")
BOOKKEEPING = ("index", "episode_index", "frame_index", "timestamp", "task_index")
PICTURES_READ = 64  # at a time
HELD = 4  # decoded frames: one, those beside it, and one to spare


@dataclass
class Reloaded:
    """N rows without pictures, episodes, and LeRobotDataset for the pictures."""

    root: Path
    lerobot: Any
    table: pd.DataFrame
    episodes: list[dict[str, Any]]  # meta/episodes
    _vectors: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path) -> Self:
        """Never asks the network.

        Raises whatever LeRobot raises, FileNotFoundError that names a lost file, and ValueError if its rows are not as
        many as info.json promises.
        """
        from lerobot.datasets.lerobot_dataset import LeRobotDataset  # a GB and seconds: only where it is needed

        _check_files(root)
        info = json.loads((root / "meta" / "info.json").read_text())
        name = f"local/{root.name.strip('.')}"
        with _offline():
            lerobot = LeRobotDataset(name, root=root, video_backend="pyav", return_uint8=True)
        if len(lerobot) != info["total_frames"]:
            raise ValueError(f"{len(lerobot)} rows, info.json promises {info['total_frames']}")
        columns = [key for key, feature in info["features"].items() if feature["dtype"] not in VISUAL]
        files = sorted((root / "data").glob("chunk-*/file-*.parquet"))
        table = pd.concat([pd.read_parquet(path, columns=columns) for path in files], ignore_index=True)
        return cls(root, lerobot, table, [dict(episode) for episode in lerobot.meta.episodes])

    @property
    def fps(self) -> int:
        """Rows a second."""
        return int(self.lerobot.fps)

    @cached_property
    def features(self) -> Mapping[str, Mapping[str, Any]]:
        """As in info.json."""
        return dict(self.lerobot.meta.features)

    @cached_property
    def cameras(self) -> list[str]:
        """Keys of the features that are pictures, depth among them."""
        return [key for key, feature in self.features.items() if feature["dtype"] in VISUAL]

    @cached_property
    def vector_keys(self) -> list[str]:
        """Keys of state, action and their like."""
        plain = [key for key in self.features if key not in (*BOOKKEEPING, *self.cameras)]
        return [key for key in plain if self.features[key]["dtype"] == "float32"]

    def names(self, key: str) -> list[str]:
        """Of a vector's values."""
        return list(self.features[key].get("names") or map(str, range(self.features[key]["shape"][0])))

    def vector(self, key: str) -> np.ndarray:
        """(N, D) float32."""
        if key not in self._vectors:
            self._vectors[key] = np.stack(self.table[key].to_list()).astype(np.float32)
        return self._vectors[key]

    def pictures(self, key: str) -> Iterator[bytes]:
        """The files of a camera whose pictures lie in the tables, in order."""
        for path in sorted((self.root / "data").glob("chunk-*/file-*.parquet")):
            with pq.ParquetFile(path) as table:
                for rows in table.iter_batches(PICTURES_READ, columns=[key]):
                    yield from rows.column(0).field("bytes").to_pylist()

    def rows(self, episode: int) -> slice:
        """Those of an episode."""
        first, end = np.searchsorted(self._episode_index, (episode, episode + 1))
        return slice(int(first), int(end))

    @cached_property
    def _episode_index(self) -> np.ndarray:
        return self.table["episode_index"].to_numpy()

    @cached_property
    def tasks(self) -> dict[int, str]:
        """By task_index."""
        return {int(index): str(task) for task, index in self.lerobot.meta.tasks["task_index"].items()}

    def is_depth(self, key: str) -> bool:
        """Whether a camera measures depth."""
        return bool((self.features[key].get("info") or {}).get("is_depth_map"))

    def video_rows(self, key: str) -> dict[Path, int]:
        """How many rows each mp4 of a camera has to serve."""
        rows: Counter[Path] = Counter()
        for number, episode in enumerate(self.episodes):
            rows[self.root / self.lerobot.meta.get_video_file_path(number, key)] += int(episode["length"])
        return dict(rows)


def _check_files(root: Path) -> None:
    """LeRobot would look for a lost file of meta/ or data/ on the Hub."""
    for name in (lerobot_format.INFO, lerobot_format.TASKS):
        if not (root / name).is_file():
            raise FileNotFoundError(f"{name} is missing")
    episodes = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not episodes:
        raise FileNotFoundError("meta/episodes has no file, its tables are missing")
    columns = ["data/chunk_index", "data/file_index"]
    places = pd.concat([pd.read_parquet(path, columns=columns) for path in episodes]).drop_duplicates()
    for chunk, file in places.itertuples(index=False):
        data = lerobot_format.DATA.format(chunk_index=chunk, file_index=file)
        if not (root / data).is_file():
            raise FileNotFoundError(f"{data} is missing")


@contextmanager
def _offline() -> Iterator[None]:
    """The Hub's client refuses every request meanwhile. A dataset beside us is never on the Hub."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


class Reel:
    """One episode's samples, each decoded once as long as they are asked for in order."""

    def __init__(self, dataset: Reloaded, episode: int):
        self._dataset = dataset
        self._rows = dataset.rows(episode)
        self._held: dict[int, dict[str, Any] | Exception] = {}

    def __len__(self) -> int:
        return self._rows.stop - self._rows.start

    def sample(self, frame: int) -> dict[str, Any]:
        """LeRobot's sample; raises what it raises, a timestamp out of its tolerance for one."""
        if frame not in self._held:
            for old in list(self._held)[: 1 - HELD]:
                del self._held[old]
            try:
                self._held[frame] = self._dataset.lerobot[self._rows.start + frame]
            except Exception as error:
                self._held[frame] = error
        held = self._held[frame]
        if isinstance(held, Exception):
            raise held
        return held

    def picture(self, key: str, frame: int) -> np.ndarray:
        """(H, W, 3) uint8; depth: (H, W) float32, mm."""
        value = self.sample(frame)[key]
        if self._dataset.is_depth(key):
            return np.squeeze(value.numpy()).astype(np.float32)
        pixels = value if str(value.dtype) == "torch.uint8" else (value * 255).round().byte()
        return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())

    def beside(self, key: str, frame: int) -> list[np.ndarray]:
        """The pictures before and after, as far as LeRobot gives them."""
        pictures = []
        for other in (frame - 1, frame + 1):
            if 0 <= other < len(self):
                try:
                    pictures.append(self.picture(key, other))
                except Exception:  # told where that frame itself is asked for
                    continue
        return pictures
