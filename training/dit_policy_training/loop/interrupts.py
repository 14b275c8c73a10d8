"""SIGINT and SIGTERM end a run after the step in progress."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

TWICE = 3.0
"""Seconds within which a launcher's copy of a signal that all of its processes got is no second one."""


class Interrupts:
    """Whether a signal asked to stop. A second one of its kind ends the process at once."""

    def __init__(self, launched: bool):
        """launched: by torchrun or the like, which hands on what the terminal sent to every process already."""
        self.asked = False
        self._launched = launched
        self._first = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Signals are noticed inside."""
        previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._first = True, now
        if not self._launched:
            signal.signal(number, signal.default_int_handler)
        elif now - self._first > TWICE:
            raise KeyboardInterrupt
