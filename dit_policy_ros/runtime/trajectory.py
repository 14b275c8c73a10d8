"""Joint trajectories: from a chunk's points to what a joint_trajectory_controller follows smoothly, and its
splines.

The controller joins points by the data they carry: positions only, linear; with velocities, cubic; with
accelerations as well, quintic. `interpolate` is that rule, in the one place where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dit_policy_ros.embodiment import JointLimits

_STOP_SHARE = 0.5  # of the acceleration limit that a stop uses: a servo's lag needs room
_STOP_MIN_DURATION = 0.1  # s: a servo needs some time even for a small step
_STOP_LONG_DURATION = 0.35  # s: a stop that would take longer uses more of the acceleration limit, up to all of it
_STOP_ROOM = 0.75  # of the way to a position limit: a controller that begins a little later is nearer to it by then
_STOP_SHORTEST = 1e-3  # s: no joint is braked faster, however near its limit is
_STOP_PATIENCE = (1.0, 1.5, 2.0, 3.0, 0.7, 0.4, 0.2, 0.1)  # times its usual duration, where starts far away need it
_END_STRETCH = 1.5  # see plan


@dataclass(frozen=True)
class Point:
    """A knot: time in ns, position (J,), and velocity and acceleration (J,) where known."""

    time_ns: int
    position: np.ndarray
    velocity: np.ndarray | None = None
    acceleration: np.ndarray | None = None


@dataclass(frozen=True)
class Trajectory:
    """Points to publish with stamp zero: times (n,) in s, above 0; arrays (n, d) in rad, rad/s, rad/s^2."""

    joint_names: tuple[str, ...]
    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray | None = None
    accelerations: np.ndarray | None = None

    def select(self, joints: Sequence[str]) -> Trajectory:
        """The columns of these joints, in their order. Raises ValueError for a joint that is not there."""
        unknown = [joint for joint in joints if joint not in self.joint_names]
        if unknown:
            raise ValueError(f"the trajectory has no {', '.join(unknown)}, only {', '.join(self.joint_names)}")
        columns = [self.joint_names.index(joint) for joint in joints]
        velocities = None if self.velocities is None else self.velocities[:, columns]
        accelerations = None if self.accelerations is None else self.accelerations[:, columns]
        return Trajectory(tuple(joints), self.times, self.positions[:, columns], velocities, accelerations)


@dataclass(frozen=True)
class Peaks:
    """Extremes over each whole segment, (n, d) each: of the position, and of the velocity with its sign.

    Segment k ends at point k; segment 0 comes from the state before the trajectory.
    """

    lowest: np.ndarray
    highest: np.ndarray
    slowest: np.ndarray
    fastest: np.ndarray

    @property
    def speed(self) -> np.ndarray:
        """The largest speed within each segment (n, d), at least 0."""
        return np.maximum(self.fastest, -self.slowest)


def plan(joint_names: Sequence[str], positions: ArrayLike, times: ArrayLike, start: Point) -> Trajectory:
    """Give a chunk's points the velocities that let the controller pass through them without stopping.

    positions: (n, d); times: (n,) s from now, rising, above 0; start: the state (d,) that the controller starts
    from, whose velocity may be unknown.

    Velocities are the weighted harmonic mean of the slopes on either side, zero where these differ in sign:
    the cubic between two points then never leaves their interval (Fritsch and Butland, SIAM J. Sci. Stat.
    Comput. 5, 1984). The last one is zero, since controllers refuse to end a trajectory in motion; the next
    chunk normally comes before. A cubic that ends at rest is up to 3/2 as fast on its way as in the mean, so the
    last point comes half an interval later than asked for: braking is then nowhere faster than what led to it.
    Raises ValueError for shapes or times that do not fit; values are the gate's business.
    """
    points, t, here = np.asarray(positions, np.float64), np.array(times, np.float64), start.position
    if points.ndim != 2 or points.shape != (len(t), len(joint_names)) or len(t) == 0:
        raise ValueError(f"positions have shape {points.shape}, expected ({len(t)}, {len(joint_names)}), 1 row or more")
    if here.shape != (len(joint_names),):
        raise ValueError(f"the start's position has shape {here.shape}, expected ({len(joint_names)},)")
    durations = np.diff(t, prepend=0.0)
    if not (durations > 0).all():
        raise ValueError(f"times {t.tolist()} must rise, beginning above 0")
    slopes = np.diff(points, axis=0, prepend=here[None]) / durations[:, None]
    end_slope = np.abs(slopes[-1])
    if start.velocity is not None and len(slopes) > 1:
        slopes[0] = _incoming(slopes, start.velocity)
    velocities = np.zeros_like(points)
    velocities[:-1] = _monotone_velocities(slopes, durations[:, None])
    # Three times its mean speed is the most that a cubic may begin with and not pass its end (Fritsch and Carlson).
    most = 3 / _END_STRETCH * end_slope
    velocities[-2:-1] = np.clip(velocities[-2:-1], -most, most)
    t[-1] += (_END_STRETCH - 1) * durations[-1]
    return Trajectory(tuple(joint_names), t, points, velocities)


def _incoming(slopes: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """The slope into the first point.

    The line from where the arm is may be distorted by a tracking lag, the more so the sooner the point is due, and
    the velocity alone would make a resting arm stop at the first point. Of all slopes between the two, the one that
    changes least into the next segment.
    """
    low, high = np.minimum(slopes[0], velocity), np.maximum(slopes[0], velocity)
    return np.clip(slopes[1], low, high)


def _monotone_velocities(slopes: np.ndarray, durations: np.ndarray) -> np.ndarray:
    """Velocities (n - 1, d) at the knots between n segments of slopes (n, d) and durations (n, 1)."""
    before, after = slopes[:-1], slopes[1:]
    weight_before = durations[:-1] + 2 * durations[1:]
    weight_after = 2 * durations[:-1] + durations[1:]
    same_way = before * after > 0
    safe_before, safe_after = np.where(same_way, before, 1.0), np.where(same_way, after, 1.0)
    mean = (weight_before + weight_after) / (weight_before / safe_before + weight_after / safe_after)
    return np.where(same_way, mean, 0.0)


def stop(
    joint_names: Sequence[str], start: Point, limits: Mapping[str, JointLimits], starts: Sequence[Point] = ()
) -> Trajectory:
    """Bring a moving arm to rest: every joint slowed evenly, all at rest at the same moment.

    start: the state (d,) that the controller starts from; limits: of these joints, perhaps of others too. The joint
    that is slowest to stop uses half its acceleration limit, or as much more as brings it to rest within 0.35 s. A
    joint whose position limit is nearer than that brakes within the room it has, before the others; one that is
    beyond its limit brakes as hard as it may and rests there: it is not thrown back.

    starts: other states that the controller may start from. If from one of them, far behind, the way would be too fast,
    the stop takes longer; if it would swing beyond a limit, it is shorter. Where nothing helps it is the least bad.
    """
    ranges, begins = [limits[joint] for joint in joint_names], [start, *starts]
    found = []
    for patience in _STOP_PATIENCE:
        trajectory = _braked(joint_names, start, ranges, patience)
        excess = _excess(approaches(begins, trajectory), begins, ranges)
        if excess <= 0:
            return trajectory
        found.append((excess, trajectory))
    return min(found, key=lambda pair: pair[0])[1]


def _excess(first: Peaks, starts: Sequence[Point], limits: Sequence[JointLimits]) -> float:
    """How far beyond the limits the ways from these starts lead, in rad or 10 rad/s (or m).

    A start that is beyond a limit, or too fast, may be that, but the way from it may be no worse.
    """
    positions, speeds = np.array([start.position for start in starts]), np.abs([_velocity(start) for start in starts])
    below = np.minimum(positions, [joint.lower for joint in limits]) - first.lowest
    above = first.highest - np.maximum(positions, [joint.upper for joint in limits])
    faster = first.speed - np.maximum(speeds, [joint.velocity for joint in limits])
    return float(max(below.max(), above.max(), faster.max() / 10))


def _braked(joint_names: Sequence[str], start: Point, limits: Sequence[JointLimits], patience: float) -> Trajectory:
    """The stop that takes `patience` times its usual duration."""
    here, velocity = np.asarray(start.position, np.float64), np.asarray(_velocity(start), np.float64)
    lower, upper = (np.array([getattr(joint, name) for joint in limits]) for name in ("lower", "upper"))
    room = np.where(velocity < 0, here - lower, upper - here)
    allowed = np.array([joint.acceleration for joint in limits])
    braking = _braking_times(np.abs(velocity), allowed, room, patience)
    times = np.unique(np.round(braking, 9))
    # An even deceleration is a parabola, which the controller's cubic between two points of it follows exactly.
    t = np.minimum(times[:, None], braking)
    ways = here + velocity * (t - t**2 / (2 * braking))
    velocities = velocity * np.maximum(0.0, 1 - times[:, None] / braking)
    velocities[-1] = 0.0
    return Trajectory(tuple(joint_names), times, ways, velocities)


def _braking_times(speed: np.ndarray, allowed: np.ndarray, room: np.ndarray, patience: float) -> np.ndarray:
    """How long each joint brakes (d,), s: all equally long, but those with too little room to their limit."""
    gentle, hard = float((speed / (allowed * _STOP_SHARE)).max()), float((speed / allowed).max())
    common = patience * max(_STOP_MIN_DURATION, min(gentle, max(_STOP_LONG_DURATION, hard)))
    moving = np.where(speed > 0, speed, 1.0)
    usable = _STOP_ROOM * room
    alone = np.where(room > 0, 2 * usable / moving, speed / allowed)
    too_long = (speed > 0) & (speed * common / 2 > usable)
    return np.where(too_long, np.clip(alone, _STOP_SHORTEST, common), common)


def peaks(start: Point, trajectory: Trajectory) -> Peaks:
    """How far and how fast a controller that starts from `start` (d,) goes within each segment, in closed form.

    `start` is where it is at the trajectory's time 0, whatever its time_ns; a velocity not known is taken as 0, as
    controllers do. Raises ValueError for a trajectory with accelerations, whose quintics have no closed form.
    """
    _refuse_quintic(trajectory)
    ends, velocities = trajectory.positions, trajectory.velocities
    begins = np.vstack([start.position, ends[:-1]])
    duration = np.diff(trajectory.times, prepend=0.0)[:, None]
    before = None if velocities is None else np.vstack([_velocity(start), velocities[:-1]])
    return _segment_peaks(begins, before, ends, velocities, duration)


def approaches(starts: Sequence[Point], trajectory: Trajectory, longer: Sequence[float] = (0.0,)) -> Peaks:
    """The same of the first segment alone, from each of the starts: a row for each, and all again for each `longer`.

    longer: s that the segment takes more than the trajectory says, as when a controller begins it at the state of its
    last cycle.
    """
    _refuse_quintic(trajectory)
    begins = np.tile([start.position for start in starts], (len(longer), 1))
    before = np.tile([_velocity(start) for start in starts], (len(longer), 1))
    duration = trajectory.times[0] + np.repeat(longer, len(starts))[:, None]
    ends = np.broadcast_to(trajectory.positions[0], begins.shape)
    if trajectory.velocities is None:
        return _segment_peaks(begins, None, ends, None, duration)
    return _segment_peaks(begins, before, ends, np.broadcast_to(trajectory.velocities[0], begins.shape), duration)


def parts(
    begins: tuple[np.ndarray, np.ndarray], ends: tuple[np.ndarray, np.ndarray], times: np.ndarray, spans: np.ndarray
) -> Peaks:
    """The extremes of parts of cubic segments (n, d): begins and ends are their (positions, velocities).

    times (n, 2): when each segment begins and ends, s; spans (n, 2): from when to when it is looked at, within these.
    """
    (p0, v0), (p1, v1) = begins, ends
    duration = np.diff(times)
    cubic = _coefficients(Point(0, p0, v0), Point(0, p1, v1), duration)
    first, last = ((spans[:, k : k + 1] - times[:, :1]) / duration for k in (0, 1))

    def speed(u: np.ndarray) -> np.ndarray:
        return (cubic[1] + u * (2 * cubic[2] + u * 3 * cubic[3])) / duration

    # Between two of its moments a part of a cubic is the cubic through its own ends. One of no length is a moment.
    span = np.maximum(np.diff(spans), 1e-9)
    return _segment_peaks(_value(cubic, first), speed(first), _value(cubic, last), speed(last), span)


def _refuse_quintic(trajectory: Trajectory) -> None:
    if trajectory.accelerations is not None:
        raise ValueError("peaks are known of linear and cubic segments only; the trajectory carries accelerations")


def _velocity(point: Point) -> np.ndarray:
    return np.zeros_like(point.position) if point.velocity is None else point.velocity


def _segment_peaks(
    begins: np.ndarray, before: np.ndarray | None, ends: np.ndarray, after: np.ndarray | None, duration: np.ndarray
) -> Peaks:
    """The extremes of segments from begins (n, d), moving at `before`, to ends, at `after`; duration (n, 1)."""
    if before is None or after is None:
        slopes = (ends - begins) / duration
        return Peaks(np.minimum(begins, ends), np.maximum(begins, ends), slopes, slopes)
    cubic = _coefficients(Point(0, begins, before), Point(0, ends, after), duration)
    turns = np.stack([begins, ends, *(_value(cubic, u) for u in _roots(cubic))])
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = _inside(-cubic[2] / (3 * cubic[3]))
    middle = (cubic[1] + vertex * (2 * cubic[2] + vertex * 3 * cubic[3])) / duration
    speeds = np.stack([before, after, middle])
    return Peaks(turns.min(axis=0), turns.max(axis=0), speeds.min(axis=0), speeds.max(axis=0))


def _roots(cubic: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where in [0, 1] a cubic's derivative is zero; 0 stands in where it is nowhere.

    The quadratic formula in the form that loses no digits when the cubic's highest coefficient is nearly zero.
    """
    c, half_b, a = cubic[1], cubic[2], 3 * cubic[3]
    with np.errstate(divide="ignore", invalid="ignore"):
        q = -(half_b + np.copysign(np.sqrt(half_b**2 - a * c), half_b))
        return _inside(q / a), _inside(c / q)


def _inside(u: np.ndarray) -> np.ndarray:
    return np.where((u > 0) & (u < 1), u, 0.0)  # false for NaN, so that it becomes 0


def _value(polynomial: Sequence[np.ndarray], u: np.ndarray) -> np.ndarray:
    value = polynomial[-1]
    for coefficient in reversed(polynomial[:-1]):
        value = value * u + coefficient
    return value


def interpolate(start: Point, end: Point, t_ns: int) -> Point:
    """The state at t_ns on the segment from start to end, as a joint_trajectory_controller interpolates it.

    Quintic if both ends carry velocity and acceleration, cubic if both carry velocity, else linear. t_ns
    outside the segment is refused with ValueError. Velocity and acceleration are always given.
    """
    duration = (end.time_ns - start.time_ns) / 1e9
    if not start.time_ns <= t_ns <= end.time_ns or duration == 0:
        raise ValueError(f"t = {t_ns} ns is outside the segment from {start.time_ns} to {end.time_ns} ns")
    # In u = t/T the derivatives scale by T, and the polynomial's coefficients follow from its two ends.
    u = (t_ns - start.time_ns) / 1e9 / duration
    position = velocity = acceleration = np.zeros_like(start.position)
    for coefficient in reversed(_coefficients(start, end, duration)):  # Horner's rule and its derivatives
        acceleration = acceleration * u + 2 * velocity
        velocity = velocity * u + position
        position = position * u + coefficient
    return Point(t_ns, position, velocity / duration, acceleration / duration**2)


def states_within(start: Point, end: Point, times_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position, velocity and acceleration (n, d), each within a segment of its own, as `interpolate`.

    start, end: the segments' ends (n, d), or (d,) of one; times_ns (n, 3) int64: when each segment begins and ends, and
    when it is looked at.
    """
    duration = (times_ns[:, 1:2] - times_ns[:, :1]) / 1e9
    u = (times_ns[:, 2:] - times_ns[:, :1]) / 1e9 / duration
    zeros: np.ndarray = np.zeros((len(u), end.position.shape[-1]))
    position, velocity, acceleration = zeros, zeros, zeros
    for coefficient in reversed(_coefficients(start, end, duration)):
        acceleration = acceleration * u + 2 * velocity
        velocity = velocity * u + position
        position = position * u + coefficient
    return position, velocity / duration, acceleration / duration**2


def _coefficients(start: Point, end: Point, duration: float | np.ndarray) -> list[np.ndarray]:
    """The polynomial in u of degree 1, 3 or 5 through both ends, its constant first.

    The ends may be those of many segments (n, d), the duration then (n, 1).
    """
    way = end.position - start.position
    if start.velocity is None or end.velocity is None:
        return [start.position, way]
    v0, v1 = start.velocity * duration, end.velocity * duration
    if start.acceleration is None or end.acceleration is None:
        return [start.position, v0, 3 * way - 2 * v0 - v1, v0 + v1 - 2 * way]
    a0, a1 = start.acceleration * duration**2, end.acceleration * duration**2
    return [
        start.position,
        v0,
        a0 / 2,
        10 * way - 6 * v0 - 4 * v1 - 1.5 * a0 + 0.5 * a1,
        -15 * way + 8 * v0 + 7 * v1 + 1.5 * a0 - a1,
        6 * way - 3 * (v0 + v1) + 0.5 * (a1 - a0),
    ]
