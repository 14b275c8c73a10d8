"""All action groups' controllers as one arm: a command for all joints goes to each group's outlet, and is watched."""

from __future__ import annotations

from collections.abc import Sequence

from rclpy.node import Node

from dit_policy_ros.embodiment import ActionGroup
from dit_policy_ros.nodes.outlets import make_outlet
from dit_policy_ros.nodes.watchers import ControllerWatch, ForeignCommandWatch
from dit_policy_ros.runtime.faults import Trouble
from dit_policy_ros.runtime.trajectory import Point, Trajectory


class Arm:
    """The outlets and watches of some action groups. Any thread may call; one at a time may command."""

    def __init__(self, node: Node, groups: Sequence[ActionGroup], command_rate: float) -> None:
        self._groups = tuple(groups)
        self._outlets = [make_outlet(node, group, command_rate) for group in groups]
        self._controllers = [ControllerWatch(node, outlet) for outlet in self._outlets]
        self._foreign = [ForeignCommandWatch(node, outlet) for outlet in self._outlets]
        self.watch_foreign_commands = True

    def limit(self, controller_timeout: float, max_tracking_error: float) -> None:
        """What the watches allow: s of silence, and rad (m for a prismatic joint)."""
        for watch in self._controllers:
            watch.timeout, watch.max_tracking_error = controller_timeout, max_tracking_error

    def send(self, trajectory: Trajectory, start: Point, now_ns: int) -> None:
        """Each group's part of a trajectory of all joints; `start`: the state (J,) that it begins from."""
        for group, outlet in zip(self._groups, self._outlets, strict=True):
            joints = tuple(group.joints)
            columns = [trajectory.joint_names.index(joint) for joint in joints]
            velocity = None if start.velocity is None else start.velocity[columns]
            acceleration = None if start.acceleration is None else start.acceleration[columns]
            part = Point(now_ns, start.position[columns], velocity, acceleration)
            outlet.send(trajectory.select(joints), now_ns, part)

    def beat(self, now_ns: int) -> None:
        """Send the positions due at this moment, where positions are streamed."""
        for outlet in self._outlets:
            outlet.beat(now_ns)

    def flush(self, timeout: float) -> bool:
        """Wait until the latest commands have arrived, at most `timeout` s for each group; whether all have."""
        arrived = [outlet.flush(timeout) for outlet in self._outlets]  # all of them, also behind one that fails
        return all(arrived)

    def check(self, now_ns: int) -> list[Trouble]:
        """What is wrong with the controllers at this moment."""
        troubles = [trouble for outlet in self._outlets for trouble in outlet.troubles()]
        for controller in self._controllers:
            troubles += controller.check(now_ns)
        for foreign in self._foreign if self.watch_foreign_commands else ():
            troubles += foreign.check(now_ns)
        return troubles

    def close(self) -> None:
        """Free publishers, clients and subscriptions; the controllers go on with what they have."""
        for foreign in self._foreign:
            foreign.close()
        for controller in self._controllers:
            controller.close()
        for outlet in self._outlets:
            outlet.close()
