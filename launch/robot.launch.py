"""Starts the policy and the guard for a real arm. It begins with a dry run: everything is done but sending to the arm.

    ros2 launch dit_policy_ros robot.launch.py checkpoint:=/path/to/checkpoint embodiment:=my_robot.yaml
    ros2 param set /dit_policy dry_run false        # once the predicted motion is what you want

docs/safety.md says what to look at before that. The guard stops the arm if the policy's process is lost; with the
policy on another computer start robot_host.launch.py and gpu_host.launch.py instead.
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

SHARE = FindPackageShare("dit_policy_ros")

ARGUMENTS = [
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of nodes and robot topics."),
    DeclareLaunchArgument(
        "params_file",
        default_value=PathJoinSubstitution([SHARE, "config", "robot.yaml"]),
        description="YAML file of parameters, the policy's and the guard's.",
    ),
    DeclareLaunchArgument(
        "embodiment", default_value="", description="Embodiment YAML of the robot. Empty: the checkpoint's."
    ),
    DeclareLaunchArgument("checkpoint", default_value="", description="Checkpoint folder."),
    DeclareLaunchArgument("dry_run", default_value="true", description="Send nothing to the controllers."),
    DeclareLaunchArgument("recovery", default_value="manual", description="manual or automatic, after a fault."),
    DeclareLaunchArgument("guard", default_value="true", description="Start the guard in a process of its own."),
    DeclareLaunchArgument("use_sim_time", default_value="false", description="Take the time from /clock."),
    DeclareLaunchArgument("autostart", default_value="true", description="Configure and activate the policy."),
    DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal."),
]

PASSED_ON = (
    "namespace", "params_file", "embodiment", "checkpoint", "dry_run", "recovery", "use_sim_time", "autostart",
    "log_level",
)  # fmt: skip


def start_guard(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The guard, for the embodiment that the policy will use."""
    embodiment = LaunchConfiguration("embodiment").perform(context)
    checkpoint = LaunchConfiguration("checkpoint").perform(context)
    if not embodiment and not checkpoint:
        raise RuntimeError("the guard needs to know the robot: give embodiment:=FILE or checkpoint:=FOLDER")
    parameters = {
        "embodiment": ParameterValue(embodiment or str(Path(checkpoint) / "embodiment.yaml"), value_type=str),
        "use_sim_time": ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool),
    }
    guard = Node(
        package="dit_policy_ros",
        executable="guard_node",
        name="dit_policy_guard",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), parameters],
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        output="screen",
    )
    return [guard]


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    policy = IncludeLaunchDescription(
        PathJoinSubstitution([SHARE, "launch", "dit_policy.launch.py"]),
        launch_arguments=[(name, LaunchConfiguration(name)) for name in PASSED_ON],
    )
    guard = OpaqueFunction(function=start_guard, condition=IfCondition(LaunchConfiguration("guard")))
    return LaunchDescription([*ARGUMENTS, guard, policy])
