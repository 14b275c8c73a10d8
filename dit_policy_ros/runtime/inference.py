"""One thread for inference, so that no callback ever waits for the policy."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

_LOGGER = logging.getLogger(__name__)
_KEPT_DURATIONS = 1000
_POLL = 0.5  # s between looks at whether the main thread has ended without close()


@dataclass(frozen=True)
class _Request:
    work: Callable[[], object]
    timed: bool
    submitted: float  # perf_counter()


class InferenceWorker:
    """Runs callables one after the other in its own thread; of those waiting, the newest replaces the others.

    `on_result(result, error)` is called in that thread after each one: error is None, or what the callable
    raised (its result is then None). An exception of `on_result` itself is logged and the thread goes on.

    Between requests the thread does what it was offered, work that shortens the next request but that nobody waits for.
    """

    def __init__(self, on_result: Callable[[object, BaseException | None], None], name: str = "inference") -> None:
        self._on_result = on_result
        self._changed = threading.Condition()
        self._pending: _Request | None = None
        self._offered: Callable[[], object] | None = None
        self._offers_failed = 0
        self._offer_runs = False
        self._running = False
        self._closed = False
        self._replaced = 0
        self._durations: deque[float] = deque(maxlen=_KEPT_DURATIONS)
        # Not a daemon: one killed inside torch at exit can crash the process. It ends with the main thread.
        self._thread = threading.Thread(target=self._loop, name=name)
        self._thread.start()

    def submit(self, work: Callable[[], object], timed: bool = True) -> None:
        """Ask for `work`; a request still waiting is dropped for it and counted in `replaced`.

        timed=False leaves its duration out of the latency (warm-up). What was offered and has not begun is dropped;
        what has begun is finished first. Raises RuntimeError after close().
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the inference worker is closed")
            self._replaced += self._pending is not None
            self._pending = _Request(work, timed, perf_counter())
            self._offered = None
            self._changed.notify_all()

    def offer(self, work: Callable[[], object]) -> bool:
        """Have `work` done if the thread has nothing to do; returns whether it was taken.

        It is no request: its duration and its result are not kept, an exception of it is logged and counted in
        `offers_failed`. Keep it short: a request that comes meanwhile waits for its end.
        """
        with self._changed:
            if self._closed or self._running or self._offer_runs or self._pending or self._offered:
                return False
            self._offered = work
            self._changed.notify_all()
            return True

    @property
    def offers_failed(self) -> int:
        """How many offered works ended in an exception."""
        with self._changed:
            return self._offers_failed

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits; offered work does not count."""
        with self._changed:
            return self._running or self._pending is not None

    @property
    def replaced(self) -> int:
        """How many requests were dropped because a newer one came before they began."""
        with self._changed:
            return self._replaced

    def latency(self, percentile: float) -> float:
        """Percentile (0 to 100) of the latest timed durations, at most 1000, in s; NaN before the first.

        A duration is counted from submit(), so it holds what a request waited for the work before it.
        """
        with self._changed:
            durations = list(self._durations)
        return float(np.percentile(durations, percentile)) if durations else float("nan")

    def reset_latency(self) -> None:
        """Forget the durations measured so far."""
        with self._changed:
            self._durations.clear()

    def close(self, timeout: float | None = None) -> bool:
        """Drop what waits, wait for what runs, end the thread; returns whether it ended within `timeout` s.

        May be called again, and from `on_result` (then without waiting, and False).
        """
        with self._changed:
            self._closed = True
            self._pending = None
            self._offered = None
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        while (request := self._next()) is not None:
            result: object = None
            error: BaseException | None = None
            try:
                result = request.work()
            except BaseException as raised:  # delivered, whatever it is: the thread must outlive it
                error = raised
            if request.timed and error is None:
                self._record(perf_counter() - request.submitted)
            try:
                self._on_result(result, error)
            except Exception:
                _LOGGER.exception("the inference result's callback failed")

    def _next(self) -> _Request | None:
        while True:
            with self._changed:
                self._running = self._offer_runs = False
                while not self._closed and self._pending is None and self._offered is None:
                    self._changed.wait(_POLL)
                    if not threading.main_thread().is_alive():
                        return None
                request, self._pending = self._pending, None
                offered, self._offered = self._offered, None
                self._running, self._offer_runs = request is not None, offered is not None
            if offered is None:
                return request
            self._try(offered)

    def _try(self, offered: Callable[[], object]) -> None:
        try:
            offered()
        except BaseException:  # whatever it is: the thread must outlive it, as with a request
            _LOGGER.exception("work offered to the inference thread failed; the next request will do without it")
            with self._changed:
                self._offers_failed += 1

    def _record(self, duration: float) -> None:
        with self._changed:
            self._durations.append(duration)
