"""A joint_trajectory_controller for the simulated arm, keeping the real one's rules, with neither ROS nor
MuJoCo.

What it takes, refuses and interpolates is `runtime.commands`; this file adds what a running controller has
besides: a trajectory waiting for the next update, the state it starts from, holding, and the published
state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_policy_ros.runtime.commands import Command, Execution, Rejection, read_command
from dit_policy_ros.runtime.trajectory import Point


@dataclass(frozen=True)
class ControllerState:
    """What ~/controller_state publishes after an update; error = reference - feedback."""

    joint_names: tuple[str, ...]
    reference: Point
    feedback: Point
    error: Point


class TrajectoryController:
    """Follows JointTrajectory messages; `receive` and `update` may be called from two threads.

    A new trajectory forgets the old one at the next update, even if its stamp lies in the future. Until its
    first point the reference runs from the measured state, or from the last reference with
    interpolate_from_desired_state. Points already past are skipped. After the last point, and before any
    command, it holds. The options are the parameters of the real controller, with its defaults.
    """

    def __init__(
        self,
        joint_names: Sequence[str],
        *,
        allow_partial_joints_goal: bool = False,
        allow_nonzero_velocity_at_trajectory_end: bool = False,
        interpolate_from_desired_state: bool = False,
    ) -> None:
        self.joint_names = tuple(joint_names)
        self._allow_partial = allow_partial_joints_goal
        self._allow_nonzero_end = allow_nonzero_velocity_at_trajectory_end
        self._from_desired = interpolate_from_desired_state
        self.reset()

    def reset(self) -> None:
        """Forget trajectory and state, as deactivation does; the next update holds the arm in its place."""
        self._pending: deque[Command] = deque(maxlen=1)  # the newest wins; append and pop are atomic
        self._execution: Execution | None = None
        self._reference: Point | None = None
        self._state: ControllerState | None = None

    def receive(self, message: Any, now_ns: int) -> Rejection | None:
        """Take a JointTrajectory for the next update, or say why not; a refused one changes nothing."""
        command = read_command(
            message,
            self.joint_names,
            now_ns,
            allow_partial_joints_goal=self._allow_partial,
            allow_nonzero_velocity_at_trajectory_end=self._allow_nonzero_end,
        )
        if isinstance(command, Rejection):
            return command
        self._pending.append(command)
        return None

    def update(
        self, now_ns: int, measured_position: np.ndarray, measured_velocity: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One control cycle: the reference position, velocity and acceleration, each (J,), at now_ns.

        A clock that went back behind the start of the trajectory leaves the reference where it was; see
        `reset`.
        """
        measured = Point(now_ns, np.array(measured_position, np.float64), np.array(measured_velocity, np.float64))
        zeros = np.zeros_like(measured.position)
        last = self._reference or Point(now_ns, measured.position, zeros, zeros)
        if self._pending:
            before = last if self._from_desired else measured
            self._execution = self._pending.pop().follow(before, last.position, now_ns)
        if self._execution is None or now_ns < self._execution.before.time_ns:
            reference = Point(now_ns, last.position, last.velocity, last.acceleration)
        else:
            reference = self._execution.sample(now_ns)
        self._reference = reference
        self._state = ControllerState(self.joint_names, reference, measured, _difference(reference, measured))
        assert reference.velocity is not None
        assert reference.acceleration is not None
        return reference.position, reference.velocity, reference.acceleration

    @property
    def state(self) -> ControllerState | None:
        """Reference, feedback and error of the latest update; None before the first one."""
        return self._state


def _difference(reference: Point, measured: Point) -> Point:
    assert reference.velocity is not None
    assert measured.velocity is not None
    return Point(reference.time_ns, reference.position - measured.position, reference.velocity - measured.velocity)
