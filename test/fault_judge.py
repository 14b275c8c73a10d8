"""Judges what an arm was told and did under a fault: which commands were unsafe, when it came to rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from fault_robot import Command

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.commands import Rejection, read_command
from dit_policy_ros.runtime.trajectory import Point, Trajectory, peaks

MAX_START_DISTANCE = 0.35  # rad, the node's default
RESTING = 0.02  # rad/s: slower than this the arm rests
ROUNDING = 1e-6
CYCLES_SLACK = 1.05  # the state noted beside a command may be a cycle of 10 ms off


def complaint(command: Command, embodiment: Embodiment) -> str | None:
    """Why a command must not have been sent, in a sentence; None if it is safe.

    The controller takes it, all its numbers are finite, and from the controller's reference as well as from the
    measured arm the path that the controller interpolates stays within the limits of position and speed at every
    instant. It begins near the arm.
    """
    joints = embodiment.action_joints
    read = read_command(command.message, joints, command.now_ns)
    if isinstance(read, Rejection):
        return f"the controller refuses it: {read.reason}"
    trajectory = _trajectory(command, joints)
    if not all(np.isfinite(values).all() for values in (trajectory.positions, trajectory.velocities, trajectory.times)):
        return "it holds a number that is not finite"
    far = float(np.abs(trajectory.positions[0] - command.measured.position).max())
    if far > MAX_START_DISTANCE:
        return f"it begins {far:.3f} rad from the arm"
    for name, start in (("reference", command.reference), ("measured arm", command.measured)):
        reason = _beyond(start, trajectory, embodiment)
        if reason is not None:
            return f"from the {name}: {reason}"
    return None


def _trajectory(command: Command, joints: Sequence[str]) -> Trajectory:
    message = command.message
    order = [message.joint_names.index(joint) for joint in joints]
    times = [point.time_from_start.sec + point.time_from_start.nanosec / 1e9 for point in message.points]
    positions = np.array([[point.positions[i] for i in order] for point in message.points])
    velocities = np.array([[point.velocities[i] for i in order] for point in message.points])
    return Trajectory(tuple(joints), np.array(times), positions, velocities)


def _beyond(start: Point, trajectory: Trajectory, embodiment: Embodiment) -> str | None:
    found = peaks(start, trajectory)
    for column, (joint, limits) in enumerate(embodiment.limits.items()):
        low, high = float(found.lowest[:, column].min()), float(found.highest[:, column].max())
        if low < limits.lower - ROUNDING or high > limits.upper + ROUNDING:
            return f"{joint} reaches {low:.3f} to {high:.3f} rad, its limits are {limits.lower} to {limits.upper}"
        speed = float(found.speed[:, column].max())
        if speed > limits.velocity * CYCLES_SLACK:
            return f"{joint} reaches {speed:.3f} rad/s, its limit is {limits.velocity}"
    return None


def rest_since(motion: Sequence[tuple[float, float]], until: float) -> float | None:
    """When the arm came to the rest that it is in at `until` (s); None if it moves then.

    motion: time (s) and speed of the fastest joint (rad/s), in order.
    """
    before = [entry for entry in motion if entry[0] <= until]
    if not before or before[-1][1] >= RESTING:
        return None
    since = before[-1][0]
    for at, speed in reversed(before):
        if speed >= RESTING:
            break
        since = at
    return since
