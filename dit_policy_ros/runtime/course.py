"""Where the arm has been told to be, as a function of time: the trajectories sent, as the controllers follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from dit_policy_ros.runtime.commands import Execution
from dit_policy_ros.runtime.trajectory import Point, Trajectory, peaks

_KEPT = 4  # courses remembered behind the present one: enough for the observations of a chunk, which are older than it


@dataclass(frozen=True)
class Course:
    """The reference of all action joints (J,): along a trajectory from the state before it, then held at its end.

    `earlier`: what was followed before, the newest last; each was left where the next one begins.
    """

    joint_names: tuple[str, ...]
    execution: Execution
    earlier: tuple[Execution, ...] = ()

    @classmethod
    def follow(cls, trajectory: Trajectory, before: Point, now_ns: int, previous: Course | None = None) -> Self:
        """The course of a trajectory sent at now_ns to controllers that are in the state `before` (J,) at that moment.

        A velocity or acceleration that `before` lacks is 0, as controllers take it. `previous`: the course left for
        this one, to be remembered.
        """
        zeros = np.zeros_like(before.position)
        start = Point(
            now_ns,
            before.position,
            zeros if before.velocity is None else before.velocity,
            zeros if before.acceleration is None else before.acceleration,
        )
        knots = tuple(_knot(trajectory, row, now_ns) for row in range(len(trajectory.times)))
        earlier = () if previous is None else (*previous.earlier, previous.execution)[-_KEPT:]
        # A clock that went back would make the past begin in the future.
        earlier = tuple(execution for execution in earlier if execution.before.time_ns < now_ns)
        return cls(trajectory.joint_names, Execution(start, knots), earlier)

    @property
    def start_ns(self) -> int:
        """When the present trajectory began."""
        return self.execution.before.time_ns

    @property
    def end_ns(self) -> int:
        """From here on the arm is held."""
        return self.execution.knots[-1].time_ns

    @property
    def told_until_ns(self) -> int:
        """Until here the course is a prediction; its last segment only brakes, since a trajectory must end at rest."""
        knots = self.execution.knots
        return knots[-2].time_ns if len(knots) > 1 else self.start_ns

    def at(self, t_ns: int) -> Point:
        """The state at t_ns, position, velocity and acceleration (J,) all given.

        Before the start it is what was followed then, or, where that is not known, the state the course started from.
        """
        if t_ns >= self.start_ns:
            return _complete(self.execution.sample(t_ns))
        for execution in reversed(self.earlier):
            if execution.before.time_ns <= t_ns:
                return _complete(execution.sample(t_ns))
        return replace((*self.earlier, self.execution)[0].before, time_ns=t_ns)

    def knows(self, t_ns: int) -> bool:
        """Whether `at` says what was followed at t_ns; false before the first start remembered."""
        return t_ns >= (*self.earlier, self.execution)[0].before.time_ns

    def positions(self, times_ns: Sequence[int] | np.ndarray) -> np.ndarray:
        """The positions (n, J) at each of the times (n,)."""
        shape = (len(times_ns), len(self.joint_names))
        return np.array([self.at(int(t_ns)).position for t_ns in times_ns], np.float64).reshape(shape)

    def corners(self, from_ns: int, to_ns: int) -> tuple[Point, ...]:
        """Four states between whose positions and velocities the reference stays from from_ns to to_ns.

        A message sent at from_ns is taken up some time later, from a state that cannot be known. Whatever holds for
        a cubic from each of these four, joint by joint, holds for one from any state on the way. Raises ValueError
        unless to_ns lies after from_ns.
        """
        if to_ns <= from_ns:
            raise ValueError(f"the time to {to_ns} ns ends before it begins at {from_ns} ns")
        first = self.at(from_ns)
        inner = [knot.time_ns for knot in self.execution.knots if from_ns < knot.time_ns < to_ns]
        points = [self.at(t_ns) for t_ns in (*inner, to_ns)]
        positions, velocities = (np.array([getattr(p, name) for p in points]) for name in ("position", "velocity"))
        times = (np.array([*inner, to_ns], np.float64) - from_ns) / 1e9
        extremes = peaks(first, Trajectory(self.joint_names, times, positions, velocities))
        ways = extremes.lowest.min(axis=0), extremes.highest.max(axis=0)
        speeds = extremes.slowest.min(axis=0), extremes.fastest.max(axis=0)
        return tuple(Point(from_ns, way, speed) for way in ways for speed in speeds)


def _knot(trajectory: Trajectory, row: int, now_ns: int) -> Point:
    time_ns = now_ns + round(float(trajectory.times[row]) * 1e9)
    velocities, accelerations = trajectory.velocities, trajectory.accelerations
    return Point(
        time_ns,
        trajectory.positions[row],
        None if velocities is None else velocities[row],
        None if accelerations is None else accelerations[row],
    )


def _complete(point: Point) -> Point:
    zeros = np.zeros_like(point.position)
    velocity = zeros if point.velocity is None else point.velocity
    return Point(point.time_ns, point.position, velocity, zeros if point.acceleration is None else point.acceleration)
