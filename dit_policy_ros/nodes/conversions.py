"""The runtime's results as ROS messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from builtin_interfaces.msg import Duration, Time
from dit_policy_msgs.msg import ActionChunk
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from dit_policy_ros.runtime.trajectory import Trajectory

if TYPE_CHECKING:  # the guard sends trajectories too, and must not wait for torch
    from dit_policy_ros.runtime.conductor import Outcome

_NS = 1_000_000_000


def time_message(nanoseconds: int) -> Time:
    """Integer nanoseconds as builtin_interfaces/Time."""
    seconds, rest = divmod(nanoseconds, _NS)
    return Time(sec=seconds, nanosec=rest)


def duration_message(seconds: float) -> Duration:
    """Seconds as builtin_interfaces/Duration, rounded to the nanosecond."""
    whole, rest = divmod(round(seconds * _NS), _NS)
    return Duration(sec=whole, nanosec=rest)


def trajectory_message(trajectory: Trajectory) -> JointTrajectory:
    """A JointTrajectory with stamp zero: the controller starts it at its next update."""
    message = JointTrajectory(joint_names=list(trajectory.joint_names))
    for row, time in enumerate(trajectory.times):
        point = JointTrajectoryPoint(
            positions=trajectory.positions[row].tolist(), time_from_start=duration_message(float(time))
        )
        if trajectory.velocities is not None:
            point.velocities = trajectory.velocities[row].tolist()
        if trajectory.accelerations is not None:
            point.accelerations = trajectory.accelerations[row].tolist()
        message.points.append(point)
    return message


def joint_state_message(
    joint_names: Sequence[str], positions: np.ndarray, velocities: np.ndarray | None, stamp_ns: int
) -> JointState:
    """Positions (J,) and, where known, velocities (J,) of some joints at one moment."""
    message = JointState(name=list(joint_names), position=positions.tolist())
    message.header.stamp = time_message(stamp_ns)
    if velocities is not None:
        message.velocity = velocities.tolist()
    return message


def action_chunk_message(outcome: Outcome, now_ns: int) -> ActionChunk:
    """An outcome, sent or refused, as the message that `~/action_chunk` publishes."""
    request, chunk, seam = outcome.request, outcome.chunk, outcome.seam
    message = ActionChunk(verdict=int(outcome.decision.verdict), reason=outcome.decision.reason)
    message.header.stamp = time_message(now_ns)
    message.sequence = request.sequence
    message.instruction = request.instruction
    message.n_action_steps = request.n_action_steps
    message.sent = outcome.sent
    message.clamped = outcome.clamped
    jump = (seam.position, seam.velocity, seam.acceleration) if seam is not None else (math.nan,) * 3
    message.seam_position, message.seam_velocity, message.seam_acceleration = jump
    if chunk is not None:
        steps, dims = chunk.positions.shape
        message.observation_stamp = time_message(chunk.observation_stamp_ns)
        message.joint_names = list(chunk.joint_names)
        message.steps, message.dims = steps, dims
        message.positions = chunk.positions.ravel().tolist()
        message.step_duration = duration_message(chunk.step_duration)
        message.steps_dropped = outcome.steps_dropped
        message.steps_committed = outcome.steps_committed
        message.joining = request.joining
        message.inference_duration = duration_message(chunk.inference_duration)
    return message
