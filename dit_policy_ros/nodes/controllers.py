"""Where a controller's topics and its action are, by the command topic that the embodiment gives for its group."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dit_policy_ros.embodiment import ActionGroup

GUARD = "dit_policy_guard"
"""Name of the guard's node, and frame_id of the stops that it sends: they are not somebody else's commands."""

OBSERVERS = (GUARD, "rosbag2_recorder", "foxglove_bridge", "plotjuggler")
"""Nodes whose names begin so listen to commands without carrying them out."""


def controller_of(group: ActionGroup) -> str:
    """The controller's name, namespace included: "arm_controller" of "arm_controller/joint_trajectory"."""
    return group.topic.rpartition("/")[0]


def topic_of(group: ActionGroup, name: str) -> str:
    """A topic of the group's controller, such as "controller_state"."""
    controller = controller_of(group)
    # A topic right under the root, "/commands", has an empty name before its slash and still begins with one.
    return f"{controller}/{name}" if "/" in group.topic else name


def trajectory_topic(group: ActionGroup) -> str | None:
    """Where the group's controller takes trajectories as messages; None if it takes none."""
    if group.interface == "position":
        return None
    return group.topic if group.interface == "trajectory" else topic_of(group, "joint_trajectory")


def message_type(name: str) -> type[Any] | None:
    """The class of a type such as "control_msgs/msg/JointTrajectoryControllerState"; None if it is not installed."""
    package, kind, message = name.split("/")
    try:
        return getattr(import_module(f"{package}.{kind}"), message)
    except (ImportError, AttributeError):
        return None


def follow_trajectory() -> tuple[type[Any], str]:
    """The action of a joint_trajectory_controller, and its name.

    control_msgs/FollowJointTrajectory; where that is not installed, dit_policy_msgs/FollowTrajectory, which has the
    same fields and which only the simulator offers.
    """
    for name in ("control_msgs/action/FollowJointTrajectory", "dit_policy_msgs/action/FollowTrajectory"):
        action = message_type(name)
        if action is not None:
            return action, name
    raise ImportError("dit_policy_msgs has no FollowTrajectory: build the messages of this version (make setup)")
