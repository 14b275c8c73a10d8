"""The pictures of a table's rows: decoded once and kept, in memory or in a file, or decoded as they are needed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from dit_policy_training.data.table import Table
from dit_policy_training.data.videos import open_file, shelf
from dit_policy_training.data.windows import Windows

Resize = Mapping[str, Callable[[Tensor], Tensor]]


class Frames(Protocol):
    """Pictures by row."""

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """(B, n_obs) rows -> by feature key (B, n_obs, 3, H, W) uint8."""

    def gather_each(self, batches: Iterable[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        """`gather` of one (B, n_obs) after the other; what decodes works ahead."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures of all rows."""

    @property
    def description(self) -> str:
        """Where they are kept, in a few words."""


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
    """The pictures of all rows, scaled by `resize`.

    `resize`, by feature key, is what a policy does first with float pictures (N, 3, H, W) in [0, 1]; done here, it is
    not done again in every epoch, and the pictures it makes smaller need less room. Raises DatasetError for pictures
    that are missing, damaged or of another size than the dataset says.
    """
    from dit_policy_training.data.streaming import StreamedFrames

    resize = resize or {}
    if cache == "off" or (cache == "auto" and nbytes_of(table, resize) / 1e9 > cache_limit_gb):
        return StreamedFrames(table, num_workers)
    return MemoryFrames(table, resize, progress)


def gather(windows: Windows, frames: Frames, rows: np.ndarray) -> dict[str, Any]:
    """The batch of these rows, (B,): windows.vectors and the pictures, by feature key."""
    return windows.vectors(rows) | frames.gather(windows.observed(rows))


def batches(windows: Windows, frames: Frames, order: Iterable[np.ndarray]) -> Iterator[dict[str, Any]]:
    """`gather` of one (B,) after the other; frames that are decoded as they are needed are decoded ahead."""
    rows: list[np.ndarray] = []

    def observed() -> Iterator[np.ndarray]:
        for batch in order:
            rows.append(batch)
            yield windows.observed(batch)

    for pictures in frames.gather_each(observed()):
        yield windows.vectors(rows.pop(0)) | pictures


def kept_shapes(table: Table, resize: Resize) -> dict[str, tuple[int, ...]]:
    """(3, H, W) of each camera's pictures as they are kept."""
    empty = {key: torch.zeros(shape, dtype=torch.uint8) for key, shape in table.image_shapes.items()}
    return {key: tuple(resized(resize, key, picture).shape) for key, picture in empty.items()}


def nbytes_of(table: Table, resize: Resize) -> int:
    """Bytes of the pictures of all rows as they are kept."""
    return len(table) * sum(math.prod(shape) for shape in kept_shapes(table, resize).values())


def resized(resize: Resize, key: str, picture: Tensor) -> Tensor:
    """(3, H, W) uint8 -> the same, as it is kept."""
    if key not in resize:
        return picture
    return (resize[key](picture.unsqueeze(0)).squeeze(0) * 255).round().to(torch.uint8)


class MemoryFrames:
    """Every picture in memory, uint8, (N, 3, H, W) a camera; each video is decoded once, in order."""

    def __init__(self, table: Table, resize: Resize, progress: Progress | None = None):
        self.frames: dict[str, Tensor] = {}
        total = len(table) * len(table.image_shapes)
        job = progress.add_task("decoding", total=total, note="pictures") if progress else None
        for key, shape in kept_shapes(table, resize).items():
            frames = torch.empty((len(table), *shape), dtype=torch.uint8)
            for part in table.parts:
                pictures = shelf(table, part, key)
                for file in range(len(pictures.files)):
                    reader = open_file(pictures, file, threads=0)
                    for row in np.flatnonzero(pictures.file == file):
                        picture = torch.from_numpy(reader.read(pictures.place[row], int(row))).permute(2, 0, 1)
                        frames[part.first + row] = resized(resize, key, picture)
                        if progress and job is not None:
                            progress.update(job, advance=1)
                    reader.close()
            self.frames[key] = frames

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures of all rows."""
        return sum(frames.nbytes for frames in self.frames.values())

    @property
    def description(self) -> str:
        """Where they are kept, in a few words."""
        return f"{self.nbytes / 1e9:.1f} GB of pictures in memory"

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """(B, n_obs) rows -> by feature key (B, n_obs, 3, H, W) uint8."""
        wanted = torch.from_numpy(rows)
        return {key: frames[wanted] for key, frames in self.frames.items()}

    def gather_each(self, batches: Iterable[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        """`gather` of one (B, n_obs) after the other."""
        return map(self.gather, batches)
