"""The last check before the arm: a chunk passes whole or is refused whole, with a code and a sentence.

A joint_trajectory_controller checks neither limits nor NaN nor a jump at the start; that is the publisher's
duty. Checks, in this order: finite, joint names and count, position limits, speed and acceleration between
steps, distance and speed from the measured arm to the first step, age of the chunk, age of the measured state.
Nothing is clamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from dit_policy_ros.embodiment import Embodiment

_ROUNDING = 1e-6  # rad: a limit learnt from and reached in float32 comes back this much off


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


@dataclass(frozen=True)
class Decision:
    """A verdict with its reason, a sentence with joint, value, limit and unit; empty when accepted."""

    verdict: Verdict
    reason: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the chunk may go to the arm."""
        return self.verdict is Verdict.ACCEPTED


class Gate:
    """Refuses what is unsafe for the embodiment. The attributes may be changed at any time.

    max_start_distance: rad, of any joint, from the measured arm to the first step. max_chunk_age: s, from
    the observation to now. velocity_margin: the mean speed of each segment, the one from the measured arm
    included, may be this many times the
        limit. That first segment also makes up the tracking lag.
    acceleration_margin: the change of mean speed between segments over the mean of their durations may be
    this many
        times the limit. Second differences multiply the steps' noise by 1/step^2 (5 mrad of noise at 10 Hz
        is about 1.2 rad/s^2), which the controller's spline and the servo smooth away; hence more than 1.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        max_start_distance: float = 0.35,
        max_chunk_age: float = 1.0,
        velocity_margin: float = 1.0,
        acceleration_margin: float = 2.0,
    ) -> None:
        self.max_start_distance = max_start_distance
        self.max_chunk_age = max_chunk_age
        self.velocity_margin = velocity_margin
        self.acceleration_margin = acceleration_margin
        self._max_state_age = embodiment.state.max_age
        self._joints = embodiment.action_joints
        limits = embodiment.limits.values()
        self._lower = np.array([joint.lower for joint in limits])
        self._upper = np.array([joint.upper for joint in limits])
        self._velocity = np.array([joint.velocity for joint in limits])
        self._acceleration = np.array([joint.acceleration for joint in limits])

    def check(
        self,
        positions: np.ndarray,
        times: np.ndarray,
        joint_names: Sequence[str],
        measured: np.ndarray | None,
        observation_stamp_ns: int,
        now_ns: int,
        measured_stamp_ns: int | None = None,
    ) -> Decision:
        """Judge the points that would be sent.

        positions: (n, A) rad, n may be 0; times: (n,) s from now; measured: (A,) rad or None, in the order
        of the embodiment's action joints; measured_stamp_ns: when it was measured, checked if given. Never
        raises for bad values, however bad: the decision says what is wrong.
        """
        positions, times = np.asarray(positions, np.float64), np.asarray(times, np.float64)
        return (
            self._check_finite(positions, times)
            or self._check_joints(positions, times, tuple(joint_names))
            or self._check_positions(positions)
            or self._check_steps(positions, times)
            or self._check_start(positions, times, measured)
            or self._check_age(len(times), observation_stamp_ns, now_ns)
            or self._check_measured_age(measured_stamp_ns, now_ns)
            or Decision(Verdict.ACCEPTED)
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

    def _check_positions(self, positions: np.ndarray) -> Decision | None:
        bad = (positions < self._lower - _ROUNDING) | (positions > self._upper + _ROUNDING)
        if not bad.any():
            return None
        step, joint = _first(bad)
        reason = (
            f"{self._joints[joint]} at step {step} is {positions[step, joint]:.4f} rad, "
            f"outside [{self._lower[joint]}, {self._upper[joint]}] rad"
        )
        return Decision(Verdict.POSITION_LIMIT, reason)

    def _check_steps(self, positions: np.ndarray, times: np.ndarray) -> Decision | None:
        durations = np.diff(times, prepend=0.0)
        if (durations <= 0).any():
            step = int(np.argmax(durations <= 0))
            reason = f"step {step} is due {durations[step]:.4f} s after the one before, expected more than 0 s"
            return Decision(Verdict.VELOCITY_LIMIT, reason)
        speeds = np.diff(positions, axis=0) / durations[1:, None]
        return self._check_speeds(speeds) or self._check_accelerations(speeds, durations[1:])

    def _check_speeds(self, speeds: np.ndarray) -> Decision | None:
        bad = np.abs(speeds) > self._velocity * self.velocity_margin
        if not bad.any():
            return None
        step, joint = _first(bad)
        return self._too_fast(joint, speeds[step, joint], f"from step {step} to step {step + 1}")

    def _check_accelerations(self, speeds: np.ndarray, durations: np.ndarray) -> Decision | None:
        between = (durations[:-1] + durations[1:]) / 2
        accelerations = np.diff(speeds, axis=0) / between[:, None]
        bad = np.abs(accelerations) > self._acceleration * self.acceleration_margin
        if not bad.any():
            return None
        step, joint = _first(bad)
        limit = self._acceleration[joint]
        reason = (
            f"{self._joints[joint]} accelerates at {accelerations[step, joint]:.2f} rad/s^2 "
            f"at step {step + 1}, the limit is {limit * self.acceleration_margin:.2f} rad/s^2 "
            f"({limit} x margin {self.acceleration_margin})"
        )
        return Decision(Verdict.ACCELERATION_LIMIT, reason)

    def _check_start(self, positions: np.ndarray, times: np.ndarray, measured: np.ndarray | None) -> Decision | None:
        if measured is None:
            return Decision(Verdict.INPUT_MISSING, "the arm's measured position is not known")
        measured = np.asarray(measured, np.float64)
        if measured.shape != (len(self._joints),):
            reason = f"the measured position has shape {measured.shape}, expected ({len(self._joints)},)"
            return Decision(Verdict.INPUT_INVALID, reason)
        for joint, value in zip(self._joints, measured, strict=True):
            if not np.isfinite(value):
                return Decision(Verdict.INPUT_INVALID, f"the measured position of {joint} is {value}")
        if len(times) == 0:
            return None
        return self._check_first_segment(positions[0] - measured, float(times[0]))

    def _check_first_segment(self, way: np.ndarray, duration: float) -> Decision | None:
        farthest = int(np.abs(way).argmax())
        if abs(way[farthest]) > self.max_start_distance:
            reason = (
                f"the first step is {abs(way[farthest]):.3f} rad from the measured {self._joints[farthest]}, "
                f"allowed are {self.max_start_distance} rad"
            )
            return Decision(Verdict.START_TOO_FAR, reason)
        # No acceleration is judged here: over a fraction of a step the tracking lag is not one.
        speeds = way / duration
        excess = np.abs(speeds) - self._velocity * self.velocity_margin
        joint = int(excess.argmax())
        if excess[joint] > 0:
            return self._too_fast(joint, speeds[joint], "from the measured arm to the first step")
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

    def _too_fast(self, joint: int, speed: float, segment: str) -> Decision:
        limit = self._velocity[joint] * self.velocity_margin
        reason = f"{self._joints[joint]} moves at {speed:.3f} rad/s {segment}, the limit is {limit:.3f} rad/s"
        return Decision(Verdict.VELOCITY_LIMIT, reason)


def _first(bad: np.ndarray) -> tuple[int, int]:
    step, joint = np.argwhere(bad)[0]
    return int(step), int(joint)
