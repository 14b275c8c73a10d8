"""On a computer with a GPU, away from the robot's: the policy, with the images compressed. It begins with a dry run.

    ros2 launch dit_policy_ros gpu_host.launch.py checkpoint:=/path/to/checkpoint embodiment:=my_robot.yaml \\
        namespace:=left

The robot's computer runs robot_host.launch.py with the same embodiment and namespace; docs/deployment.md says what both
need, the clocks above all.
"""

import tempfile
from pathlib import Path

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

from dit_policy_ros.deployment import over_network
from dit_policy_ros.embodiment import Embodiment

SHARE = FindPackageShare("dit_policy_ros")

ARGUMENTS = [
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node and the robot's topics."),
    DeclareLaunchArgument(
        "params_file",
        default_value=PathJoinSubstitution([SHARE, "config", "robot.yaml"]),
        description="YAML file of parameters.",
    ),
    DeclareLaunchArgument(
        "embodiment", default_value="", description="Embodiment YAML of the robot. Empty: the checkpoint's."
    ),
    DeclareLaunchArgument("checkpoint", default_value="", description="Checkpoint folder."),
    DeclareLaunchArgument("dry_run", default_value="true", description="Send nothing to the controllers."),
    DeclareLaunchArgument("recovery", default_value="manual", description="manual or automatic, after a fault."),
    DeclareLaunchArgument("compress", default_value="true", description="Take raw cameras' images compressed."),
    DeclareLaunchArgument("autostart", default_value="true", description="Configure and activate the policy."),
    DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal."),
]

PASSED_ON = ("namespace", "params_file", "checkpoint", "dry_run", "recovery", "autostart", "log_level")


def start_policy(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The policy, with the embodiment as it looks from here."""
    path = LaunchConfiguration("embodiment").perform(context)
    checkpoint = LaunchConfiguration("checkpoint").perform(context)
    if not path and not checkpoint:
        raise RuntimeError("which policy? Give checkpoint:=FOLDER")
    path = path or str(Path(checkpoint) / "embodiment.yaml")
    if LaunchConfiguration("compress").perform(context).lower() == "true":
        path = write_embodiment(over_network(Embodiment.load(path)))
    policy = IncludeLaunchDescription(
        PathJoinSubstitution([SHARE, "launch", "dit_policy.launch.py"]),
        launch_arguments=[*((name, LaunchConfiguration(name)) for name in PASSED_ON), ("embodiment", path)],
    )
    return [policy]


def write_embodiment(embodiment: Embodiment) -> str:
    """A temporary file, which stays as launch_ros's own parameter files do: the node may be started again."""
    with tempfile.NamedTemporaryFile("w", prefix=f"{embodiment.name}_", suffix=".yaml", delete=False) as file:
        file.write(embodiment.to_yaml())
    return file.name


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start_policy)])
