"""Records a demonstration: `ros2 bag record` of exactly the topics that the embodiment names, into one bag.

    ros2 launch dit_policy_ros record.launch.py embodiment:=my_robot.yaml output:=bags/episode_017

End it with Ctrl-C; one bag is one episode. What it holds is what `dit_policy_training.convert` reads.
"""

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

from dit_policy_ros.deployment import record_command
from dit_policy_ros.embodiment import Embodiment

ARGUMENTS = [
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of the robot's topics."),
    DeclareLaunchArgument(
        "embodiment",
        default_value=PathJoinSubstitution(
            [FindPackageShare("dit_policy_ros"), "config", "embodiments", "sim_arm.yaml"]
        ),
        description="Embodiment YAML of the robot.",
    ),
    DeclareLaunchArgument("output", default_value="", description="Folder of the bag. Empty: named by the time."),
    DeclareLaunchArgument("use_sim_time", default_value="false", description="Stamp the bag with the time of /clock."),
]


def start_recording(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The recorder, of the embodiment's topics below the namespace."""
    values = {name: LaunchConfiguration(name).perform(context) for name in ("embodiment", "namespace", "output")}
    use_sim_time = LaunchConfiguration("use_sim_time").perform(context).lower() == "true"
    embodiment = Embodiment.load(values["embodiment"])
    command = record_command(embodiment, values["namespace"], values["output"], use_sim_time)
    return [ExecuteProcess(cmd=command, name="record", output="screen")]


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start_recording)])
