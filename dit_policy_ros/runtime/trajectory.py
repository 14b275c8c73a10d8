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

_STOP_SHARE = 0.5  # of the acceleration limit that a stop uses
_STOP_MIN_DURATION = 0.1  # s: a servo needs some time even for a small step


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


def plan(
    joint_names: Sequence[str],
    positions: ArrayLike,
    times: ArrayLike,
    measured_position: ArrayLike,
    measured_velocity: ArrayLike | None = None,
) -> Trajectory:
    """Give a chunk's points the velocities that let the controller pass through them without stopping.

    positions: (n, d) rad; times: (n,) s from now, rising, above 0; measured_*: (d,), where the arm is now.

    Velocities are the weighted harmonic mean of the slopes on either side, zero where these differ in sign:
    the cubic between two points then never leaves their interval (Fritsch and Butland, SIAM J. Sci. Stat.
    Comput. 5, 1984). The last one is zero, since controllers refuse to end a trajectory in motion; the next
    chunk normally comes before. Raises ValueError for shapes or times that do not fit; values are the
    gate's business.
    """
    points = np.asarray(positions, np.float64)
    t = np.asarray(times, np.float64)
    here = np.asarray(measured_position, np.float64)
    if points.ndim != 2 or points.shape != (len(t), len(joint_names)) or len(t) == 0:
        raise ValueError(f"positions have shape {points.shape}, expected ({len(t)}, {len(joint_names)}), 1 row or more")
    if here.shape != (len(joint_names),):
        raise ValueError(f"the measured position has shape {here.shape}, expected ({len(joint_names)},)")
    durations = np.diff(t, prepend=0.0)
    if not (durations > 0).all():
        raise ValueError(f"times {t.tolist()} must rise, beginning above 0")
    slopes = np.diff(points, axis=0, prepend=here[None]) / durations[:, None]
    if measured_velocity is not None and len(slopes) > 1:
        slopes[0] = _incoming(slopes, np.asarray(measured_velocity, np.float64))
    velocities = np.zeros_like(points)
    velocities[:-1] = _monotone_velocities(slopes, durations[:, None])
    return Trajectory(tuple(joint_names), t, points, velocities)


def _incoming(slopes: np.ndarray, measured_velocity: np.ndarray) -> np.ndarray:
    """The slope into the first point.

    The line from the measured arm is distorted by the tracking lag, the more so the sooner the point is
    due, and the measured velocity alone would make a resting arm stop at the first point. Of all slopes
    between the two, the one that changes least into the next segment.
    """
    low, high = np.minimum(slopes[0], measured_velocity), np.maximum(slopes[0], measured_velocity)
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
    joint_names: Sequence[str],
    position: ArrayLike,
    velocity: ArrayLike,
    limits: Mapping[str, JointLimits],
) -> Trajectory:
    """Bring a moving arm to rest: one point, zero velocity, every joint slowed evenly and all at the same
    moment.

    position (d,) rad and velocity (d,) rad/s are the measured ones. The slowest joint to stop uses half its
    acceleration limit, so that a servo's lag finds room; a joint that would pass its position limit stops
    at the limit instead.
    """
    here, speed = np.asarray(position, np.float64), np.asarray(velocity, np.float64)
    allowed = np.array([limits[joint].acceleration for joint in joint_names]) * _STOP_SHARE
    duration = max(_STOP_MIN_DURATION, float((np.abs(speed) / allowed).max()))
    lower = np.array([limits[joint].lower for joint in joint_names])
    upper = np.array([limits[joint].upper for joint in joint_names])
    # An even deceleration covers v T / 2, and the controller's cubic to that point is then exactly it.
    end = np.clip(here + speed * duration / 2, np.minimum(lower, here), np.maximum(upper, here))
    return Trajectory(tuple(joint_names), np.array([duration]), end[None], np.zeros((1, len(joint_names))))


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


def _coefficients(start: Point, end: Point, duration: float) -> list[np.ndarray]:
    """The polynomial in u of degree 1, 3 or 5 through both ends, its constant first."""
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
