"""What every way to a controller has in common: how it is used, and how its own commands are known from others'."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import Float64MultiArray

from dit_policy_ros.embodiment import ActionGroup
from dit_policy_ros.nodes.controllers import OBSERVERS
from dit_policy_ros.runtime.faults import Trouble
from dit_policy_ros.runtime.trajectory import Point, Trajectory

COMMANDS = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
_UNKNOWN = "_NODE_NAME_UNKNOWN_"  # discovery tells of a subscription first, and of its node a moment later
_REMEMBERED = 256  # sent messages: half a second of a stream at 500 Hz, in which each must have come back to us


@dataclass(frozen=True)
class Channel:
    """A topic on which commands to the controller can be heard: its full name, type and QoS."""

    topic: str
    kind: type[Any]
    qos: QoSProfile


class Outlet(Protocol):
    """The way to one action group's controller."""

    group: ActionGroup

    @property
    def rate(self) -> float:
        """How often `beat` must be called, Hz; 0 if it does nothing."""

    def send(self, trajectory: Trajectory, now_ns: int, start: Point) -> None:
        """Make the controller follow the trajectory of the group's joints from now on.

        start: the state (d,) of these joints that the trajectory was planned from. A stream of positions begins there
        if it was silent; a trajectory controller has its own.
        """

    def beat(self, now_ns: int) -> None:
        """Send what is due at this moment."""

    def flush(self, timeout: float) -> bool:
        """Wait until the latest command has arrived, at most `timeout` s; whether it has."""

    def listeners(self) -> int:
        """Who would carry a command out: this node itself, the guard and recorders do not count."""

    def channels(self) -> Sequence[Channel]:
        """Where commands to the controller can be heard, ours and other people's."""

    def recognises(self, message: Any) -> bool:
        """Whether all commands in a message of one of the channels are ours."""

    def troubles(self) -> list[Trouble]:
        """What the controller answered, if that was no; nothing where it does not answer."""

    def close(self) -> None:
        """Free publishers and clients; the controller goes on with what it has."""


class SentMessages:
    """The latest messages sent, to be known again by their contents: rclpy does not tell a message's publisher."""

    def __init__(self) -> None:
        self._contents: deque[Hashable] = deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()

    def add(self, message: Any) -> None:
        """Remember a JointTrajectory or a Float64MultiArray."""
        with self._lock:
            self._contents.append(_contents(message))

    def __contains__(self, message: object) -> bool:
        contents = _contents(message)
        with self._lock:
            return contents in self._contents


def _contents(message: Any) -> Hashable:
    if isinstance(message, Float64MultiArray):
        return _bytes(message.data)
    stamp = message.header.stamp
    points = tuple(
        (point.time_from_start.sec, point.time_from_start.nanosec, _bytes(point.positions), _bytes(point.velocities))
        for point in message.points
    )
    return (message.header.frame_id, stamp.sec, stamp.nanosec, tuple(message.joint_names), points)


def _bytes(values: Any) -> bytes:
    return np.asarray(values, np.float64).tobytes()


def count_listeners(node: Node, publisher: Publisher) -> int:
    """Subscriptions of a publisher's topic that carry commands out; asks the graph, some 50 us for each of them."""
    ours = node.get_name(), node.get_namespace()
    infos = node.get_subscriptions_info_by_topic(publisher.topic_name)
    others = [info.node_name for info in infos if (info.node_name, info.node_namespace) != ours]
    return sum(not name.startswith((*OBSERVERS, _UNKNOWN)) for name in others)
