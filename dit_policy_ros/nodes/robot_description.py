"""The URDF's limits, from the topic robot_description."""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node
from std_msgs.msg import String

from dit_policy_ros.embodiment import Embodiment, JointLimits
from dit_policy_ros.nodes.qos import LATCHED
from dit_policy_ros.runtime.urdf import UrdfError, limits_from_urdf


class RobotDescription:
    """Hears robot_description; `on_change()` is called after a new one came."""

    def __init__(self, node: Node, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._xml: str | None = None
        self.topic = node.resolve_topic_name("robot_description")
        node.create_subscription(String, self.topic, self._hear, LATCHED)

    def limits(self, embodiment: Embodiment) -> dict[str, JointLimits]:
        """The tighter of the URDF's and the embodiment's limits. Raises ValueError saying why there are none."""
        if self._xml is None:
            raise ValueError(
                f"limits_from is robot_description, and none came yet on '{self.topic}': is robot_state_publisher "
                "running, in this namespace?"
            )
        try:
            return limits_from_urdf(self._xml, embodiment.action_joints, embodiment.limits)
        except UrdfError as error:
            raise ValueError(f"the URDF on '{self.topic}' does not do for limits_from: {error}") from error

    def _hear(self, message: String) -> None:
        if message.data != self._xml:
            self._xml = message.data
            self._on_change()
