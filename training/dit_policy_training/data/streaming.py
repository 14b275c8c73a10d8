"""Pictures decoded as they are needed, ahead of the training step, by DataLoader's worker processes."""

import signal
from collections import OrderedDict
from collections.abc import Generator, Iterable
from copy import copy
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dit_policy_training.data.decoding import Resize, kept_shape, resized
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.table import Table
from dit_policy_training.data.videos import PictureReader, Shelf, VideoReader, open_file

_OPEN_VIDEOS = 16  # of a process, a camera
_AHEAD = 2  # batches that each process has ready


class StreamedFrames:
    """Pictures decoded when they are asked for, and scaled as those that are kept: a run is the same with either."""

    def __init__(self, table: Table, shelves: dict[str, list[Shelf]], num_workers: int, resize: Resize):
        firsts = np.array([part.first for part in table.parts])
        self._cameras = {key: _Camera(firsts, each, resize) for key, each in shelves.items()}
        self._num_workers = num_workers
        self._one_reads = Lock()  # validation asks while the next batches are made ready
        self.nbytes = sum(len(table) * int(np.prod(camera.shape)) for camera in self._cameras.values())

    @property
    def description(self) -> str:
        """Where they are kept, in a few words."""
        return f"{self.nbytes / 1e9:.1f} GB of pictures, decoded during training by {self._num_workers} processes"

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """(B, n_obs) rows -> by feature key (B, n_obs, 3, H, W) uint8."""
        with self._one_reads:
            return {key: torch.from_numpy(camera.read(rows)) for key, camera in self._cameras.items()}

    def _again(self) -> "StreamedFrames":
        """The same with files of its own: a forked process shares the place in each that is open."""
        again = copy(self)
        again._cameras = {key: camera.closed() for key, camera in self._cameras.items()}
        again._one_reads = Lock()
        return again

    def gather_each(self, batches: Iterable[np.ndarray]) -> Generator[dict[str, Tensor]]:
        """`gather` of one (B, n_obs) after the other, by the processes, in order."""
        if self._num_workers == 0:
            yield from map(self.gather, batches)
            return
        loader = DataLoader(
            _Batches(self._again()),
            sampler=batches,  # any iterable of what the dataset is asked for
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=_AHEAD,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # of its own: the order of noise must not depend on how pictures are read
        )
        try:
            for found in loader:
                if isinstance(found, DatasetError):
                    raise found
                yield found
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DatasetError(
                f"a process that decodes pictures was ended ({str(error).splitlines()[0]}): memory is short, or shared "
                "memory (/dev/shm; Docker's --shm-size). Use fewer --num_workers, a smaller --batch_size, or "
                "--cache=disk"
            ) from error


class _Batches(Dataset[Any]):
    """What DataLoader's processes do. An error goes back as a value: raised there, it would come as a traceback."""

    def __init__(self, frames: StreamedFrames):
        self._frames = frames

    def __getitem__(self, rows: Any) -> dict[str, Tensor] | DatasetError:
        try:
            return self._frames.gather(rows)
        except DatasetError as error:
            return error


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process; this one must serve until the main one has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Camera:
    """One camera's pictures over all datasets of a table; the files read last stay open."""

    def __init__(self, firsts: np.ndarray, shelves: list[Shelf], resize: Resize):
        self._firsts, self._shelves, self._resize = firsts, shelves, resize
        self.shape = kept_shape(shelves[0], resize)
        self._open: OrderedDict[tuple[int, int], VideoReader | PictureReader] = OrderedDict()

    def closed(self) -> "_Camera":
        return _Camera(self._firsts, self._shelves, self._resize)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(B, n_obs) rows -> (B, n_obs, 3, H, W), each picture decoded once, file by file, in order."""
        wanted, places = np.unique(rows, return_inverse=True)
        parts = np.asarray(np.searchsorted(self._firsts, wanted, side="right")) - 1
        own = wanted - self._firsts[parts]
        pictures, key = np.empty((len(wanted), *self.shape), np.uint8), self._shelves[0].key
        found = [(int(part), int(self._shelves[part].file[row])) for part, row in zip(parts, own, strict=True)]
        seconds = [self._shelves[part].place[row] for part, row in zip(parts, own, strict=True)]
        for place in sorted(range(len(wanted)), key=lambda i: (found[i], seconds[i])):
            reader = self._reader(*found[place])
            picture = torch.from_numpy(reader.read(float(seconds[place]), int(wanted[place]))).permute(2, 0, 1)
            pictures[place] = resized(picture.unsqueeze(0), key, self._resize)[0].numpy()
        return pictures.take(places.reshape(rows.shape), axis=0)

    def _reader(self, part: int, file: int) -> VideoReader | PictureReader:
        reader = self._open.pop((part, file), None) or open_file(self._shelves[part], file)
        self._open[part, file] = reader
        if len(self._open) > _OPEN_VIDEOS:
            self._open.popitem(last=False)[1].close()
        return reader
