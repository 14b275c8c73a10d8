"""Where the arm has been told to be, as a function of time: the trajectories sent, as the controllers follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from dit_policy_ros.runtime.commands import Execution
from dit_policy_ros.runtime.trajectory import Peaks, Point, Trajectory, parts, peaks

JITTER_NS = 5_000_000
"""How much later or earlier than usual a controller takes up a message: its cycle, and what the network varies by."""

_KEPT = 4  # courses remembered behind the present one: enough for the observations of a chunk, which are older than it


@dataclass(frozen=True)
class Course:
    """The reference of all action joints (J,): along a trajectory from the state before it, then held at its end.

    `earlier`: what was followed before, the newest last; each was left where the next one begins. `origins`: the states
    in which controllers may have begun the present trajectory.
    """

    joint_names: tuple[str, ...]
    execution: Execution
    earlier: tuple[Execution, ...] = ()
    origins: tuple[Point, ...] = ()

    @classmethod
    def follow(
        cls,
        trajectory: Trajectory,
        before: Point,
        now_ns: int,
        previous: Course | None = None,
        starts: Sequence[Point] = (),
    ) -> Self:
        """The course of a trajectory sent at now_ns to controllers that are in the state `before` (J,) at that moment.

        A velocity or acceleration that `before` lacks is 0, as controllers take it. `previous`: the course left for
        this one, to be remembered. `starts`: all states that a controller may begin in, as the gate was given them;
        by default those of `previous`.
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
        if previous is not None and not starts:
            starts = previous.starts(now_ns)
        return cls(trajectory.joint_names, Execution(start, knots), earlier, (start, *starts))

    def shifted(self, by_ns: int) -> Self:
        """The same course on a clock that has jumped by so much."""

        def later(point: Point) -> Point:
            return replace(point, time_ns=point.time_ns + by_ns)

        def moved(execution: Execution) -> Execution:
            return Execution(later(execution.before), tuple(later(knot) for knot in execution.knots))

        return replace(self, execution=moved(self.execution), earlier=tuple(moved(each) for each in self.earlier))

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
        times = np.asarray(times_ns, np.int64)
        positions = np.empty((len(times), len(self.joint_names)))
        now = times >= self.start_ns
        positions[now] = self.execution.states(times[now])[0]
        for row in np.flatnonzero(~now):
            positions[row] = self.at(int(times[row])).position
        return positions

    def starts(self, now_ns: int) -> tuple[Point, ...]:
        """The states (J,) in which a controller may take up what is sent at now_ns; the first is the reference itself.

        What is sent with stamp zero begins a little later, at the controller's next cycle. A latency that is always
        the same moves the whole course and changes nothing; what it varies by, JITTER, does. The other four states
        are the corners of the positions and the velocities that this leaves possible, joint by joint: what holds for
        a cubic from each of them holds for one from any state between them, since the cubic is linear in its start.
        """
        found = self._peaks(now_ns - JITTER_NS, now_ns + JITTER_NS)
        positions = found.lowest.min(axis=0), found.highest.max(axis=0)
        velocities = found.slowest.min(axis=0), found.fastest.max(axis=0)
        corners = [Point(now_ns, position, velocity) for position in positions for velocity in velocities]
        return (self.at(now_ns), *corners)

    def _peaks(self, from_ns: int, to_ns: int) -> Peaks:
        """The extremes between two times of each way that a controller may have taken, a row each."""
        found = [_peaks_of(self.execution, max(from_ns, self.start_ns), max(to_ns, self.start_ns))]
        if from_ns < self.execution.knots[0].time_ns:
            found.append(self._first_segments(from_ns, to_ns))
        if from_ns < self.start_ns:  # it may not have been taken up yet
            positions = np.array([origin.position for origin in self.origins])
            velocities = np.array([_velocity(origin) for origin in self.origins])
            found.append(Peaks(positions, positions, velocities, velocities))
        names = ("lowest", "highest", "slowest", "fastest")
        return Peaks(*(np.vstack([getattr(each, name) for each in found]) for name in names))

    def _first_segments(self, from_ns: int, to_ns: int) -> Peaks:
        """The same of the first segment alone, from each origin."""
        knot, origins = self.execution.knots[0], self.origins
        # Either the controller's first segment begins now, or with the state and time of its last cycle.
        begin_ns = np.repeat([self.start_ns, self.start_ns - JITTER_NS], len(origins))
        end_ns = np.full_like(begin_ns, knot.time_ns)
        spans_ns = np.maximum(from_ns, begin_ns), np.minimum(np.maximum(to_ns, begin_ns), end_ns)
        times, spans = (np.stack(pair, axis=1) - self.start_ns for pair in ((begin_ns, end_ns), spans_ns))
        positions = np.array([origin.position for origin in origins] * 2)
        velocities = np.array([_velocity(origin) for origin in origins] * 2)
        end = np.broadcast_to(knot.position, positions.shape), np.broadcast_to(_velocity(knot), positions.shape)
        return parts((positions, velocities), end, times / 1e9, spans / 1e9)


def _peaks_of(execution: Execution, from_ns: int, to_ns: int) -> Peaks:
    """The extremes of a reference between two times, a row for each segment between them."""
    first = _complete(execution.sample(from_ns))
    if to_ns <= from_ns:
        position, velocity = first.position[None], _velocity(first)[None]
        return Peaks(position, position, velocity, velocity)
    inner = [knot.time_ns for knot in execution.knots if from_ns < knot.time_ns < to_ns]
    points = [_complete(execution.sample(t_ns)) for t_ns in (*inner, to_ns)]
    # Between two knots a part of a cubic is the cubic through its own ends.
    part = Trajectory(
        (),
        (np.array([point.time_ns for point in points]) - from_ns) / 1e9,
        np.array([point.position for point in points]),
        np.array([point.velocity for point in points]),
    )
    return peaks(first, part)


def _velocity(point: Point) -> np.ndarray:
    return np.zeros_like(point.position) if point.velocity is None else point.velocity


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
