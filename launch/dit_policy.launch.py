"""Starts the policy node and, with `autostart`, configures and activates it.

    ros2 launch dit_policy_ros dit_policy.launch.py checkpoint:=/path/to/checkpoint namespace:=left

The other launch files include this one. For an arm that moves take robot.launch.py: it begins with a dry run, and
starts the guard.

The transitions are asked for by events, which the launch_ros of Jazzy and of Kilted both have;
`LifecycleNode(autostart=...)` came after Jazzy.
"""

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, RegisterEventHandler
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessStart
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import Transition

DEFAULT_PARAMETERS = PathJoinSubstitution([FindPackageShare("dit_policy_ros"), "config", "dit_policy.yaml"])

ARGUMENTS = [
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of node and robot topics."),
    DeclareLaunchArgument("params_file", default_value=DEFAULT_PARAMETERS, description="YAML file of parameters."),
    DeclareLaunchArgument(
        "embodiment", default_value="", description="Embodiment YAML of the robot. Empty: as params_file says."
    ),
    DeclareLaunchArgument("checkpoint", default_value="", description="Checkpoint folder. Empty: as params_file says."),
    DeclareLaunchArgument(
        "dry_run",
        default_value="",
        description="Do everything but send to the controllers. Empty: as params_file says.",
    ),
    DeclareLaunchArgument(
        "recovery", default_value="", description="manual or automatic, after a fault. Empty: as params_file says."
    ),
    DeclareLaunchArgument("use_sim_time", default_value="false", description="Take the time from /clock."),
    DeclareLaunchArgument("autostart", default_value="true", description="Configure and activate the node."),
    DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal."),
]


def start_node(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The node, and the handlers that take it to active."""
    # An argument left empty must not override the parameter file with an empty text.
    kinds = {"embodiment": str, "checkpoint": str, "recovery": str, "dry_run": bool}
    arguments = {name: LaunchConfiguration(name) for name in kinds}
    given = {name: value for name, value in arguments.items() if value.perform(context)}
    overrides = {name: ParameterValue(value, value_type=kinds[name]) for name, value in given.items()}
    overrides["use_sim_time"] = ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool)
    node = LifecycleNode(
        package="dit_policy_ros",
        executable="policy_node",
        name="dit_policy",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), overrides],
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        output="screen",
    )

    def ask(transition: int) -> EmitEvent:
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition))

    autostart = IfCondition(LaunchConfiguration("autostart"))
    configure = OnProcessStart(target_action=node, on_start=[ask(Transition.TRANSITION_CONFIGURE)])
    # From configuring only: a node that somebody deactivates stays inactive.
    activate = OnStateTransition(
        target_lifecycle_node=node,
        start_state="configuring",
        goal_state="inactive",
        entities=[ask(Transition.TRANSITION_ACTIVATE)],
    )
    return [
        RegisterEventHandler(configure, condition=autostart),
        RegisterEventHandler(activate, condition=autostart),
        node,
    ]


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start_node)])
