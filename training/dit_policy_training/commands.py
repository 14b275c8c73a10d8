"""What the arm was commanded: recorded JointTrajectory messages, followed as the arm's controller followed them."""

from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.commands import Execution, Rejection, read_command
from dit_policy_ros.runtime.messages import decode_joints, decode_velocities
from dit_policy_ros.runtime.trajectory import Point


@dataclass
class ControllerOptions:
    """The parameters, with the defaults, of the joint_trajectory_controller that the recorded commands went to."""

    interpolate_from_desired_state: bool = False  # a new command starts from the last reference, not the measured arm
    allow_partial_joints_goal: bool = False  # joints left out of a command stay where they are
    allow_nonzero_velocity_at_trajectory_end: bool = False  # else such a command is refused


class CommandError(ValueError):
    """A recorded command that the controller refused, or that makes no sense; says when and why."""


class CommandedPositions:
    """The commanded position of every action joint over time, from messages added in receive order."""

    def __init__(self, embodiment: Embodiment, options: ControllerOptions):
        """Raises CommandError for an embodiment with another interface than `trajectory`: it cannot be followed."""
        for group in embodiment.action_groups:
            if group.interface != "trajectory":
                raise CommandError(
                    f"{group.topic}: action group '{group.name}' is commanded by '{group.interface}', of which a "
                    "recording does not tell what the arm was told at each instant; record with a controller commanded "
                    "by 'trajectory'. The deployment's embodiment may then say another interface"
                )
        rules = asdict(options)
        self._from_desired = rules.pop("interpolate_from_desired_state")
        self._rules = rules
        self._state_topic = embodiment.state.topic
        self._joints = {group.topic: tuple(group.joints) for group in embodiment.action_groups}
        # By topic, rising in time, each until the next one begins.
        self._executions: dict[str, list[Execution]] = {topic: [] for topic in self._joints}

    def add(self, topic: str, receive_ns: int, message: Any, joint_state: Any) -> None:
        """Take a JointTrajectory, and the JointState of that moment, from which the arm set out to follow it.

        Raises CommandError for a command that the controller does not take.
        """
        joints = self._joints[topic]
        command = read_command(message, joints, receive_ns, **self._rules)
        if isinstance(command, Rejection):
            raise CommandError(f"{topic}: a controller refuses the command at {_seconds(receive_ns)}: {command.reason}")
        position = decode_joints(joint_state, joints, self._state_topic).astype(np.float64)
        measured = Point(receive_ns, position, decode_velocities(joint_state, joints, self._state_topic))
        executions = self._executions[topic]
        desired = executions[-1].sample(receive_ns) if executions else measured
        before = desired if self._from_desired else measured
        executions.append(command.follow(before, desired.position, receive_ns))

    def at(self, t_ns: int) -> np.ndarray:
        """Commanded positions (A,) float32 at t_ns, in the order of the action vector.

        Forgets what was replaced before t_ns, so t_ns must not go back. Raises CommandError for one that is not finite.
        """
        positions = [self._group_at(topic, t_ns) for topic in self._joints]
        return np.concatenate(positions).astype(np.float32)

    def _group_at(self, topic: str, t_ns: int) -> np.ndarray:
        executions = self._executions[topic]
        in_force = bisect_right(executions, t_ns, key=lambda execution: execution.before.time_ns) - 1
        del executions[:in_force]
        position = executions[0].sample(t_ns).position
        for joint, value in zip(self._joints[topic], position, strict=True):
            if not np.isfinite(value):
                raise CommandError(f"{topic}: the command in force at {_seconds(t_ns)} sends '{joint}' to {value}")
        return position


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"
