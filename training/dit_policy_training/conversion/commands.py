"""What the arm was commanded: recorded JointTrajectory messages, followed as the arm's controller followed them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np

from dit_policy_ros.embodiment import State
from dit_policy_ros.runtime.commands import Command, Execution, Rejection, read_command
from dit_policy_ros.runtime.messages import decode_joints, decode_velocities
from dit_policy_ros.runtime.streams import ObservationError
from dit_policy_ros.runtime.trajectory import Point
from dit_policy_training.conversion.message import BagMessage
from dit_policy_training.conversion.options import ControllerOptions


class CommandError(ValueError):
    """A recorded command that the controller refused, or that makes no sense; says when and why."""


class FollowedTrajectory:
    """The commanded position of a controller's joints over time, from messages added in receive order.

    `by_receive`: a command begins when it was received, whatever its header's stamp says. It sets out from the
    joints measured, no longer ago than `state.max_age`. `named_by`: what says that `joints` are the controller's.
    """

    def __init__(
        self,
        topic: str,
        joints: Sequence[str],
        state: State,
        options: ControllerOptions,
        by_receive: bool = False,
        named_by: str = "the embodiment",
    ):
        rules = asdict(options)
        self._from_desired = rules.pop("interpolate_from_desired_state")
        self._rules = rules
        self._topic, self._joints, self._state = topic, tuple(joints), state
        self._by_receive, self._named_by = by_receive, named_by
        # When each was received, rising, and how it is followed; None: where the arm set out from is not known.
        self._executions: list[tuple[int, Execution | None]] = []

    def add(self, receive_ns: int, message: Any, joint_state: BagMessage) -> None:
        """Take a JointTrajectory, and the latest JointState received, from which the arm set out to follow it.

        Raises CommandError for a command that the controller does not take.
        """
        last = self._executions[-1][1] if self._executions else None
        desired = None if last is None else last.sample(receive_ns)
        measured = self._measured(receive_ns, joint_state)
        before = desired if self._from_desired and desired is not None else measured
        command = self._read(message, receive_ns)
        if before is None:
            self._executions.append((receive_ns, None))
        else:
            hold = before if desired is None else desired
            self._executions.append((receive_ns, command.follow(before, hold.position, receive_ns)))

    def _read(self, message: Any, receive_ns: int) -> Command:
        if self._by_receive:
            message = _unstamped(message)
        command = read_command(message, self._joints, receive_ns, **self._rules)
        if isinstance(command, Rejection):
            raise CommandError(
                f"{self._topic}: a controller refuses the command at {_seconds(receive_ns)}: {command.reason}"
                + self._advice(command.rule, message.joint_names)
            )
        return command

    def _advice(self, rule: str, names: Sequence[str]) -> str:
        if rule == "ends_in_past":
            return f". {_OTHER_CLOCK.format(topic=self._topic)}"
        if rule in ("joint_count", "unknown_joint") and set(names) - set(self._joints):
            return (
                f". It is for {', '.join(names)}; the `joints` of {self._named_by} must be all those of the "
                f"controller, but are {', '.join(self._joints)}"
            )
        return ""

    def _measured(self, receive_ns: int, joint_state: BagMessage) -> Point | None:
        """Where the arm was; None if its joints have been silent for too long to tell."""
        if receive_ns - joint_state.receive_ns > self._state.max_age * 1e9:
            return None
        position = decode_joints(joint_state, self._joints, self._state.topic).astype(np.float64)
        return Point(receive_ns, position, decode_velocities(joint_state, self._joints, self._state.topic))

    def at(self, t_ns: int) -> np.ndarray:
        """Commanded positions (J,) float64 at t_ns.

        Raises CommandError for one that is not finite, ObservationError while where the arm set out from is not known.
        """
        began_ns, execution = self._executions[max(0, self._in_force(t_ns))]
        if execution is None:
            said = (
                f"the command received on {self._topic} at {_seconds(began_ns)} sets out from joints not measured then"
            )
            raise ObservationError("INPUT_STALE", said)
        position = execution.sample(t_ns).position
        for joint, value in zip(self._joints, position, strict=True):
            if not np.isfinite(value):
                raise CommandError(
                    f"{self._topic}: the command in force at {_seconds(t_ns)} sends '{joint}' to {value}"
                )
        return position

    def forget(self, t_ns: int) -> None:
        """Forget what was replaced before t_ns."""
        del self._executions[: max(0, self._in_force(t_ns))]

    def clear(self) -> None:
        """Forget every command."""
        self._executions.clear()

    def _in_force(self, t_ns: int) -> int:
        return bisect_right(self._executions, t_ns, key=lambda each: each[0]) - 1


_OTHER_CLOCK = (
    "If its stamps are of another clock than the recorder's, take the receive time as its beginning: "
    "--time.stamps='{{{topic}: receive}}'"
)


def _unstamped(message: Any) -> Any:
    stamp = SimpleNamespace(sec=0, nanosec=0)  # which means: begin at once
    header = SimpleNamespace(stamp=stamp)
    return SimpleNamespace(header=header, joint_names=message.joint_names, points=message.points)


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"
