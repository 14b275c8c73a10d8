"""Decoded pictures in a file: made once, read by any number of processes and runs.

A file holds a camera's pictures of one dataset, uint8, row after row, and nothing else. Its name carries a hash of all
that they come from; it is made under another name and renamed when it is whole, so that a file of the right name is
right. Runs that need the same file wait for the one that makes it.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from rich.progress import Progress

from dit_policy_training.data.decoding import Resize, decode, kept_shape
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.table import Part
from dit_policy_training.data.videos import Shelf

_VERSION = 1  # of what is written here: raise it when the same sources give other bytes
_READERS = 8  # threads that read: a network disk answers several questions as fast as one
_ALONE = 1 << 20  # bytes below which one thread reads them all


class DiskPictures:
    """The pictures of a file, (rows, 3, H, W) uint8."""

    def __init__(self, path: Path, rows: int, shape: tuple[int, int, int]):
        """Raises DatasetError for a file of another size."""
        self._path, self._rows, self.shape = path, rows, shape
        self._size = math.prod(shape)
        self._file = path.open("rb", buffering=0)
        if (found := os.fstat(self._file.fileno()).st_size) != rows * self._size:
            raise DatasetError(f"{path} has {found} bytes, {rows * self._size} are needed: delete it, it is made anew")
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="pictures")

    @property
    def nbytes(self) -> int:
        """Bytes of all pictures."""
        return self._rows * self._size

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(n,) rows -> (n, 3, H, W). Raises DatasetError if the disk does not give them."""
        pictures = np.empty((len(rows), *self.shape), np.uint8)
        flat = pictures.reshape(len(rows), self._size)
        runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1)
        if pictures.nbytes < _ALONE:
            self._read(flat, rows, runs)
        else:
            list(
                self._pool.map(lambda some: self._read(flat, rows, some), [runs[i::_READERS] for i in range(_READERS)])
            )
        return pictures

    def _read(self, flat: np.ndarray, rows: np.ndarray, runs: list[np.ndarray]) -> None:
        for run in runs:
            wanted = memoryview(flat[run[0] : run[-1] + 1]).cast("B")
            place, done = int(rows[run[0]]) * self._size, 0
            while done < len(wanted):
                try:
                    count = os.preadv(self._file.fileno(), [wanted[done:]], place + done)
                except OSError as error:
                    raise DatasetError(f"{self._path} cannot be read: {error}") from error
                if count == 0:
                    raise DatasetError(f"{self._path} was cut short while it was in use; start again")
                done += count


def cache_folder(part: Part, cache_dir: Path | None) -> Path:
    """Where a dataset's files go: cache_dir, else beside the dataset, in the hub's cache beside its snapshots."""
    if cache_dir is not None:
        return cache_dir
    if part.root.parent.name == "snapshots":
        return part.root.parent.parent / "frames"
    root = part.root.resolve()
    return root.with_name(f"{root.name}.frames")


def cache_file(part: Part, shelf: Shelf, resize: Resize, cache_dir: Path | None) -> Path:
    """The file of a camera's pictures: named after the files they come from, their places there, and their size."""
    stats = [(path, path.stat()) for path in shelf.files]
    sources = [[str(path.relative_to(part.root)), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    digest = hashlib.sha256()
    described = {"version": _VERSION, "shape": kept_shape(shelf, resize), "rows": len(shelf), "files": sources}
    digest.update(json.dumps(described).encode())
    digest.update(np.ascontiguousarray(shelf.file, dtype=np.int64))
    digest.update(np.ascontiguousarray(shelf.place, dtype=np.float64))
    return cache_folder(part, cache_dir) / f"{part.name}-{shelf.key}-{digest.hexdigest()[:16]}.u8"


def make(path: Path, shelf: Shelf, resize: Resize, num_workers: int, progress: Progress | None) -> DiskPictures:
    """The pictures of a file, which is made if it is not there. Raises DatasetError with what to change."""
    shape = kept_shape(shelf, resize)
    nbytes = len(shelf) * math.prod(shape)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(path, progress) as is_alone:
                if not path.exists():
                    _clean(path, is_alone)
                    _write(path, shelf, resize, num_workers, progress)
        except OSError as error:
            raise _in_words(error, path, nbytes) from error
    return DiskPictures(path, len(shelf), shape)


def _write(path: Path, shelf: Shelf, resize: Resize, num_workers: int, progress: Progress | None) -> None:
    shape = kept_shape(shelf, resize)
    size = math.prod(shape)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, max(len(shelf) * size, 1))  # a full disk shows now, not in an hour

            def keep(rows: np.ndarray, pictures: np.ndarray) -> None:
                for row, picture in zip(rows, pictures, strict=True):
                    _write_all(file.fileno(), memoryview(np.ascontiguousarray(picture)).cast("B"), int(row) * size)

            decode(shelf, resize, keep, num_workers, progress)
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_all(file: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(file, data, place)
        data, place = data[count:], place + count


@contextmanager
def _alone(path: Path, progress: Progress | None) -> Iterator[bool]:
    """Waits until no other process makes the file; False where the file system knows no locks."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                progress.console.print(f"waiting for another process, which decodes {path.name}", highlight=False)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _clean(path: Path, is_alone: bool) -> None:
    """Removes what killed processes left of this file."""
    if is_alone:
        for left in path.parent.glob(f"{path.name}.*.partial"):
            with suppress(OSError):
                left.unlink()


def _in_words(error: OSError, path: Path, nbytes: int) -> DatasetError:
    advice = "give --cache_dir=FOLDER on another disk, or --cache=off to decode during training"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DatasetError(
            f"{path.parent} has no room for {nbytes / 1e9:.2f} GB of decoded pictures: {advice}; smaller pictures "
            "(vision.resize_shape) need less"
        )
    return DatasetError(f"decoded pictures cannot be written to {path.parent}: {error.strerror}; {advice}")


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder is on, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
