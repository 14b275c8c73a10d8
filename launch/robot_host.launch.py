"""On the robot's computer, when the policy runs on another one: the guard, and the cameras' images compressed.

    ros2 launch dit_policy_ros robot_host.launch.py embodiment:=my_robot.yaml namespace:=left

The other computer runs gpu_host.launch.py with the same embodiment and namespace; docs/deployment.md says what both
need. The guard is on this side, so that it stops the arm when the network fails.
"""

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from dit_policy_ros.deployment import compressed_topic, resolve
from dit_policy_ros.embodiment import Camera, Embodiment

ARGUMENTS = [
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of nodes and robot topics."),
    DeclareLaunchArgument(
        "params_file",
        default_value=PathJoinSubstitution([FindPackageShare("dit_policy_ros"), "config", "robot.yaml"]),
        description="YAML file of parameters, of which the guard's are used.",
    ),
    DeclareLaunchArgument("embodiment", default_value="", description="Embodiment YAML of the robot."),
    DeclareLaunchArgument("guard", default_value="true", description="Start the guard."),
    DeclareLaunchArgument("compress", default_value="true", description="Compress the images of each raw camera."),
    DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal."),
]


def compressor(camera: Camera, namespace: str) -> Node:
    """image_transport's republish for one raw camera; JPEG at image_transport's default quality."""
    topic = resolve(camera.topic, namespace)
    parameters = {
        "in_transport": "raw",
        "out_transport": "compressed",
        # Cameras publish best effort, which its reliable default would not match.
        f"qos_overrides.{topic}.subscription.reliability": "best_effort",
    }
    return Node(
        package="image_transport",
        executable="republish",
        name=f"compress_{camera.name}",
        namespace=LaunchConfiguration("namespace"),
        parameters=[parameters],
        remappings=[("in", topic), ("out/compressed", compressed_topic(topic))],
        output="screen",
    )


def start_nodes(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The guard and a compressor for each raw camera."""
    path = LaunchConfiguration("embodiment").perform(context)
    if not path:
        raise RuntimeError(
            "embodiment:=FILE is missing: the description of the robot's cameras, joints and controllers"
        )
    embodiment = Embodiment.load(path)
    namespace = LaunchConfiguration("namespace").perform(context)
    guard = Node(
        package="dit_policy_ros",
        executable="guard_node",
        name="dit_policy_guard",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), {"embodiment": ParameterValue(path, value_type=str)}],
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        output="screen",
        condition=IfCondition(LaunchConfiguration("guard")),
    )
    compress = IfCondition(LaunchConfiguration("compress")).evaluate(context)
    raw = [camera for camera in embodiment.cameras if camera.transport == "raw" and compress]
    return [guard, *(compressor(camera, namespace) for camera in raw)]


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start_nodes)])
