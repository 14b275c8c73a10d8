"""The pictures of a table's rows: decoded once and kept, in memory or in a file, or decoded as they are needed."""

import math
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from dit_policy_training.data.decoding import Resize, decode, kept_shape
from dit_policy_training.data.disk import cache_file, cache_folder, free_bytes, make
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.streaming import StreamedFrames
from dit_policy_training.data.table import Table
from dit_policy_training.data.videos import Shelf, shelf
from dit_policy_training.data.windows import Windows

_OF_MEMORY = 0.8  # of what is available: the rest is for training
_OF_DISK = 0.95  # of what is free

Shelves = dict[str, list[Shelf]]  # by camera, those of each dataset


class Frames(Protocol):
    """Pictures by row."""

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """(B, n_obs) rows -> by feature key (B, n_obs, 3, H, W) uint8."""

    def gather_each(self, batches: Iterable[np.ndarray]) -> Generator[dict[str, Tensor]]:
        """`gather` of one (B, n_obs) after the other; what decodes works ahead."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures of all rows."""

    @property
    def description(self) -> str:
        """Where they are kept, in a few words."""


class Pictures(Protocol):
    """A camera's pictures of one dataset."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(n,) rows of the dataset -> (n, 3, H, W) uint8."""


def open_frames(
    table: Table,
    *,
    cache: Literal["auto", "memory", "disk", "off"] = "auto",
    cache_limit_gb: float = 4.0,
    cache_disk_limit_gb: float = 100.0,
    cache_dir: Path | None = None,
    resize: Resize | None = None,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Frames:
    """The pictures of all rows, scaled by `resize`, the same wherever they are kept; scaling twice changes nothing.

    Decoded by `num_workers` threads, or as they are needed by as many processes. Raises DatasetError for pictures that
    are missing, damaged or of another size than the dataset says, and where there is no room for them.
    """
    resize = resize or {}
    shelves = {key: [shelf(table, part, key) for part in table.parts] for key in table.image_shapes}
    if cache == "auto":
        cache = _chosen(table, shelves, resize, cache_limit_gb, cache_disk_limit_gb, cache_dir)
    if cache == "off":
        return StreamedFrames(table, shelves, num_workers, resize)
    kept: dict[str, list[Pictures]] = {}
    for key, each in shelves.items():
        kept[key] = []
        for part, one in zip(table.parts, each, strict=True):
            if cache == "memory":
                kept[key].append(MemoryPictures(one, resize, num_workers, progress))
            else:
                kept[key].append(make(cache_file(part, one, resize, cache_dir), one, resize, num_workers, progress))
    where = "memory" if cache == "memory" else str(cache_folder(table.parts[0], cache_dir))
    return KeptFrames(table, kept, where)


def _chosen(
    table: Table, shelves: Shelves, resize: Resize, limit_gb: float, disk_limit_gb: float, cache_dir: Path | None
) -> Literal["memory", "disk", "off"]:
    """Memory, where all processes of this machine find room for a copy each; else a file; else neither.

    Several processes on a machine share a file rather than decode everything several times.
    """
    nbytes = nbytes_of(shelves, resize)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    in_memory = nbytes * processes <= min(limit_gb * 1e9, _OF_MEMORY * _available_memory())
    if in_memory and processes == 1:
        return "memory"
    if nbytes <= disk_limit_gb * 1e9 and _is_on_disk(table, shelves, resize, cache_dir):
        return "disk"
    return "memory" if in_memory else "off"


def _is_on_disk(table: Table, shelves: Shelves, resize: Resize, cache_dir: Path | None) -> bool:
    """Whether the files are there, or can be made."""
    for place, part in enumerate(table.parts):
        folder = cache_folder(part, cache_dir)
        files = [(each[place], cache_file(part, each[place], resize, cache_dir)) for each in shelves.values()]
        missing = sum(len(one) * math.prod(kept_shape(one, resize)) for one, path in files if not path.exists())
        if missing and (missing > _OF_DISK * free_bytes(folder) or not _is_writable(folder)):
            return False
    return True


def _is_writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _available_memory() -> float:
    """Bytes that this process may still take, of the machine's and of its container's."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))]
    with suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])]
    with suppress(OSError, ValueError, KeyError):  # a container's limit, if it has one; the disk's cache gives way
        group = Path("/sys/fs/cgroup")
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        given_way = float(counted["inactive_file"]) + float(counted["active_file"])
        used = float((group / "memory.current").read_text()) - given_way
        found.append(float((group / "memory.max").read_text()) - used)
    return min(found)


def nbytes_of(shelves: Shelves, resize: Resize) -> int:
    """Bytes of the pictures of all rows as they are kept."""
    return sum(len(one) * math.prod(kept_shape(one, resize)) for each in shelves.values() for one in each)


def gather(windows: Windows, frames: Frames, rows: np.ndarray) -> dict[str, Any]:
    """The batch of these rows, (B,): windows.vectors and the pictures, by feature key."""
    return windows.vectors(rows) | frames.gather(windows.observed(rows))


def batches(windows: Windows, frames: Frames, order: Iterable[np.ndarray]) -> Generator[dict[str, Any]]:
    """`gather` of one (B,) after the other; frames that are decoded as they are needed are decoded ahead."""
    rows: list[np.ndarray] = []

    def observed() -> Iterator[np.ndarray]:
        for batch in order:
            rows.append(batch)
            yield windows.observed(batch)

    with closing(frames.gather_each(observed())) as each:  # processes end with it
        for pictures in each:
            yield windows.vectors(rows.pop(0)) | pictures


class MemoryPictures:
    """A camera's pictures of one dataset in memory; each file is decoded once, in order."""

    def __init__(self, shelf: Shelf, resize: Resize, num_workers: int = 0, progress: Progress | None = None):
        self.shape = kept_shape(shelf, resize)
        needed = len(shelf) * math.prod(self.shape)
        if needed > (available := _available_memory()):
            raise DatasetError(
                f"{needed / 1e9:.1f} GB of pictures of {shelf.key} do not fit into the {available / 1e9:.1f} GB of "
                "memory that are free: --cache=disk or --cache=off, or smaller pictures (vision.resize_shape)"
            )
        self.pictures = np.empty((len(shelf), *self.shape), np.uint8)

        def keep(rows: np.ndarray, pictures: np.ndarray) -> None:
            self.pictures[rows] = pictures

        decode(shelf, resize, keep, num_workers, progress)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.pictures.nbytes

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(n,) rows of the dataset -> (n, 3, H, W) uint8."""
        return self.pictures.take(rows, axis=0)  # seven times as fast as indexing


class KeptFrames:
    """Every picture decoded and scaled already, uint8."""

    def __init__(self, table: Table, kept: dict[str, list[Pictures]], where: str):
        self._firsts = np.array([part.first for part in table.parts])
        self._kept, self._where = kept, where

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures of all rows."""
        return sum(pictures.nbytes for each in self._kept.values() for pictures in each)

    @property
    def description(self) -> str:
        """Where they are kept, in a few words."""
        return f"{self.nbytes / 1e9:.1f} GB of decoded pictures in {self._where}"

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """(B, n_obs) rows -> by feature key (B, n_obs, 3, H, W) uint8."""
        flat = rows.reshape(-1)
        found = {key: torch.from_numpy(self._take(each, flat)) for key, each in self._kept.items()}
        return {key: pictures.view(*rows.shape, *pictures.shape[1:]) for key, pictures in found.items()}

    def _take(self, each: list[Pictures], rows: np.ndarray) -> np.ndarray:
        if len(each) == 1:
            return each[0].take(rows)
        pictures = np.empty((len(rows), *each[0].shape), np.uint8)
        parts = np.searchsorted(self._firsts, rows, side="right") - 1
        for part in np.unique(parts):
            of_part = parts == part
            pictures[of_part] = each[part].take(rows[of_part] - self._firsts[part])
        return pictures

    def gather_each(self, batches: Iterable[np.ndarray]) -> Generator[dict[str, Tensor]]:
        """`gather` of one (B, n_obs) after the other."""
        yield from map(self.gather, batches)
