"""Whether a node that moves the arm is still alive, told by its heartbeat. All times are of a steady clock, ns."""

from __future__ import annotations

from typing import Literal

LifeSign = Literal["none yet", "alive", "lost"]

_SIMULTANEOUS_NS = 10_000_000  # a command so soon after a heartbeat may have been sent before it


class Heartbeat:
    """Hears beats and commands, and says once for each loss that the arm must be stopped.

    The arm counts as moving if the last beat said so, or if a command came after it: the node may have died between a
    command and the beat that would have told of it. After a loss commands are somebody else's, and count for nothing
    until the heartbeat is back.
    """

    def __init__(self, timeout_ns: int) -> None:
        """`timeout_ns`: how long after the last beat it is lost."""
        if timeout_ns <= 0:
            raise ValueError(f"a heartbeat's timeout is {timeout_ns} ns, expected more than 0")
        self.timeout_ns = timeout_ns
        self.sign: LifeSign = "none yet"
        self.moving = False
        self._beaten_ns = 0
        self._checked_ns: int | None = None

    def beat(self, moving: bool, now_ns: int) -> bool:
        """A heartbeat came; whether it is back after a loss."""
        back = self.sign == "lost"
        self.sign, self.moving, self._beaten_ns = "alive", moving, now_ns
        return back

    def command(self, now_ns: int) -> None:
        """A command for the arm was heard."""
        if self.sign == "alive" and now_ns - self._beaten_ns > _SIMULTANEOUS_NS:
            self.moving = True

    def age(self, now_ns: int) -> float:
        """Time since the last beat, s; infinite before the first."""
        return float("inf") if self.sign == "none yet" else (now_ns - self._beaten_ns) / 1e9

    def check(self, now_ns: int) -> bool:
        """Whether the heartbeat has just been lost while the arm moved; to be called several times per timeout."""
        slept_ns = 0 if self._checked_ns is None else now_ns - self._checked_ns
        self._checked_ns = now_ns
        if self.sign != "alive" or now_ns - self._beaten_ns <= self.timeout_ns:
            return False
        if slept_ns > self.timeout_ns // 2:
            return False  # this process itself was held up: what came meanwhile has not been heard yet
        self.sign = "lost"
        return self.moving
