"""Starts the simulated arm and the policy that drives it, that of the demo unless another checkpoint is given.

    ros2 launch dit_policy_ros sim.launch.py
    ros2 service call /dit_policy/set_instruction dit_policy_msgs/srv/SetInstruction \\
        "{instruction: push the red block over the line}"

With `use_sim_time` the simulator publishes /clock and the policy follows it. After a fault the arm starts again by
itself: nobody stands beside it.
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution, PythonExpression
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

SHARE = FindPackageShare("dit_policy_ros")

ARGUMENTS = [
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of nodes and topics."),
    DeclareLaunchArgument(
        "params_file",
        default_value=PathJoinSubstitution([SHARE, "config", "sim.yaml"]),
        description="YAML file of parameters, the simulator's and, where it names them, the policy's.",
    ),
    DeclareLaunchArgument(
        "embodiment",
        default_value=PathJoinSubstitution([SHARE, "config", "embodiments", "sim_arm.yaml"]),
        description="Embodiment YAML of the arm.",
    ),
    DeclareLaunchArgument(
        "checkpoint",
        default_value=PathJoinSubstitution([SHARE, "checkpoints", "demo"]),
        description="Checkpoint folder. Empty: the simulator alone.",
    ),
    DeclareLaunchArgument("use_sim_time", default_value="false", description="Publish and follow /clock."),
    DeclareLaunchArgument("autostart", default_value="true", description="Configure and activate the policy."),
    DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal."),
]


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    publish_clock = ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool)
    simulator = Node(
        package="dit_policy_ros",
        executable="sim_node",
        name="simulator",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), {"publish_clock": publish_clock}],
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        output="screen",
    )
    passed_on = ("namespace", "params_file", "embodiment", "checkpoint", "use_sim_time", "autostart", "log_level")
    policy = IncludeLaunchDescription(
        PathJoinSubstitution([SHARE, "launch", "dit_policy.launch.py"]),
        launch_arguments=[*((name, LaunchConfiguration(name)) for name in passed_on), ("recovery", "automatic")],
        condition=IfCondition(PythonExpression(["'", LaunchConfiguration("checkpoint"), "' != ''"])),
    )
    return LaunchDescription([*ARGUMENTS, simulator, policy])
