"""Starts several robots' policies on one computer, each in its namespace with a guard of its own; dry runs at first.

    ros2 launch dit_policy_ros robots.launch.py namespaces:=left,right \\
        checkpoint:=/policies/{robot} embodiment:=/robots/{robot}.yaml

In `checkpoint`, `embodiment` and `params_file`, `{robot}` stands for the namespace. Two arms that one policy drives
together are one robot: two action groups of one embodiment.
"""

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

SHARE = FindPackageShare("dit_policy_ros")

ARGUMENTS = [
    DeclareLaunchArgument("namespaces", default_value="", description="The robots' namespaces: left,right"),
    DeclareLaunchArgument(
        "params_file",
        default_value=PathJoinSubstitution([SHARE, "config", "robot.yaml"]),
        description="YAML file of parameters; {robot} is the namespace.",
    ),
    DeclareLaunchArgument(
        "embodiment",
        default_value="",
        description="Embodiment YAML; {robot} is the namespace. Empty: the checkpoint's.",
    ),
    DeclareLaunchArgument("checkpoint", default_value="", description="Checkpoint folder; {robot} is the namespace."),
    DeclareLaunchArgument("dry_run", default_value="true", description="Send nothing to the controllers."),
    DeclareLaunchArgument("recovery", default_value="manual", description="manual or automatic, after a fault."),
    DeclareLaunchArgument("guard", default_value="true", description="Start a guard for each."),
    DeclareLaunchArgument("autostart", default_value="true", description="Configure and activate the policies."),
    DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal."),
]

NAMED_BY_ROBOT = ("params_file", "embodiment", "checkpoint")
PASSED_ON = ("dry_run", "recovery", "guard", "autostart", "log_level")


def start_robots(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """robot.launch.py once for each namespace."""
    text = LaunchConfiguration("namespaces").perform(context)
    namespaces = [name.strip() for name in text.split(",") if name.strip()]
    if not namespaces or len(set(namespaces)) != len(namespaces):
        raise RuntimeError(f"namespaces:='{text}': expected one name or more, each once, such as left,right")
    given = {name: LaunchConfiguration(name).perform(context) for name in (*NAMED_BY_ROBOT, *PASSED_ON)}

    def robot(namespace: str) -> GroupAction:
        own = {name: given[name].replace("{robot}", namespace.strip("/")) for name in NAMED_BY_ROBOT}
        arguments = {**given, **own, "namespace": namespace}
        include = IncludeLaunchDescription(
            PathJoinSubstitution([SHARE, "launch", "robot.launch.py"]), launch_arguments=list(arguments.items())
        )
        return GroupAction([include])  # which keeps one robot's arguments from the next one

    return [robot(namespace) for namespace in namespaces]


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start_robots)])
