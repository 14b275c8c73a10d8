"""The last check before the arm: a chunk passes whole or is refused whole, with a code and a sentence.

A joint_trajectory_controller checks neither limits nor NaN nor a jump at the start; that is the publisher's
duty. Checks, in this order: finite, joint names and count, position limits, speed and acceleration between
steps, distance of the first step from the measured arm, the way to it and between all steps as the controller will
interpolate it, age of the chunk, age of the measured state. The trajectory to be sent is made here, and comes only with
an accepted decision. Nothing is clamped, unless `Gate.clamp` is called for it.

Units are the joint's own, rad, rad/s and rad/s^2, m for a prismatic joint; a sentence leaves them out, since the
embodiment does not say which joints are prismatic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from dit_policy_ros.embodiment import Embodiment, JointLimits
from dit_policy_ros.runtime.course import JITTER_NS
from dit_policy_ros.runtime.trajectory import Peaks, Point, Trajectory, approaches, peaks, plan

_ROUNDING = 1e-6  # rad (and rad/s): a limit learnt from and reached in float32 comes back this much off


class Verdict(IntEnum):
    """What became of a chunk. The values are those of dit_policy_msgs/ActionChunk's constants."""

    ACCEPTED = 0
    INPUT_MISSING = 1
    INPUT_STALE = 2
    NOT_FINITE = 3
    JOINT_NAMES = 4
    POSITION_LIMIT = 5
    VELOCITY_LIMIT = 6
    ACCELERATION_LIMIT = 7
    START_TOO_FAR = 8
    TOO_OLD = 9
    INPUT_INVALID = 10
    INFERENCE_FAILED = 11
    INPUT_SKEWED = 12
    SUPERSEDED = 13


@dataclass(frozen=True)
class Decision:
    """A verdict with its reason, a sentence with joint, value and limit; empty when accepted."""

    verdict: Verdict
    reason: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the chunk may go to the arm."""
        return self.verdict is Verdict.ACCEPTED


@dataclass(frozen=True)
class Admission:
    """What the gate decided, and the trajectory of all action joints that may be sent: only if accepted."""

    decision: Decision
    trajectory: Trajectory | None = None


@dataclass(frozen=True)
class _Bounds:
    """The limits of all action joints (A,), margins included, as they are during one check."""

    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray


class Gate:
    """Refuses what is unsafe for the embodiment. The attributes may be changed at any time.

    limits: of each action joint, those of the embodiment to begin with.
    max_start_distance: of any joint, from the measured arm to the first step.
    max_chunk_age: s, from the observation to now.
    position_margin: how far inside the position limits a chunk must stay.
    velocity_margin: speeds, in the mean between steps and at every instant, may be this many times the limit.
    acceleration_margin: the change of mean speed between segments over the mean of their durations may be this many
        times the limit. Second differences multiply the steps' noise by 1/step^2 (5 mrad of noise at 10 Hz is about
        1.2 rad/s^2), which the controller's spline and the servo smooth away; hence more than 1.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        max_start_distance: float = 0.35,
        max_chunk_age: float = 1.0,
        velocity_margin: float = 1.0,
        acceleration_margin: float = 2.0,
        position_margin: float = 0.0,
    ) -> None:
        self.max_start_distance = max_start_distance
        self.max_chunk_age = max_chunk_age
        self.velocity_margin = velocity_margin
        self.acceleration_margin = acceleration_margin
        self.position_margin = position_margin
        self._max_state_age = embodiment.state.max_age
        self._joints = embodiment.action_joints
        self._limits = dict(embodiment.limits)

    @property
    def limits(self) -> dict[str, JointLimits]:
        """The limits of every action joint; setting them raises ValueError unless each joint has its own."""
        return dict(self._limits)

    @limits.setter
    def limits(self, limits: Mapping[str, JointLimits]) -> None:
        missing = [joint for joint in self._joints if joint not in limits]
        if missing:
            raise ValueError(f"no limits are given for {', '.join(missing)}")
        self._limits = {joint: limits[joint] for joint in self._joints}

    def clamp(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """The rows (n, A) brought into the position limits, margin included, and how many values that changed.

        What is no number stays, for `admit` to refuse.
        """
        rows, bounds = np.asarray(rows, np.float64), self._bounds()
        outside = _outside(rows, bounds)
        return np.where(outside, np.clip(rows, bounds.lower, bounds.upper), rows), int(outside.sum())

    def admit(
        self,
        rows: np.ndarray,
        times: np.ndarray,
        joint_names: Sequence[str],
        starts: Sequence[Point],
        measured: np.ndarray | None,
        observation_stamp_ns: int,
        now_ns: int,
        measured_stamp_ns: int | None = None,
    ) -> Admission:
        """Judge the points that would be sent, and plan their trajectory.

        rows: (n, A), n may be 0; times: (n,) s from now; measured: (A,) or None, in the order of the embodiment's
        action joints; measured_stamp_ns: when it was measured, checked if given.

        starts: the states (A,) that a controller may be in when it takes the trajectory up, whatever their time_ns.
        The trajectory is planned from the first, and must keep the limits from each of them. A start beyond a limit
        is let be, but nothing may go farther out or get faster. Never raises for bad values, however bad: the
        decision says what is wrong. Raises ValueError if there is no start.
        """
        if not starts:
            raise ValueError("the gate needs a state that the trajectory starts from, got none")
        rows, times, bounds = np.asarray(rows, np.float64), np.asarray(times, np.float64), self._bounds()
        refusal = (
            self._check_finite(rows, times)
            or self._check_joints(rows, times, tuple(joint_names))
            or self._check_positions(rows, bounds)
            or self._check_steps(rows, times, bounds)
            or self._check_measured(measured)
            or self._check_starts(starts)
            or self._check_distance(rows, measured)
        )
        if refusal is not None:
            return Admission(refusal)
        # Without a step left there is nothing to plan; the age says why.
        trajectory = plan(self._joints, rows, times, starts[0]) if len(times) else None
        refusal = (
            self._check_spline(trajectory, list(starts), bounds)
            or self._check_age(len(times), observation_stamp_ns, now_ns)
            or self._check_measured_age(measured_stamp_ns, now_ns)
        )
        return Admission(Decision(Verdict.ACCEPTED), trajectory) if refusal is None else Admission(refusal)

    def _bounds(self) -> _Bounds:
        limits = list(self._limits.values())
        margin = self.position_margin
        return _Bounds(
            np.array([joint.lower for joint in limits]) + margin,
            np.array([joint.upper for joint in limits]) - margin,
            np.array([joint.velocity for joint in limits]) * self.velocity_margin,
            np.array([joint.acceleration for joint in limits]) * self.acceleration_margin,
        )

    def _check_finite(self, positions: np.ndarray, times: np.ndarray) -> Decision | None:
        if not np.isfinite(times).all():
            return Decision(Verdict.NOT_FINITE, "a step's time is not finite")
        if np.isfinite(positions).all():
            return None
        place = tuple(int(index) for index in np.argwhere(~np.isfinite(positions))[0])
        if positions.ndim == 2 and place[1] < len(self._joints):
            where = f"{self._joints[place[1]]} at step {place[0]}"
        else:
            where = f"an element {place}"
        return Decision(Verdict.NOT_FINITE, f"the position of {where} is {positions[place]}")

    def _check_joints(self, positions: np.ndarray, times: np.ndarray, joint_names: tuple[str, ...]) -> Decision | None:
        if joint_names != self._joints:
            reason = (
                f"the chunk is for {', '.join(joint_names) or 'no joint'}, "
                f"expected {', '.join(self._joints)} in this order"
            )
            return Decision(Verdict.JOINT_NAMES, reason)
        if times.ndim != 1 or positions.shape != (len(times), len(self._joints)):
            reason = (
                f"positions have shape {positions.shape} and times {times.shape}, "
                f"expected (steps, {len(self._joints)}) and (steps,)"
            )
            return Decision(Verdict.JOINT_NAMES, reason)
        return None

    def _check_positions(self, positions: np.ndarray, bounds: _Bounds) -> Decision | None:
        bad = _outside(positions, bounds)
        if not bad.any():
            return None
        step, joint = _first(bad)
        return self._too_far_out(joint, positions[step, joint], f"at step {step}", bounds)

    def _check_steps(self, positions: np.ndarray, times: np.ndarray, bounds: _Bounds) -> Decision | None:
        durations = np.diff(times, prepend=0.0)
        if (durations <= 0).any():
            step = int(np.argmax(durations <= 0))
            reason = f"step {step} is due {durations[step]:.4f} s after the one before, expected more than 0 s"
            return Decision(Verdict.VELOCITY_LIMIT, reason)
        speeds = np.diff(positions, axis=0) / durations[1:, None]
        return self._check_speeds(speeds, bounds) or self._check_accelerations(speeds, durations[1:], bounds)

    def _check_speeds(self, speeds: np.ndarray, bounds: _Bounds) -> Decision | None:
        bad = np.abs(speeds) > bounds.velocity
        if not bad.any():
            return None
        step, joint = _first(bad)
        return self._too_fast(joint, speeds[step, joint], f"from step {step} to step {step + 1}", bounds)

    def _check_accelerations(self, speeds: np.ndarray, durations: np.ndarray, bounds: _Bounds) -> Decision | None:
        between = (durations[:-1] + durations[1:]) / 2
        accelerations = np.diff(speeds, axis=0) / between[:, None]
        bad = np.abs(accelerations) > bounds.acceleration
        if not bad.any():
            return None
        step, joint = _first(bad)
        reason = (
            f"{self._joints[joint]} accelerates at {accelerations[step, joint]:.2f} at step {step + 1}, "
            f"the limit is {bounds.acceleration[joint]:.2f} "
            f"({self._limits[self._joints[joint]].acceleration} x margin {self.acceleration_margin})"
        )
        return Decision(Verdict.ACCELERATION_LIMIT, reason)

    def _check_measured(self, measured: np.ndarray | None) -> Decision | None:
        if measured is None:
            return Decision(Verdict.INPUT_MISSING, "the arm's measured position is not known")
        return self._check_state(np.asarray(measured, np.float64), "the measured position")

    def _check_starts(self, starts: Sequence[Point]) -> Decision | None:
        for start in starts:
            found = self._check_state(start.position, "the position to start from")
            if found is None and start.velocity is not None:
                found = self._check_state(start.velocity, "the velocity to start from")
            if found is not None:
                return found
        return None

    def _check_state(self, values: np.ndarray, what: str) -> Decision | None:
        if values.shape != (len(self._joints),):
            reason = f"{what} has shape {values.shape}, expected ({len(self._joints)},)"
            return Decision(Verdict.INPUT_INVALID, reason)
        for joint, value in zip(self._joints, values, strict=True):
            if not np.isfinite(value):
                return Decision(Verdict.INPUT_INVALID, f"{what} of {joint} is {value}")
        return None

    def _check_distance(self, rows: np.ndarray, measured: np.ndarray | None) -> Decision | None:
        if len(rows) == 0:
            return None
        distance = np.abs(rows[0] - np.asarray(measured, np.float64))
        farthest = int(distance.argmax())
        if distance[farthest] <= self.max_start_distance:
            return None
        reason = (
            f"the first step is {distance[farthest]:.3f} from the measured {self._joints[farthest]}, "
            f"allowed are {self.max_start_distance}"
        )
        return Decision(Verdict.START_TOO_FAR, reason)

    def _check_spline(self, trajectory: Trajectory | None, starts: list[Point], bounds: _Bounds) -> Decision | None:
        """The limits at every instant of the way that a controller makes of the points, from each of the starts.

        No acceleration is judged here: over a fraction of a step the tracking lag is not one.
        """
        if trajectory is None:
            return None
        # A controller may begin at the time of its last cycle, which lengthens the first segment.
        first = approaches(starts, trajectory, (0.0, JITTER_NS / 1e9))
        refusal = self._check_peaks(first, _opened(bounds, starts * 2), lambda row: 0)
        if refusal is not None:
            return refusal
        found = peaks(starts[0], trajectory)
        later = Peaks(found.lowest[1:], found.highest[1:], found.slowest[1:], found.fastest[1:])
        return self._check_peaks(later, bounds, lambda row: row + 1)

    def _check_peaks(self, found: Peaks, bounds: _Bounds, step: Callable[[int], int]) -> Decision | None:
        """`step` tells the number of the step that a row's segment leads to."""
        for values, bad in (
            (found.lowest, found.lowest < bounds.lower - _ROUNDING),
            (found.highest, found.highest > bounds.upper + _ROUNDING),
        ):
            if bad.any():
                row, joint = _first(bad)
                return self._too_far_out(joint, values[row, joint], _on_the_way(step(row)), bounds)
        bad = found.speed > bounds.velocity + _ROUNDING
        if bad.any():
            row, joint = _first(bad)
            return self._too_fast(joint, found.speed[row, joint], _on_the_way(step(row)), bounds)
        return None

    def _check_age(self, steps: int, observation_stamp_ns: int, now_ns: int) -> Decision | None:
        age = (now_ns - observation_stamp_ns) / 1e9
        if age > self.max_chunk_age:
            reason = f"the chunk's observation is {age:.3f} s old, allowed are {self.max_chunk_age} s"
        elif age < -self.max_chunk_age:
            reason = f"the chunk's observation is {-age:.3f} s in the future: the clock went backwards"
        elif steps == 0:
            reason = f"no step of the chunk is left, {age:.3f} s after its observation"
        else:
            return None
        return Decision(Verdict.TOO_OLD, reason)

    def _check_measured_age(self, measured_stamp_ns: int | None, now_ns: int) -> Decision | None:
        if measured_stamp_ns is None:
            return None
        age = (now_ns - measured_stamp_ns) / 1e9
        if age <= self._max_state_age:
            return None
        reason = f"the measured position is {age:.3f} s old, allowed are {self._max_state_age} s"
        return Decision(Verdict.INPUT_STALE, reason)

    def _too_fast(self, joint: int, speed: float, where: str, bounds: _Bounds) -> Decision:
        limit = float(bounds.velocity[..., joint].min())
        reason = f"{self._joints[joint]} moves at {speed:.3f} {where}, the limit is {limit:.3f}"
        return Decision(Verdict.VELOCITY_LIMIT, reason)

    def _too_far_out(self, joint: int, value: float, where: str, bounds: _Bounds) -> Decision:
        lower, upper = float(bounds.lower[..., joint].max()), float(bounds.upper[..., joint].min())
        reason = f"{self._joints[joint]} {where} is {value:.4f}, outside [{lower}, {upper}]"
        return Decision(Verdict.POSITION_LIMIT, reason)


def _outside(positions: np.ndarray, bounds: _Bounds) -> np.ndarray:
    return (positions < bounds.lower - _ROUNDING) | (positions > bounds.upper + _ROUNDING)


def _opened(bounds: _Bounds, starts: Sequence[Point]) -> _Bounds:
    """The limits of the way from each start, a row each: from beyond a limit back is allowed, farther out is not."""
    positions = np.array([start.position for start in starts])
    speeds = np.abs([np.zeros_like(start.position) if start.velocity is None else start.velocity for start in starts])
    return replace(
        bounds,
        lower=np.minimum(bounds.lower, positions),
        upper=np.maximum(bounds.upper, positions),
        velocity=np.maximum(bounds.velocity, speeds),
    )


def _on_the_way(step: int) -> str:
    return f"on the way from step {step - 1} to step {step}" if step else "on the way to the first step"


def _first(bad: np.ndarray) -> tuple[int, int]:
    step, joint = np.argwhere(bad)[0]
    return int(step), int(joint)
