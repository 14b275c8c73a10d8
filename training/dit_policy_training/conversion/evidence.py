"""What an episode was before anything wrote it: so that a finished dataset can be held against it.

The witness sees each row before the writer does. It keeps all vectors as they are, the tasks where they change, and of
each camera a few whole pictures, lossless. That costs next to nothing, and what goes wrong later, in an encoder, in a
table, or in a merge, cannot go wrong here in the same way.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import cv2
import numpy as np

from dit_policy_training.conversion.likeness import LOSSLESS, psnr

FOLDER = "evidence"  # in a shard's folder
KEPT = 4  # pictures a camera and episode, the last one among them


class EvidenceError(ValueError):
    """A shard without the evidence that its writer leaves, or with a damaged one; says what to do."""


@dataclass(frozen=True)
class EpisodeEvidence:
    """One episode as sampled."""

    folder: Path
    frames: int
    tasks: list[list[Any]]  # [first frame, task] wherever the task changes; the first at frame 0
    vectors: dict[str, int]  # length by feature
    pictures: list[int]  # frames whose pictures were kept, ascending; the last frame among them
    # By camera and kept frame: how like (PSNR, dB) the row before and the row after are, None if equal.
    beside: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)

    def vector(self, key: str) -> np.ndarray:
        """(frames, length) float32; raises EvidenceError if values are missing."""
        values = np.fromfile(self.folder / f"{key}.f32", dtype="<f4")
        if values.size != self.frames * self.vectors[key]:
            raise EvidenceError(f"{self.folder}/{key}.f32 is incomplete; {_advice(self.folder)}")
        return values.reshape(self.frames, self.vectors[key])

    def picture(self, key: str, frame: int) -> np.ndarray:
        """A kept picture as it was sampled: (H, W, 3) uint8, or depth as it came."""
        name = f"{key}-{frame:06d}"
        try:
            if (depth := self.folder / f"{name}.npy").exists():
                return np.asarray(np.load(depth))
            png = np.fromfile(self.folder / f"{name}.png", np.uint8)
            return np.asarray(cv2.cvtColor(cv2.imdecode(png, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))
        except (OSError, ValueError, cv2.error) as error:
            raise EvidenceError(f"{self.folder / name}: {error}; {_advice(self.folder)}") from error


class Witness:
    """Sees the rows of one episode after the other, and leaves an EpisodeEvidence of each kept one in `folder`.

    Memory: KEPT rows' pictures, held by reference until the episode ends, so that rows must not be overwritten.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._kept = 0
        self._episode: _Episode | None = None

    def add(self, row: Any) -> None:
        """A row (of `.frame`, `.action`, `.task`) before it is written."""
        if self._episode is None:
            self._episode = _Episode(self._folder / f"episode-{self._kept:06d}")
        self._episode.add({**row.frame, "action": row.action}, row.task)

    def end(self, keep: bool) -> None:
        """The episode is over; `keep` says whether its evidence is."""
        if self._episode is None:
            return
        if keep:
            self._episode.finish()
            self._kept += 1
        else:
            self._episode.forget()
        self._episode = None


class _Episode:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self._folder = folder
        self._frames, self._every = 0, 1
        self._tasks: list[list[Any]] = []
        self._files: dict[str, BinaryIO] = {}
        self._lengths: dict[str, int] = {}
        self._held: dict[int, dict[str, np.ndarray]] = {}
        self._last: dict[str, np.ndarray] = {}
        self._before: dict[str, np.ndarray] = {}
        self._beside: dict[int, dict[str, list[float | None]]] = {}

    def add(self, values: Mapping[str, np.ndarray], task: str) -> None:
        if not self._tasks or self._tasks[-1][1] != task:
            self._tasks.append([self._frames, task])
        for key, value in values.items():
            if value.ndim == 1:
                self._add_vector(key, value)
        self._hold({key: value for key, value in values.items() if value.ndim > 1})
        self._frames += 1

    def _add_vector(self, key: str, value: np.ndarray) -> None:
        if key not in self._files:
            self._files[key] = (self._folder / f"{key}.f32").open("wb")
            self._lengths[key] = len(value)
        self._files[key].write(np.ascontiguousarray(value, dtype="<f4").tobytes())

    def _hold(self, pictures: dict[str, np.ndarray]) -> None:
        """The first, and every n-th, n doubling: evenly spread, however long the episode gets.

        The n-th have odd numbers: with two frames from one whole picture to the next, these are the worse ones.
        """
        if self._frames - 1 in self._held:
            self._compare(self._frames - 1, self._last, pictures)
        if self._is_due(self._frames):
            self._held[self._frames] = pictures
            self._compare(self._frames, pictures, self._last)
        self._before, self._last = self._last, pictures
        if len(self._held) == KEPT:
            self._every *= 2
            self._held = {frame: held for frame, held in self._held.items() if self._is_due(frame)}

    def _compare(self, frame: int, pictures: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> None:
        """How like a held row's pictures are to those of a row beside it; depth is not compared."""
        told = self._beside.setdefault(frame, {})
        for key, other in others.items():
            if other.dtype == np.uint8:
                decibels = psnr(pictures[key], other)
                told.setdefault(key, []).append(None if decibels == LOSSLESS else round(decibels, 2))

    def _is_due(self, frame: int) -> bool:
        return frame == 0 or (frame + 1) % self._every == 0

    def finish(self) -> None:
        self._close()
        if self._frames - 1 not in self._held:
            self._held[self._frames - 1] = self._last
            self._compare(self._frames - 1, self._last, self._before)
        for frame, pictures in self._held.items():
            for key, picture in pictures.items():
                _write_picture(self._folder, f"{key}-{frame:06d}", picture)
        record = {
            "frames": self._frames,
            "tasks": self._tasks,
            "vectors": self._lengths,
            "pictures": sorted(self._held),
            "beside": self._told_beside(),
        }
        (self._folder / "episode.json").write_text(json.dumps(record, indent=1, ensure_ascii=False))

    def _told_beside(self) -> dict[str, dict[str, list[float | None]]]:
        told: dict[str, dict[str, list[float | None]]] = {}
        for frame in sorted(self._held):
            for key, decibels in self._beside.get(frame, {}).items():
                told.setdefault(key, {})[str(frame)] = decibels
        return told

    def forget(self) -> None:
        self._close()
        shutil.rmtree(self._folder)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()


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
            raise EvidenceError(f"{shard} has no {FOLDER} to check the dataset by; {_advice(shard)}")
        return cls(shard, tuple(_load(folder) for folder in folders))


def _load(folder: Path) -> EpisodeEvidence:
    try:
        return EpisodeEvidence(folder, **json.loads((folder / "episode.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise EvidenceError(f"{folder}/episode.json: {error}; {_advice(folder)}") from error


def _advice(inside: Path) -> str:
    shard = next((path.parent for path in (inside, *inside.parents) if path.name == FOLDER), inside)
    return f"remove the shard {shard} and convert again"


def _write_picture(folder: Path, name: str, picture: np.ndarray) -> None:
    if picture.dtype != np.uint8:
        np.save(folder / f"{name}.npy", picture)  # depth
        return
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    (folder / f"{name}.png").write_bytes(cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())
