"""A node in the test's own process that keeps what it hears, sends what it is told, and calls services."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import asking
import rclpy
from asking import ask
from builtin_interfaces.msg import Duration
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from dit_policy_ros.nodes.processes import Child


class Listener:
    """`heard[topic]` grows with each message; waits end as soon as their condition holds or `child` dies."""

    def __init__(self, child: Child, topics: dict[str, type], namespace: str = "/") -> None:
        self.heard: dict[str, list[Any]] = defaultdict(list)
        self.child = child
        self._context = Context()
        rclpy.init(context=self._context)
        self.node = Node("listener", context=self._context, namespace=namespace)
        for topic, kind in topics.items():
            self.node.create_subscription(kind, topic, self.heard[topic].append, qos_profile_sensor_data)
        self._publishers: dict[str, Any] = {}
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._running = True
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        while self._running:
            self._executor.spin_once(timeout_sec=0.05)

    def close(self) -> None:
        self._running = False
        self._thread.join()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    def wait(self, condition: Callable[[], Any], what: str, timeout: float = 60.0) -> Any:
        """The condition's value once it is true."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            self.child.check()
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{self.child.last_lines()}"
            time.sleep(0.01)
        return value

    def wait_until(self, condition: Callable[[], Any], patience: float) -> bool:
        """Whether the condition came true within `patience` seconds."""
        deadline = time.monotonic() + patience
        while not condition() and time.monotonic() < deadline:
            self.child.check()
            time.sleep(0.001)
        return bool(condition())

    def next(self, topic: str, count: int = 1) -> list[Any]:
        """The next `count` messages from now on; a message that is on its way may be the first."""
        seen = len(self.heard[topic])
        self.wait(lambda: len(self.heard[topic]) >= seen + count, f"{count} messages on {topic}")
        return self.heard[topic][seen : seen + count]

    def call(self, kind: type, name: str, request: Any) -> Any:
        client = self.node.create_client(kind, name)
        try:
            self.wait(client.service_is_ready, f"the service {name}")
            return ask(client, request, 40.0, once=kind is ChangeState, check=self.child.check)
        finally:
            self.node.destroy_client(client)

    def transition(self, name: str, node: str = "dit_policy") -> bool:
        """Whether a lifecycle node made the transition of this name."""
        request = ChangeState.Request(transition=Transition(id=getattr(Transition, f"TRANSITION_{name.upper()}")))
        return asking.transition(
            name,
            lambda: bool(self.call(ChangeState, f"{node}/change_state", request).success),
            lambda: asking.label(self.call(GetState, f"{node}/get_state", GetState.Request()).current_state),
        )

    def set_parameter(self, node: str, name: str, value: Any) -> Any:
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        return self.call(SetParameters, f"{node}/set_parameters", request).results[0]

    def move(self, topic: str, joints: Sequence[str], positions: Sequence[float], seconds: float) -> None:
        """Publish a trajectory of one point, with stamp zero."""
        since = Duration(sec=int(seconds), nanosec=round(seconds % 1 * 1e9))
        point = JointTrajectoryPoint(positions=list(positions), time_from_start=since)
        self.publish(topic, JointTrajectory(joint_names=list(joints), points=[point]))

    def publish(self, topic: str, message: Any) -> None:
        """Publish reliably, once somebody listens."""
        self.publisher(topic, type(message)).publish(message)

    def publisher(self, topic: str, kind: type) -> Any:
        """A reliable publisher that somebody listens to."""
        if topic not in self._publishers:
            self._publishers[topic] = self.node.create_publisher(kind, topic, 10)
        publisher = self._publishers[topic]
        self.wait(publisher.get_subscription_count, f"a listener on {topic}")
        return publisher
