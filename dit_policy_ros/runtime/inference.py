"""One thread for inference, so that no callback ever waits for the policy."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_LOGGER = logging.getLogger(__name__)
_POLL = 0.5  # s between looks at whether the main thread has ended without close()


class InferenceWorker:
    """Runs callables one after the other in its own thread; of those waiting, the newest replaces the others.

    `on_result(result, error)` is called in that thread after each one: error is None, or what the callable
    raised (its result is then None). An exception of `on_result` itself is logged and the thread goes on.

    Between requests the thread does what it was offered, work that shortens the next request but that nobody waits for.
    """

    def __init__(self, on_result: Callable[[object, BaseException | None], None], name: str = "inference") -> None:
        self._on_result = on_result
        self._changed = threading.Condition()
        self._pending: Callable[[], object] | None = None
        self._offered: Callable[[], object] | None = None
        self._offers_failed = 0
        self._offer_runs = False
        self._running = False
        self._closed = False
        # Not a daemon: one killed inside torch at exit can crash the process. It ends with the main thread.
        self._thread = threading.Thread(target=self._loop, name=name)
        self._thread.start()

    def submit(self, work: Callable[[], object]) -> None:
        """Ask for `work`; a request still waiting is dropped for it.

        What was offered and has not begun is dropped too; what has begun is finished first. Raises RuntimeError after
        close().
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the inference worker is closed")
            self._pending = work
            self._offered = None
            self._changed.notify_all()

    def offer(self, work: Callable[[], object]) -> bool:
        """Have `work` done if the thread has nothing to do; returns whether it was taken.

        It is no request: its result is not delivered, an exception of it is logged and counted in
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
                result = request()
            except BaseException as raised:  # delivered, whatever it is: the thread must outlive it
                error = raised
            try:
                self._on_result(result, error)
            except Exception:
                _LOGGER.exception("the inference result's callback failed")

    def _next(self) -> Callable[[], object] | None:
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
