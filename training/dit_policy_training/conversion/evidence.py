"""What an episode was before anything wrote it: so that a finished dataset can be held against it.

The witness sees each row before the writer does. Of the vectors it keeps a hash, of the tasks where they change, and of
each camera a few whole pictures, lossless. That costs next to nothing, and what is wrong later, in an encoder, in a
table, or in a merge, cannot be right in both places.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np

FOLDER = "evidence"  # in a shard's folder
KEPT = 4  # pictures a camera and episode, the last one among them


class EvidenceError(ValueError):
    """A shard without the evidence that its writer leaves, or with a damaged one; says what to do."""


@dataclass(frozen=True)
class EpisodeEvidence:
    """One episode as sampled."""

    frames: int
    tasks: list[list[Any]]  # [first frame, task] wherever the task changes; the first at frame 0
    vectors: dict[str, str]  # SHA-256 by feature: of all rows' float32 values, little-endian
    pictures: list[int]  # frames whose pictures were kept, ascending
    folder: Path | None = None  # where they lie

    def picture(self, key: str, frame: int) -> np.ndarray:
        """A kept picture as it was sampled: (H, W, 3) uint8, or depth (H, W) as it came."""
        assert self.folder is not None
        path = self.folder / f"{key}-{frame:06d}"
        if (png := path.with_suffix(".png")).exists():
            return np.asarray(cv2.cvtColor(_read_png(png), cv2.COLOR_BGR2RGB))
        if (table := path.with_suffix(".npy")).exists():
            return np.asarray(np.load(table))
        raise EvidenceError(f"{path}.png is missing; remove the shard {self.folder.parents[1]} and convert again")


class Witness:
    """Sees the rows of one episode after the other, and leaves an EpisodeEvidence of each in `folder`.

    Pictures are held by reference until the episode ends, KEPT rows of them at most: rows must not be overwritten.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._episodes = 0
        self._forget()

    def add(self, row: Any) -> None:
        """A row (of `.frame`, `.action`, `.task`) before it is written."""
        if not self._tasks or self._tasks[-1][1] != row.task:
            self._tasks.append([self._frames, row.task])
        pictures = {}
        for key, value in (*row.frame.items(), ("action", row.action)):
            if value.ndim > 1:
                pictures[key] = value
            else:
                self._hashes.setdefault(key, hashlib.sha256()).update(vector_bytes(value))
        self._hold(pictures)
        self._frames += 1

    def _hold(self, pictures: dict[str, np.ndarray]) -> None:
        """Keep every n-th, n doubling: evenly spread, however long the episode gets."""
        self._last = (self._frames, pictures)
        if self._frames % self._every == 0:
            self._held[self._frames] = pictures
        if len(self._held) == KEPT:
            self._every *= 2
            self._held = {frame: held for frame, held in self._held.items() if frame % self._every == 0}

    def end(self, keep: bool) -> None:
        """The episode is over; `keep` says whether its evidence is needed."""
        if keep:
            self._write()
            self._episodes += 1
        self._forget()

    def _write(self) -> None:
        frame, pictures = self._last
        held = {**self._held, frame: pictures}
        folder = self._folder / f"episode-{self._episodes:06d}"
        folder.mkdir(parents=True)
        for frame, pictures in held.items():
            for key, picture in pictures.items():
                _write_picture(folder / f"{key}-{frame:06d}", picture)
        vectors = {key: hashed.hexdigest() for key, hashed in self._hashes.items()}
        record = asdict(EpisodeEvidence(self._frames, self._tasks, vectors, sorted(held)))
        del record["folder"]
        (folder / "episode.json").write_text(json.dumps(record, indent=1, ensure_ascii=False))

    def _forget(self) -> None:
        self._frames, self._every = 0, 1
        self._tasks: list[list[Any]] = []
        self._hashes: dict[str, Any] = {}
        self._held: dict[int, dict[str, np.ndarray]] = {}
        self._last: tuple[int, dict[str, np.ndarray]] = (0, {})


@dataclass(frozen=True)
class ShardEvidence:
    """All episodes of a shard, in order."""

    shard: Path
    episodes: tuple[EpisodeEvidence, ...]

    @classmethod
    def load(cls, shard: Path) -> Self:
        """Raises EvidenceError if the shard has none, or it cannot be read."""
        folders = sorted((shard / FOLDER).glob("episode-*"))
        if not folders:
            raise EvidenceError(f"{shard} has no {FOLDER} to check the dataset by; remove it and convert again")
        return cls(shard, tuple(_load(folder) for folder in folders))


def vector_bytes(values: np.ndarray) -> bytes:
    """What is hashed: float32, little-endian, row after row."""
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def hash_of(rows: np.ndarray) -> str:
    """The hash that a Witness would have made of these rows, (N, D) float32."""
    return hashlib.sha256(vector_bytes(rows)).hexdigest()


def _load(folder: Path) -> EpisodeEvidence:
    try:
        record: Mapping[str, Any] = json.loads((folder / "episode.json").read_text())
        return EpisodeEvidence(**record, folder=folder)
    except (OSError, ValueError, TypeError) as error:
        raise EvidenceError(f"{folder}: {error}; remove the shard {folder.parents[1]} and convert again") from error


def _write_picture(path: Path, picture: np.ndarray) -> None:
    if picture.dtype != np.uint8:
        np.save(path.with_suffix(".npy"), picture)
        return
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    encoded, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), fast)
    if not encoded:
        raise EvidenceError(f"{path}: a picture of {picture.shape} cannot be kept as PNG")
    path.with_suffix(".png").write_bytes(data.tobytes())


def _read_png(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise EvidenceError(f"{path} is damaged; remove the shard {path.parents[2]} and convert again")
    return np.asarray(picture)
