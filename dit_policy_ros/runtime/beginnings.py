"""Where a controller may be when it takes up a command: what a chunk, or a stop, must be safe from.

A controller starts from its last reference or from the measured arm, by its parameter interpolate_from_desired_state,
and a moment after the command was sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dit_policy_ros.runtime.course import Course
from dit_policy_ros.runtime.faults import Fault, Trouble
from dit_policy_ros.runtime.gate import Gate
from dit_policy_ros.runtime.messages import MessageError
from dit_policy_ros.runtime.observations import ObservationBuffer, ObservationError
from dit_policy_ros.runtime.trajectory import Point

_COMMAND_LATENCY = 0.04  # s, from the measuring of the arm to a controller's taking up a command, at the most


class Beginnings:
    """The states (J,) of the gate's joints in which a command may be taken up; `course` is what the arm follows."""

    def __init__(self, gate: Gate, observations: ObservationBuffer) -> None:
        self._gate = gate
        self._observations = observations

    def measured(self, course: Course | None, now_ns: int) -> Point:
        """The measured arm; where no velocity is measured, the course's. Raises as `ObservationBuffer.measured`."""
        position, velocity = self._observations.measured(tuple(self._gate.limits), now_ns)
        if velocity is None:
            velocity = np.zeros_like(position) if course is None else course.at(now_ns).velocity
        return Point(now_ns, position, velocity)

    def of_chunk(self, course: Course | None, measured: Point, now_ns: int) -> list[Point]:
        """Where a controller may start from: its last reference, if the course tells one, or the measured arm.

        Which of the two it is depends on its configuration, so both must be safe; so must the measured arm as it will
        be when the message has arrived.
        """
        assert measured.velocity is not None
        later = replace(measured, position=measured.position + measured.velocity * _COMMAND_LATENCY)
        return [*(course.starts(now_ns) if course is not None else ()), measured, later]

    def of_stop(self, course: Course, troubles: Sequence[Trouble], now_ns: int) -> list[Point]:
        """Those of a stop amid these troubles, the one to plan it from first; empty if none is known.

        It is planned from the course's reference, from which it is smooth and which no broken sensor can move. Unless
        the arm is measured far from it: it does not follow, and must not be pulled there. While this node stood still
        the guard may have stopped the arm anywhere, so that only the measured arm counts; if it is not known, the
        controllers are left alone, to end at rest by themselves.
        """
        seen = {trouble.fault for trouble in troubles}
        stalled = Fault.STALLED in seen
        told = [] if stalled else list(course.starts(now_ns))
        if told and Fault.INPUT in seen:
            return told
        try:
            measured = self.measured(course, now_ns)
        except (ObservationError, MessageError):
            return told
        # Faster than it can be is no velocity to go on with.
        limits = np.array([joint.velocity for joint in self._gate.limits.values()])
        assert measured.velocity is not None
        measured = replace(measured, velocity=np.where(np.abs(measured.velocity) <= limits, measured.velocity, 0.0))
        far = told and float(np.abs(measured.position - told[0].position).max()) > self._gate.max_start_distance
        return [measured, *told] if far else [*told, measured]
