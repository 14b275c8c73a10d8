"""One action group as the guard sees it: what its controller was last told to do, and how to end that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from rclpy.node import Node
from trajectory_msgs.msg import JointTrajectory

from dit_policy_ros.embodiment import ActionGroup
from dit_policy_ros.nodes.controllers import GUARD, trajectory_topic
from dit_policy_ros.nodes.conversions import trajectory_message
from dit_policy_ros.nodes.outlet import COMMANDS
from dit_policy_ros.runtime.commands import Execution, Rejection, read_command
from dit_policy_ros.runtime.messages import stamp_ns
from dit_policy_ros.runtime.trajectory import Point, stop

RESTING_SPEED = 0.02  # rad/s (m/s): slower is sensor noise
_WAY_LEFT = 1e-3  # rad (m): a trajectory with less to go leaves the arm where it is


class GuardedGroup:
    """Hears a controller's commands, and sends it a stop. Raises ValueError for a group that takes no trajectories.

    `on_command` is called for each command of others than the guard.
    """

    def __init__(self, node: Node, group: ActionGroup, on_command: Callable[[], None]) -> None:
        topic = trajectory_topic(group)
        if topic is None:
            raise ValueError(f"action group '{group.name}' takes no trajectories")
        self.group = group
        self.topic = topic
        self.joints = tuple(group.joints)
        self._node = node
        self._on_command = on_command
        self._told: Execution | None = None  # on the steady clock
        self._publisher = node.create_publisher(JointTrajectory, topic, COMMANDS)
        node.create_subscription(JointTrajectory, topic, self._hear, COMMANDS)

    def moves(self, steady_ns: int, measured: Point | None) -> bool | None:
        """Whether the arm moves, or is about to, by the last command heard or as measured; None: neither is known."""
        if self._told is not None and self._way_left(self._told, steady_ns):
            return True  # it may stand still for a moment, where it turns
        if measured is not None and measured.velocity is not None:
            return float(np.abs(measured.velocity).max()) > RESTING_SPEED
        return None if self._told is None else False

    @staticmethod
    def _way_left(told: Execution, steady_ns: int) -> bool:
        here = told.sample(max(steady_ns, told.before.time_ns)).position
        left = [knot.position for knot in told.knots if knot.time_ns > steady_ns]
        return any(float(np.abs(position - here).max()) > _WAY_LEFT for position in left)

    def reference(self, steady_ns: int) -> Point | None:
        """Where the last command heard has the joints now; None if none was heard."""
        return None if self._told is None else self._told.sample(steady_ns)

    def stop(self, start: Point) -> None:
        """Bring the joints to rest from this state (d,), of now."""
        message = trajectory_message(stop(self.joints, start, self.group.joints))
        message.header.frame_id = GUARD
        self._publisher.publish(message)
        self._told = None

    def _hear(self, message: JointTrajectory) -> None:
        if message.header.frame_id == GUARD:
            return
        self._on_command()
        now_ns = int(self._node.get_clock().now().nanoseconds)
        command = read_command(
            message,
            self.joints,
            now_ns,
            allow_partial_joints_goal=True,
            allow_nonzero_velocity_at_trajectory_end=True,
        )
        if isinstance(command, Rejection):
            return  # the controller refuses it as well, and goes on with what it has
        steady_ns, due_ns = time.monotonic_ns(), stamp_ns(message)
        before = self.reference(steady_ns)
        if before is None:
            if len(command.columns) < len(self.joints):
                return  # where the others are held, nobody has said
            first = np.empty(len(self.joints))
            first[list(command.columns)] = command.points[0].position
            before = Point(steady_ns, first)
        if due_ns:
            command = replace(command, stamp_ns=steady_ns + due_ns - now_ns)
        self._told = command.follow(before, before.position, steady_ns)
