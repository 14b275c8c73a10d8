"""How a trajectory gets to an action group's controller: as a message, an action's goal, or a stream of positions.

Which of them, says the group's `interface` in the embodiment. Nothing here checks a trajectory: that is the gate's work
before. Calls may come from any thread; none waits but `flush`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from rclpy.duration import Duration
from rclpy.node import Node
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from dit_policy_ros.embodiment import ActionGroup
from dit_policy_ros.nodes.action_outlet import ActionOutlet
from dit_policy_ros.nodes.conversions import trajectory_message
from dit_policy_ros.nodes.outlet import COMMANDS, Channel, Outlet, SentMessages, count_listeners
from dit_policy_ros.runtime.course import Course
from dit_policy_ros.runtime.faults import Trouble
from dit_policy_ros.runtime.trajectory import Point, Trajectory

_LONGEST_NS = 100_000_000  # between two beats; a clock that has moved on by more has jumped
HOLD_NS = 500_000_000  # how long a stream repeats its last point, so that none is missed, before it falls silent
_NS = 1_000_000_000


def make_outlet(node: Node, group: ActionGroup, command_rate: float) -> Outlet:
    """The outlet that the group's interface asks for; command_rate (Hz) is that of a stream of positions."""
    if group.interface == "trajectory":
        return TrajectoryOutlet(node, group)
    if group.interface == "follow_joint_trajectory":
        return ActionOutlet(node, group)
    if group.interface == "position":
        return PositionOutlet(node, group, command_rate)
    raise ValueError(
        f"action_groups.{group.name}.interface is '{group.interface}', expected trajectory, follow_joint_trajectory or "
        "position"
    )


class TopicOutlet:
    """What the outlets that publish on the group's topic have in common: the topic, who listens, what was sent."""

    def __init__(self, node: Node, group: ActionGroup, kind: type) -> None:
        self.group = group
        self._node = node
        self._kind = kind
        self._publisher = node.create_publisher(kind, group.topic, COMMANDS)
        self._sent = SentMessages()

    def _publish(self, message: object) -> None:
        self._sent.add(message)  # first: it may come back before `publish` returns
        self._publisher.publish(message)

    def listeners(self) -> int:
        """See Outlet."""
        return count_listeners(self._node, self._publisher)

    def channels(self) -> Sequence[Channel]:
        """The topic."""
        return [Channel(self._publisher.topic_name, self._kind, COMMANDS)]

    def recognises(self, message: Any) -> bool:
        """Whether we sent a message of these contents lately."""
        return message in self._sent

    def troubles(self) -> list[Trouble]:
        """None: a controller drops a message that it does not like without a word to its publisher."""
        return []

    def close(self) -> None:
        """See Outlet."""
        self._node.destroy_publisher(self._publisher)


class TrajectoryOutlet(TopicOutlet):
    """JointTrajectory messages with stamp zero on the controller's `~/joint_trajectory`."""

    rate = 0.0

    def __init__(self, node: Node, group: ActionGroup) -> None:
        super().__init__(node, group, JointTrajectory)

    def send(self, trajectory: Trajectory, now_ns: int, start: Point) -> None:
        """Publish it; the controller replaces what it follows."""
        self._publish(trajectory_message(trajectory))

    def beat(self, now_ns: int) -> None:
        """Nothing: a message is whole."""

    def flush(self, timeout: float) -> bool:
        """See Outlet: all reliable subscribers have the message."""
        return bool(self._publisher.wait_for_all_acked(Duration(seconds=timeout)))


class PositionOutlet(TopicOutlet):
    """Float64MultiArray positions at a fixed rate, interpolated as a joint_trajectory_controller would.

    A new trajectory is joined to the last position sent, with its velocity. After the end the last point is repeated
    for half a second, then the stream is silent, and a position controller holds.

    The stream has a time of its own, that of the beats without their clock's jumps: a position looked up at another
    time than a moment after the last one would be a jump of the arm.
    """

    def __init__(self, node: Node, group: ActionGroup, rate: float) -> None:
        if not rate > 0:
            raise ValueError(f"the rate of '{group.topic}' is {rate} Hz, expected more than 0")
        super().__init__(node, group, Float64MultiArray)
        self.rate = rate
        self._lock = threading.Lock()
        self._period_ns = round(_NS / rate)
        self._course: Course | None = None
        self._beaten_ns = 0  # by the clock of the beats
        self._time_ns = 0  # by the stream's own
        self._due_ns = 0

    def send(self, trajectory: Trajectory, now_ns: int, start: Point) -> None:
        """Stream it from the next beat on."""
        if trajectory.joint_names != tuple(self.group.joints):
            raise ValueError(
                f"a trajectory of {', '.join(trajectory.joint_names)} for '{self.group.topic}', expected "
                f"{', '.join(self.group.joints)}, in this order: positions are sent without names"
            )
        with self._lock:
            self._advance(now_ns)
            before = start if self._course is None else self._course.at(self._time_ns)
            self._course = Course.follow(trajectory, before, self._time_ns)
            self._due_ns = self._time_ns

    def beat(self, now_ns: int) -> None:
        """Publish where the joints should be at now_ns, if that is due."""
        with self._lock:
            self._advance(now_ns)
            course = self._course
            if course is None or not self._due():
                return
            if self._time_ns - course.end_ns > HOLD_NS:
                self._course = None
                return
            # Under the lock: an older position must not come after a newer one.
            self._publish(Float64MultiArray(data=course.at(self._time_ns).position.tolist()))

    def _advance(self, now_ns: int) -> None:
        passed_ns, self._beaten_ns = now_ns - self._beaten_ns, now_ns
        if 0 <= passed_ns <= _LONGEST_NS:
            self._time_ns += passed_ns
        else:
            self._time_ns += self._period_ns
            self._due_ns = self._time_ns

    def _due(self) -> bool:
        late_ns = self._time_ns - self._due_ns
        if late_ns < 0:
            return False
        # No burst after a delay.
        self._due_ns = (self._time_ns if late_ns > self._period_ns else self._due_ns) + self._period_ns
        return True

    def flush(self, timeout: float) -> bool:
        """Stream, in the caller's thread, what is left of the trajectory, and wait until it has arrived."""
        began_ns, began = self._node.get_clock().now().nanoseconds, time.monotonic_ns()
        while (passed_ns := time.monotonic_ns() - began) < timeout * _NS:
            # By the steady clock: under use_sim_time this thread may be the one that should hear of the time.
            now_ns = began_ns + passed_ns
            self.beat(now_ns)
            with self._lock:
                if self._course is None or self._time_ns > self._course.end_ns + self._period_ns:
                    break
            time.sleep(1 / self.rate)
        else:
            return False
        return bool(self._publisher.wait_for_all_acked(Duration(nanoseconds=max(0, int(timeout * _NS) - passed_ns))))
