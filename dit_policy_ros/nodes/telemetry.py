"""What the beat publishes: the sign of life, and predicted and commanded joints to plot beside the measured ones."""

from __future__ import annotations

import numpy as np
from dit_policy_msgs.msg import Heartbeat
from rclpy.node import Node
from sensor_msgs.msg import JointState

from dit_policy_ros.nodes.conversions import joint_state_message, time_message
from dit_policy_ros.nodes.qos import RELIABLE
from dit_policy_ros.runtime.chunking import Chunk
from dit_policy_ros.runtime.conductor import Conductor

_JOINTS_PERIOD_NS = 50_000_000


class Telemetry:
    """Publishes ~/heartbeat at its rate (Hz), ~/predicted_joint_states and ~/commanded_joint_states 20 times a second.

    Joints only while there is something to tell: predicted ones while the newest accepted chunk lasts (in a dry run
    too), commanded ones while the arm moves.
    """

    def __init__(self, node: Node, heartbeat_rate: float) -> None:
        self._heartbeat = node.create_publisher(Heartbeat, "~/heartbeat", RELIABLE)
        self._predicted = node.create_publisher(JointState, "~/predicted_joint_states", RELIABLE)
        self._commanded = node.create_publisher(JointState, "~/commanded_joint_states", RELIABLE)
        self._period_ns = round(1e9 / heartbeat_rate)
        self._sequence = 0
        self._heartbeat_due_ns = 0
        self._joints_due_ns = 0

    def beat(self, now_ns: int, steady_ns: int, conductor: Conductor | None) -> None:
        """Publish what is due; now_ns is the node's clock, which stamps, steady_ns the one that does not jump."""
        if steady_ns >= self._heartbeat_due_ns:
            self._heartbeat_due_ns = _next(self._heartbeat_due_ns, steady_ns, self._period_ns)
            course = conductor.course if conductor is not None else None  # once: another thread may replace it
            self.live(now_ns, moving=course is not None and now_ns < course.end_ns)
        if conductor is not None and steady_ns >= self._joints_due_ns:
            self._joints_due_ns = _next(self._joints_due_ns, steady_ns, _JOINTS_PERIOD_NS)
            self._publish_joints(conductor, now_ns)

    def live(self, now_ns: int, moving: bool) -> None:
        """Publish a sign of life now."""
        message = Heartbeat(sequence=self._sequence, moving=moving, period=self._period_ns / 1e9)
        message.header.stamp = time_message(now_ns)
        self._sequence += 1
        self._heartbeat.publish(message)

    def _publish_joints(self, conductor: Conductor, now_ns: int) -> None:
        chunk, course = conductor.chunk, conductor.course
        if conductor.running and chunk is not None:
            predicted = predicted_positions(chunk, now_ns)
            if predicted is not None:
                self._predicted.publish(joint_state_message(chunk.joint_names, predicted, None, now_ns))
        if course is not None and now_ns < course.end_ns:
            point = course.at(now_ns)
            message = joint_state_message(course.joint_names, point.position, point.velocity, now_ns)
            self._commanded.publish(message)


def predicted_positions(chunk: Chunk, now_ns: int) -> np.ndarray | None:
    """Where a chunk says that the joints (J,) should be at a moment, between its rows linearly; None outside of it."""
    due_ns = chunk.due_times_ns
    if not due_ns[0] <= now_ns <= due_ns[-1]:
        return None
    seconds = (due_ns - now_ns) / 1e9
    return np.array([np.interp(0.0, seconds, column) for column in chunk.positions.T])


def _next(due_ns: int, now_ns: int, period_ns: int) -> int:
    """The next moment due, by the grid of the one before; after a pause the grid begins anew."""
    return due_ns + period_ns if now_ns - due_ns < period_ns else now_ns + period_ns
