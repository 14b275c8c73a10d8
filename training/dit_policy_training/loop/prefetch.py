"""The next batches, made ready by a thread while a step runs."""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

AHEAD = 2
"""How many batches are ready at most."""

Batch = dict[str, Any]


class Prefetched(Iterator[Batch]):
    """The batches of an iterator, in its order; it is only ever asked by the thread.

    For a CUDA device the pictures are there when they are handed over, copied beside the step that runs; all else is
    in pinned memory on the host, where the policy checks it without waiting for the device.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device):
        self.waited = 0.0
        """Seconds for which no batch was ready when one was asked for, but for the first."""
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: queue.Queue[tuple[Batch, Any] | BaseException] = queue.Queue(AHEAD)
        self._closed, self._begun = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()
        # Processes that decode are forked for the first batch: of what another thread holds locked at that moment
        # (torch's random state, in a step) a fork has a copy that nobody will ever unlock.
        self._begun.wait()

    def __next__(self) -> Batch:
        """The next batch. Raises what making it raised."""
        started = time.perf_counter()
        got = self._ready.get()
        self.waited += time.perf_counter() - started
        if isinstance(got, BaseException):
            raise got
        batch, copied = got
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for value in batch.values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(stream)  # its memory belongs to the other stream
        return batch

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._ready.get_nowait()  # it may wait for room
            self._thread.join(0.01)

    def _work(self) -> None:
        try:
            for batch in self._batches:
                if self._closed.is_set():
                    return
                self._ready.put(self._on_device(batch))
                self._begun.set()
            raise RuntimeError("the batches ended")
        except BaseException as error:
            if not self._closed.is_set():
                self._ready.put(error)
        finally:
            self._begun.set()
            if hasattr(self._batches, "close"):
                self._batches.close()

    def _on_device(self, batch: Batch) -> tuple[Batch, Any]:
        if self._stream is None:
            return batch, None
        pinned = {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
        with torch.cuda.stream(self._stream):
            moved = {
                key: value.to(self._device, non_blocking=True)
                if isinstance(value, Tensor) and value.dtype == torch.uint8
                else value
                for key, value in pinned.items()
            }
        return moved, self._stream.record_event()
