"""What a joint_trajectory_controller makes of a JointTrajectory message: refused, or followed in this way.

The rules are those of ros2_controllers as released for Jazzy and Kilted (joint_trajectory_controller 4.x
and 5.x, userdoc.rst and the sources' behaviour). The simulated controller follows commands with this
module, and the converter recomputes with it, from the commands in a bag, where the arm was told to be at
any instant.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dit_policy_ros.runtime.messages import stamp_ns
from dit_policy_ros.runtime.trajectory import Point, interpolate, states_within

_ZERO_VELOCITY = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Rejection:
    """Why a controller drops a message: the rule's name, and a sentence with what was found."""

    rule: str
    reason: str


@dataclass(frozen=True)
class Command:
    """A valid message: points in the message's joints, time_ns counted from the start; columns in the
    controller's order.

    stamp_ns 0 means: start at the controller's next update.
    """

    stamp_ns: int
    columns: tuple[int, ...]
    points: tuple[Point, ...]

    def follow(self, before: Point, hold: np.ndarray, now_ns: int) -> Execution:
        """Follow from now on, coming from the state `before` of all joints (J,), which was reached by now.

        Joints that the message leaves out stay at `hold` (J,), with zero velocity and acceleration.
        """
        start_ns = self.stamp_ns or now_ns
        knots = tuple(self._complete(point, start_ns, hold) for point in self.points)
        first = knots[0]
        # As the controller does: without these zeros the first segment would be of a lower degree than the
        # rest.
        if first.velocity is not None and before.velocity is None:
            before = replace(before, velocity=np.zeros_like(hold))
        if first.acceleration is not None and before.acceleration is None:
            before = replace(before, acceleration=np.zeros_like(hold))
        return Execution(before, knots)

    def _complete(self, point: Point, start_ns: int, hold: np.ndarray) -> Point:
        def spread(values: np.ndarray | None, rest: np.ndarray) -> np.ndarray | None:
            if values is None:
                return None
            whole = rest.copy()
            whole[list(self.columns)] = values
            return whole

        zeros = np.zeros_like(hold)
        position = spread(point.position, hold)
        assert position is not None
        velocity, acceleration = spread(point.velocity, zeros), spread(point.acceleration, zeros)
        return Point(start_ns + point.time_ns, position, velocity, acceleration)


@dataclass(frozen=True)
class Execution:
    """A command being followed: from the state before it, along its knots, then held at the last one."""

    before: Point
    knots: tuple[Point, ...]

    def sample(self, t_ns: int) -> Point:
        """The reference at t_ns >= before.time_ns; knots already past are skipped."""
        index = bisect_right(self.knots, t_ns, key=lambda knot: knot.time_ns)
        if index == len(self.knots):
            return _held(self.knots[-1], t_ns)
        start = self.knots[index - 1] if index else self.before
        return interpolate(start, self.knots[index], t_ns)

    def states(self, times_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`sample(t)` of many times (n,) int64 at once: position, velocity and acceleration (n, J)."""
        points = (self.before, *self.knots)
        if not _alike(points):
            samples = [self.sample(int(t_ns)) for t_ns in times_ns]
            shape = (len(samples), len(self.before.position))
            position, velocity, acceleration = (
                np.array([getattr(sample, name) for sample in samples]).reshape(shape)
                for name in ("position", "velocity", "acceleration")
            )
            return position, velocity, acceleration
        stamps = np.array([point.time_ns for point in points])
        places = np.minimum(np.searchsorted(stamps, times_ns, side="right"), len(self.knots))
        positions = np.array([point.position for point in points])
        velocities = np.array([point.velocity for point in points])
        times = np.stack([stamps[places - 1], stamps[places], np.minimum(times_ns, stamps[-1])], axis=1)
        starts, ends = (Point(0, positions[each], velocities[each]) for each in (places - 1, places))
        position, velocity, acceleration = states_within(starts, ends, times)
        over, last = np.asarray(times_ns) >= stamps[-1], _held(self.knots[-1], 0)
        velocity[over], acceleration[over] = last.velocity, last.acceleration
        return position, velocity, acceleration


def _alike(points: Sequence[Point]) -> bool:
    """Whether all segments between them are cubic, as those of our own trajectories are."""
    return all(point.velocity is not None for point in points) and all(
        point.acceleration is None for point in points[1:]
    )


def read_command(
    message: Any,
    joint_names: Sequence[str],
    now_ns: int,
    *,
    allow_partial_joints_goal: bool = False,
    allow_nonzero_velocity_at_trajectory_end: bool = False,
) -> Command | Rejection:
    """Check a JointTrajectory (rclpy, rosbags or alike) as a controller of `joint_names` does at now_ns.

    Not checked, as there: NaN and infinity, limits, a jump at the start. One thing more than there: a joint
    named twice is refused, which the real controller follows in an undefined way.
    """
    rejection = (
        _check_names(list(message.joint_names), list(joint_names), allow_partial_joints_goal)
        or _check_points_exist(message)
        or (None if allow_nonzero_velocity_at_trajectory_end else _check_end_velocity(message))
        or _check_not_over(message, now_ns)
        or _check_points(message)
    )
    if rejection is not None:
        return rejection
    columns = tuple(list(joint_names).index(name) for name in message.joint_names)
    return Command(stamp_ns(message), columns, tuple(_point(point) for point in message.points))


def _check_names(names: list[str], expected: list[str], allow_partial: bool) -> Rejection | None:
    if not allow_partial and len(names) != len(expected):
        reason = f"{len(names)} joints, expected all {len(expected)}: {', '.join(expected)}"
        return Rejection("joint_count", reason)
    if not names:
        return Rejection("no_joints", "joint_names is empty")
    unknown = [name for name in names if name not in expected]
    if unknown:
        return Rejection("unknown_joint", f"unknown {', '.join(unknown)}, expected {', '.join(expected)}")
    if len(set(names)) != len(names):
        return Rejection("repeated_joint", f"a joint stands twice in {', '.join(names)}")
    return None


def _check_points_exist(message: Any) -> Rejection | None:
    return None if len(message.points) else Rejection("no_points", "the trajectory has no points")


def _check_end_velocity(message: Any) -> Rejection | None:
    for name, velocity in zip(message.joint_names, message.points[-1].velocities, strict=False):
        if abs(velocity) > _ZERO_VELOCITY:
            reason = f"the last point's velocity of {name} is {velocity}, expected 0 or none"
            return Rejection("nonzero_end_velocity", reason)
    return None


def _check_not_over(message: Any, now_ns: int) -> Rejection | None:
    start_ns = stamp_ns(message)
    late_ns = now_ns - start_ns - _time_ns(message.points[-1])
    if start_ns != 0 and late_ns > 0:
        return Rejection("ends_in_past", f"stamp and last time_from_start lie {late_ns / 1e9:.3f} s in the past")
    return None


def _check_points(message: Any) -> Rejection | None:
    joints = len(message.joint_names)
    before_ns: int | None = None
    for index, point in enumerate(message.points):
        time_ns = _time_ns(point)
        if before_ns is not None and time_ns <= before_ns:
            reason = f"time_from_start of point {index} is {time_ns / 1e9} s after {before_ns / 1e9} s"
            return Rejection("times_not_increasing", reason)
        before_ns = time_ns
        for field, may_be_empty in (("positions", False), ("velocities", True), ("accelerations", True)):
            size = len(getattr(point, field))
            if size != joints and not (may_be_empty and size == 0):
                reason = f"point {index} has {size} {field} for {joints} joints"
                return Rejection("size_mismatch", reason)
        if len(point.effort):
            return Rejection("effort", f"point {index} carries effort, which a position controller does not take")
    return None


def _point(point: Any) -> Point:
    def array(values: Any) -> np.ndarray | None:
        return np.array(values, np.float64) if len(values) else None

    position = np.array(point.positions, np.float64)
    return Point(_time_ns(point), position, array(point.velocities), array(point.accelerations))


def _time_ns(point: Any) -> int:
    return int(point.time_from_start.sec) * 1_000_000_000 + int(point.time_from_start.nanosec)


def _held(last: Point, t_ns: int) -> Point:
    zeros = np.zeros_like(last.position)
    velocity = zeros if last.velocity is None else last.velocity
    return Point(t_ns, last.position, velocity, zeros if last.acceleration is None else last.acceleration)
