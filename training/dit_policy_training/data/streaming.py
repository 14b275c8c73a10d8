"""Pictures decoded as they are needed, ahead of the training step, by DataLoader's worker processes."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from dit_policy_training.data.table import Table
from dit_policy_training.data.videos import PictureReader, Shelf, VideoReader, open_file, shelf

_OPEN_FILES = 16  # of a process, a camera


class StreamedFrames:
    """Pictures at their recorded size, (N, 3, H, W) a camera, decoded when they are asked for."""

    def __init__(self, table: Table, num_workers: int):
        self._cameras = {key: _Camera(table, key) for key in table.image_shapes}
        self._num_workers = num_workers
        self.nbytes = sum(len(table) * int(np.prod(shape)) for shape in table.image_shapes.values())

    @property
    def description(self) -> str:
        """Where they are kept, in a few words."""
        return f"pictures decoded on the way by {self._num_workers} processes"

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """(B, n_obs) rows -> by feature key (B, n_obs, 3, H, W) uint8."""
        return {key: camera.read(rows) for key, camera in self._cameras.items()}

    def gather_each(self, batches: Iterable[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        """`gather` of one (B, n_obs) after the other."""
        return map(self.gather, batches)


class _Camera:
    """One camera's pictures over all datasets of a table; the files read last stay open."""

    def __init__(self, table: Table, key: str):
        self._firsts = np.array([part.first for part in table.parts])
        self._shelves: list[Shelf] = [shelf(table, part, key) for part in table.parts]
        self._shape = table.image_shapes[key]
        self._open: OrderedDict[tuple[int, int], VideoReader | PictureReader] = OrderedDict()

    def read(self, rows: np.ndarray) -> Tensor:
        wanted, places = np.unique(rows, return_inverse=True)
        pictures = np.empty((len(wanted), *self._shape), np.uint8)
        for place, row in enumerate(wanted):
            part = int(np.searchsorted(self._firsts, row, side="right")) - 1
            own = int(row - self._firsts[part])
            pictures[place] = self._picture(part, own).transpose(2, 0, 1)
        return torch.from_numpy(pictures[places.reshape(rows.shape)])

    def _picture(self, part: int, row: int) -> np.ndarray:
        pictures = self._shelves[part]
        file = int(pictures.file[row])
        reader = self._open.pop((part, file), None) or open_file(pictures, file)
        self._open[part, file] = reader
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return reader.read(float(pictures.place[row]), row)
