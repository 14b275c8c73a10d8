"""Watchdogs of what is beyond an outlet: a controller that is there, reports and follows; nobody else who commands it.

`check` is called a hundred times a second and costs microseconds: the graph is asked twice a second at most.
"""

from __future__ import annotations

import math
import threading
import time
from functools import partial
from typing import Any

from action_msgs.msg import GoalStatusArray
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from rclpy.subscription import Subscription
from trajectory_msgs.msg import JointTrajectory

from dit_policy_ros.nodes.controllers import GUARD, message_type, topic_of
from dit_policy_ros.nodes.outlet import Outlet
from dit_policy_ros.runtime.faults import Fault, Trouble

GRACE_S = 3.0  # in which a controller may still be discovered
_GRAPH_S = 0.5  # between two looks at the graph
_FOREIGN_S = 1.0  # how long a foreign command is trouble at least


class ControllerWatch:
    """Whether a controller listens, publishes its state, and is near its reference. The attributes may be changed live.

    timeout: s, of silence on `~/controller_state`, once it has been heard. max_tracking_error: rad (m for a prismatic
    joint), of any joint of the group.
    """

    def __init__(self, node: Node, outlet: Outlet, timeout: float = 0.5, max_tracking_error: float = 0.5) -> None:
        self.timeout = timeout
        self.max_tracking_error = max_tracking_error
        self._node = node
        self._outlet = outlet
        self._state_topic = node.resolve_topic_name(topic_of(outlet.group, "controller_state"))
        self._watched = outlet.group.interface != "position"  # a position controller publishes no such state
        self._subscription: Subscription | None = None
        self._lock = threading.Lock()
        self._heard: tuple[float, int] | None = None  # the newest state: by the steady clock (s), by the node's (ns)
        self._error: tuple[float, str] = (0.0, "")  # the largest of the newest state, and its joint
        self._looked_s = float("-inf")
        self._listeners = 0
        self._unheard_since = time.monotonic()

    def check(self, now_ns: int) -> list[Trouble]:
        """What is wrong at now_ns, on the node's clock."""
        steady = time.monotonic()
        if steady - self._looked_s >= _GRAPH_S:
            self._looked_s = steady
            self._look(steady)
        reasons = (self._nobody(steady), self._silence(steady, now_ns), self._distance())
        return [Trouble(Fault.CONTROLLER, reason) for reason in reasons if reason]

    @property
    def listeners(self) -> int:
        """Of the outlet, as of the latest look at the graph."""
        return self._listeners

    def close(self) -> None:
        """End the subscription."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
            self._subscription = None

    def _look(self, steady: float) -> None:
        self._listeners = self._outlet.listeners()
        if self._listeners:
            self._unheard_since = steady + _GRAPH_S - GRACE_S  # once there, it is missed at the next look
        if not self._watched or self._subscription is not None:
            return
        for info in self._node.get_publishers_info_by_topic(self._state_topic):
            kind = message_type(info.topic_type)
            if kind is not None:
                self._subscription = self._node.create_subscription(
                    kind, self._state_topic, self._on_state, qos_profile_sensor_data
                )
                return
            self._watched = False
            self._node.get_logger().error(
                f"'{self._state_topic}' is of type {info.topic_type}, which is not installed here: the controller's "
                "state is not watched"
            )

    def _on_state(self, message: Any) -> None:
        errors = {
            name: math.inf if math.isnan(value) else abs(value)
            for name, value in zip(message.joint_names, message.error.positions, strict=False)
            if name in self._outlet.group.joints
        }
        joint = max(errors, key=lambda name: errors[name], default="")
        with self._lock:
            self._heard = time.monotonic(), int(self._node.get_clock().now().nanoseconds)
            self._error = errors.get(joint, 0.0), joint

    def _nobody(self, steady: float) -> str | None:
        if self._listeners or steady - self._unheard_since < GRACE_S:
            return None
        return (
            f"nobody listens on '{self._outlet.group.topic}': start the controller, or mend action_groups."
            f"{self._outlet.group.name}.topic in the embodiment"
        )

    def _silence(self, steady: float, now_ns: int) -> str | None:
        with self._lock:
            if self._heard is None:
                return None
            # By both clocks: a simulation that stands still is not a dead controller, nor is a clock that jumps ahead.
            silence = min(steady - self._heard[0], (now_ns - self._heard[1]) / 1e9)
        if silence <= self.timeout:
            return None
        return f"'{self._state_topic}' has been silent for {silence:.2f} s, allowed are {self.timeout} s"

    def _distance(self) -> str | None:
        with self._lock:
            error, joint = self._error
        if error <= self.max_tracking_error:
            return None
        return (
            f"{joint} is {error:.3f} from its reference, allowed are {self.max_tracking_error} (rad, or m): is the arm "
            "blocked, or a brake on?"
        )


class ForeignCommandWatch:
    """Whether somebody else commands the controller; a command is known by its contents to be ours or not.

    The guard's stop is Fault.GUARD, everything else Fault.FOREIGN_COMMAND: for a second after it came, and until a
    foreign trajectory ends, or a foreign goal.
    """

    def __init__(self, node: Node, outlet: Outlet) -> None:
        self._node = node
        self._outlet = outlet
        self._lock = threading.Lock()
        self._looked = 0.0  # for listeners, steady clock, s
        self._newest: dict[str, tuple[float, Trouble]] = {}  # by topic: until when (steady clock, s), and what
        self._subscriptions = [
            node.create_subscription(channel.kind, channel.topic, partial(self._hear, channel.topic), channel.qos)
            for channel in outlet.channels()
        ]

    def check(self, now_ns: int) -> list[Trouble]:
        """The newest command on each topic that is not ours, while it is in force."""
        with self._lock:
            if not self._newest:
                return []
            now_s = time.monotonic()
            self._forget_goals_of_the_dead(now_s)
            self._newest = {topic: entry for topic, entry in self._newest.items() if entry[0] > now_s}
            return [trouble for _, trouble in self._newest.values()]

    def _forget_goals_of_the_dead(self, now_s: float) -> None:
        """A controller that has died never tells that a goal of its has ended."""
        goals = [topic for topic, (until_s, _) in self._newest.items() if until_s == math.inf]
        if goals and now_s - self._looked > _GRAPH_S:
            self._looked = now_s
            if self._outlet.listeners() == 0:
                for topic in goals:
                    del self._newest[topic]

    def close(self) -> None:
        """End the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []

    def _hear(self, topic: str, message: Any) -> None:
        if self._outlet.recognises(message):
            if isinstance(message, GoalStatusArray):  # it lists all goals: the foreign ones are over
                with self._lock:
                    self._newest.pop(topic, None)
            return
        if isinstance(message, JointTrajectory) and message.header.frame_id == GUARD:
            trouble = Trouble(Fault.GUARD, f"the guard sent a stop on '{topic}': it missed this node's heartbeat")
        else:
            reason = f"somebody else commands the arm on '{topic}': end that program, or give it another controller"
            trouble = Trouble(Fault.FOREIGN_COMMAND, reason)
        with self._lock:
            self._newest[topic] = time.monotonic() + _in_force(message), trouble


def _in_force(message: Any) -> float:
    """How long a command may move the arm, s."""
    if isinstance(message, GoalStatusArray):
        return math.inf
    if not isinstance(message, JointTrajectory) or not message.points:
        return _FOREIGN_S
    last = message.points[-1].time_from_start
    return max(_FOREIGN_S, last.sec + last.nanosec / 1e9)
