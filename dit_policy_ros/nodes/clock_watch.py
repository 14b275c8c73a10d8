"""Notices a clock that jumps: the watchdog of the time that everything else counts on."""

from __future__ import annotations

from dit_policy_ros.runtime.faults import Fault, Trouble

JUMP_NS = 500_000_000  # what a clock that is set right by steps of its time service stays below
_BACK_NS = 50_000_000  # a simulated clock has no jitter: any way back is another run
_TOLD_NS = 1_000_000_000  # how long a jump is reported, on the steady clock: longer than a status takes to be seen


class ClockWatch:
    """Compares the node's clock with the steady one, look by look, so that slow drift is no jump.

    With a simulated clock (`simulated`) only a way back, or a leap ahead, is a jump: it may be slow, stand still, or
    not have begun (0), and its rate is not known.
    """

    def __init__(self, simulated: bool) -> None:
        self._simulated = simulated
        self._last: tuple[int, int] | None = None
        self._told_until_ns = 0
        self._reason = ""

    def check(self, now_ns: int, steady_ns: int) -> list[Trouble]:
        """The trouble of the last second; `now_ns` is read from the node's clock, `steady_ns` from the steady one."""
        if self._last is not None and self._last[0] != 0:
            self._judge(now_ns - self._last[0], steady_ns - self._last[1], steady_ns)
        self._last = (now_ns, steady_ns)
        return [Trouble(Fault.CLOCK, self._reason)] if steady_ns < self._told_until_ns else []

    def _judge(self, passed_ns: int, steady_passed_ns: int, steady_ns: int) -> None:
        ahead_ns = passed_ns - steady_passed_ns
        if self._simulated:
            jumped = passed_ns < -_BACK_NS or ahead_ns > JUMP_NS
            ahead_ns = passed_ns if passed_ns < 0 else ahead_ns
        else:
            jumped = abs(ahead_ns) > JUMP_NS
        if jumped:
            way = "forward" if ahead_ns > 0 else "back"
            self._reason = (
                f"the node's clock jumped {way} by {abs(ahead_ns) / 1e9:.3f} s; what was measured before means nothing "
                "any more. Was a simulation reset, a bag looped, or the system's time set?"
            )
            self._told_until_ns = steady_ns + _TOLD_NS
