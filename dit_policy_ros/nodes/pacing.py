"""Keeping a loop on the steady clock, and which of its ticks a slower stream is due at."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_NS = 1_000_000_000
_MAX_LAG_NS = 100_000_000


class Due:
    """Which of a loop's ticks a slower stream is due at: as even as whole ticks allow, exact in the long run."""

    def __init__(self, rate: float, tick_rate: float, phase: float = 0.0) -> None:
        """`rate` and `tick_rate` in Hz; `phase`, 0 to 1, is the share of a period by which it is early."""
        self._rate, self._tick_rate, self._phase = min(rate, tick_rate), tick_rate, phase
        self._tick = 0

    def __call__(self) -> bool:
        """Whether the present tick is one of them, each call being the next tick."""
        self._tick += 1
        return self._periods(self._tick) > self._periods(self._tick - 1)

    def _periods(self, tick: int) -> int:
        return math.floor((tick - 1) * self._rate / self._tick_rate + self._phase)


class Pacer:
    """Keeps a loop on the steady clock: no drift, a bounded burst after a delay, and what is lost is counted."""

    def __init__(self, period_ns: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._period_ns = period_ns
        self._clock = clock
        self._due_ns = clock()
        self.lost_ns = 0

    @property
    def lag_ns(self) -> int:
        """How long ago the present tick was due."""
        return self._clock() - self._due_ns

    def next(self, sleep: Callable[[float], object]) -> int:
        """Wait with `sleep(seconds)` until the next tick is due. Returns the time given up, ns; 0 most times."""
        self._due_ns += self._period_ns
        lag_ns = self.lag_ns
        if lag_ns < 0:
            sleep(-lag_ns / _NS)
        if lag_ns <= _MAX_LAG_NS:
            return 0
        self._due_ns += lag_ns
        self.lost_ns += lag_ns
        return lag_ns
