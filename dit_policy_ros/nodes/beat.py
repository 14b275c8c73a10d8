"""A steady beat: a thread that calls back at a fixed rate and tells how late each call was.

A thread and not a ROS timer, because a timer waits for its turn behind whatever callback the executor runs, and takes
the time from a clock that `use_sim_time` may stop.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

_KEPT = 6000  # calls whose lateness is kept: a minute at 100 Hz


class Beat:
    """Calls `work` every `period` s of the steady clock, until `close`.

    Call n is due at start + n x period, so lateness does not add up. Of the calls whose time has passed when the one
    before returns, only the latest is made, late; the others are left out and counted in `missed`. What `work` raises
    is given to `on_error` and counted in `errors`; the beat goes on. `busy` says, before each call, to which of the two
    records of lateness it belongs: with inference running, or without.
    """

    def __init__(
        self,
        period: float,
        work: Callable[[], None],
        busy: Callable[[], bool],
        on_error: Callable[[Exception], None],
    ) -> None:
        if not period > 0:
            raise ValueError(f"a beat's period is {period} s, expected more than 0")
        self._period_ns = round(period * 1e9)
        self._work = work
        self._busy = busy
        self._on_error = on_error
        self._closed = threading.Event()
        self._lateness: dict[bool, deque[float]] = {busy: deque(maxlen=_KEPT) for busy in (False, True)}
        self._missed = 0
        self._errors = 0
        self._thread = threading.Thread(target=self._loop, name="beat", daemon=True)
        self._thread.start()

    @property
    def missed(self) -> int:
        """Calls left out because the one before took too long."""
        return self._missed

    @property
    def errors(self) -> int:
        """Calls that raised."""
        return self._errors

    @property
    def period(self) -> float:
        """Time between two calls, s."""
        return self._period_ns / 1e9

    def lateness(self, percentile: float, busy: bool) -> float:
        """Percentile (0 to 100) of the latest calls' lateness, s, with inference running or without; NaN before any."""
        kept = list(self._lateness[busy])
        return float(np.percentile(kept, percentile)) if kept else float("nan")

    def forget(self) -> None:
        """Begin the records of lateness anew."""
        for record in self._lateness.values():
            record.clear()

    def close(self, timeout: float = 5.0) -> bool:
        """End the thread after the call that runs; returns whether it ended within `timeout` s. May be called again."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        due_ns = time.monotonic_ns() + self._period_ns
        while not self._closed.wait(max(0, due_ns - time.monotonic_ns()) / 1e9):
            late_ns = time.monotonic_ns() - due_ns
            if late_ns >= 0:  # a wait may end early by the clock's resolution; then the beat comes at the next look
                self._call(late_ns / 1e9)
                due_ns = self._next_due_ns(due_ns)

    def _call(self, late: float) -> None:
        try:
            self._lateness[self._busy()].append(late)
            self._work()
        except Exception as error:
            self._errors += 1
            self._on_error(error)

    def _next_due_ns(self, due_ns: int) -> int:
        left_out = max(0, (time.monotonic_ns() - due_ns) // self._period_ns - 1)
        self._missed += left_out
        return due_ns + (left_out + 1) * self._period_ns
