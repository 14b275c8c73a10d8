"""Every picture of a camera once, in order, by several threads.

Threads, not processes: libav, libswscale and torch let go of Python's lock while they work, and nothing has to be sent.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import pairwise
from threading import Event, Lock

import numpy as np
import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from dit_policy_training.data.videos import Shelf, open_file

Resize = Mapping[str, Callable[[Tensor], Tensor]]
"""By feature key, what a policy does first with float pictures (N, 3, H, W) in [0, 1]."""

_JOB = 2000  # pictures that a thread decodes from one opening of a file
_A_MINUTE = 60.0
_TOGETHER = 4  # pictures that are scaled and handed over at once: as floats they are large


def kept_shape(shelf: Shelf, resize: Resize) -> tuple[int, int, int]:
    """(3, H, W) of a camera's pictures after scaling."""
    channels, height, width = resized(torch.zeros((1, *shelf.shape), dtype=torch.uint8), shelf.key, resize).shape[1:]
    return channels, height, width


def resized(pictures: Tensor, key: str, resize: Resize) -> Tensor:
    """(N, 3, H, W) uint8 -> the same, scaled."""
    if key not in resize:
        return pictures
    return (resize[key](pictures) * 255).round().to(torch.uint8)


def decode(
    shelf: Shelf,
    resize: Resize,
    keep: Callable[[np.ndarray, np.ndarray], None],
    num_workers: int,
    progress: Progress | None = None,
) -> None:
    """Calls keep(rows (n,), pictures (n, 3, H, W) uint8) until every row of the shelf was kept, from several threads.

    Raises DatasetError for a picture that cannot be had, and what `keep` raises; the rest is then left.
    """
    job = progress.add_task("decoding", total=len(shelf), note=shelf.key) if progress else None
    told = _Lines(progress, job)
    threads = 0 if num_workers < 2 else 1  # of each decoder: 0 lets it take all cores
    stop = Event()

    def work(file: int, rows: np.ndarray) -> None:
        for some, pictures in _pictures(shelf, file, rows, threads):
            if stop.is_set():
                return
            keep(some, resized(torch.from_numpy(pictures), shelf.key, resize).numpy())
            if progress and job is not None:
                progress.update(job, advance=len(some))
                told.tell()

    with ThreadPoolExecutor(max(num_workers, 1), thread_name_prefix="decoding") as pool:
        try:
            futures = [pool.submit(work, file, rows) for file, rows in _jobs(shelf)]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:  # also on Ctrl-C
            stop.set()
            pool.shutdown(cancel_futures=True)
    if progress and job is not None:
        progress.remove_task(job)


class _Lines:
    """A line a minute where there is no terminal for a bar, as under nohup or Slurm."""

    def __init__(self, progress: Progress | None, job: TaskID | None):
        self._progress, self._job, self._due, self._lock = progress, job, time.monotonic() + _A_MINUTE, Lock()

    def tell(self) -> None:
        if self._progress is None or self._job is None or not self._progress.disable:
            return
        with self._lock:
            if time.monotonic() < self._due:
                return
            self._due = time.monotonic() + _A_MINUTE
        task = next(task for task in self._progress.tasks if task.id == self._job)
        line = f"decoding {task.fields['note']}: {int(task.completed)} of {int(task.total or 0)} pictures"
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _jobs(shelf: Shelf) -> Iterator[tuple[int, np.ndarray]]:
    """A file and rows of it, in the order of the file."""
    order = np.lexsort((shelf.place, shelf.file))
    bounds = np.searchsorted(shelf.file[order], np.arange(len(shelf.files) + 1))
    for file, (first, end) in enumerate(pairwise(bounds)):
        for start in range(first, end, _JOB):
            yield file, order[start : min(start + _JOB, end)]


def _pictures(shelf: Shelf, file: int, rows: np.ndarray, threads: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some of the rows at a time, and their pictures (n, 3, H, W)."""
    reader = open_file(shelf, file, threads)
    try:
        for start in range(0, len(rows), _TOGETHER):
            some = rows[start : start + _TOGETHER]
            pictures = np.empty((len(some), *shelf.shape), np.uint8)
            for place, row in enumerate(some):
                pictures[place] = reader.read(float(shelf.place[row]), int(row)).transpose(2, 0, 1)
            yield some, pictures
    finally:
        reader.close()
