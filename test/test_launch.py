"""The launch files: their arguments, and, where launch_ros is, that they take the nodes up."""

import ast
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from policy_fixtures import demo_config, make_stats
from robot import wait_for

ROOT = Path(__file__).parents[1]
ARGUMENTS = {"namespace", "params_file", "embodiment", "checkpoint", "use_sim_time", "autostart", "log_level"}
FILES = ("dit_policy", "sim")

# What `ros2 launch` does with a file, without ros2cli.
LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
file, *arguments = sys.argv[1:]
service = LaunchService(noninteractive=True)
source = PythonLaunchDescriptionSource(file)
pairs = [argument.split(":=", 1) for argument in arguments]
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(source, launch_arguments=pairs)]))
sys.exit(service.run())
"""


@pytest.mark.parametrize("name", FILES)
def test_declares_the_arguments_each_with_a_description(name: str) -> None:
    tree = ast.parse((ROOT / "launch" / f"{name}.launch.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    declarations = [call for call in calls if getattr(call.func, "id", "") == "DeclareLaunchArgument"]
    assert {ast.literal_eval(call.args[0]) for call in declarations} == ARGUMENTS
    for call in declarations:
        assert {keyword.arg for keyword in call.keywords} == {"default_value", "description"}


@pytest.mark.ros
class TestWithLaunch:
    """With processes of their own, over DDS."""

    @pytest.fixture(autouse=True)
    def _needs_launch(self) -> None:
        pytest.importorskip(
            "launch_ros", reason="launch_ros is not here: it comes with a ROS installation, not as a wheel"
        )

    @contextmanager
    def launched(self, name: str, log: Path, **arguments: object) -> Iterator[None]:
        pairs = [f"{key}:={value}" for key, value in arguments.items()]
        with log.open("w") as output:
            command = [sys.executable, "-c", LAUNCH, ROOT / "launch" / f"{name}.launch.py", *pairs]
            launch = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            try:
                yield
            except AssertionError as failure:
                raise AssertionError(f"{failure}\n{log.read_text()}") from failure
            finally:
                launch.send_signal(signal.SIGINT)  # at SIGTERM it would leave its nodes behind
                launch.wait(30)

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        from dit_policy_ros.policy.checkpoint import save_checkpoint
        from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
        from dit_policy_ros.policy.tiny_clip import make_tiny_clip

        make_tiny_clip(tmp_path / "clip")
        config = demo_config(str(tmp_path / "clip"), n_obs_steps=2)
        policy = MultitaskDiTPolicy(config, make_stats(config))
        embodiment = (ROOT / "config/embodiments/sim_arm.yaml").read_text()
        save_checkpoint(tmp_path / "policy", policy, embodiment, "a test's")
        return tmp_path / "policy"

    @pytest.mark.parametrize(("autostart", "expected"), [("true", "active"), ("false", "unconfigured")])
    def test_policy_comes_up_as_told(self, tmp_path: Path, checkpoint: Path, autostart: str, expected: str) -> None:
        from lifecycle_msgs.srv import GetState

        namespace = f"/launch_{autostart}"
        options = {"namespace": namespace, "checkpoint": checkpoint, "autostart": autostart}
        with self.launched("dit_policy", tmp_path / "log", **options), ros_node() as node:
            client = node.create_client(GetState, f"{namespace}/dit_policy/get_state")
            wait_for(client.service_is_ready, "the node's services", 60)

            def state() -> str:
                future = client.call_async(GetState.Request())
                wait_for(future.done, "an answer of get_state")
                return str(future.result().current_state.label)

            wait_for(lambda: state() == expected, f"the state {expected}", 60)

    def test_simulator_alone_publishes_joint_states_and_clock(self, tmp_path: Path) -> None:
        from rclpy.qos import qos_profile_sensor_data
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import JointState

        seen: set[str] = set()
        options = {"namespace": "/launch_sim", "checkpoint": "", "use_sim_time": "true"}
        with self.launched("sim", tmp_path / "log", **options), ros_node() as node:
            quality = qos_profile_sensor_data
            node.create_subscription(JointState, "/launch_sim/joint_states", lambda _: seen.add("joints"), quality)
            node.create_subscription(Clock, "/clock", lambda _: seen.add("clock"), quality)
            wait_for(lambda: seen == {"joints", "clock"}, "joint states and the clock", 60)


@contextmanager
def ros_node() -> Iterator[Any]:
    """A node that spins in a thread of its own until the block ends."""
    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("launch_test", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)

    def spin() -> None:
        with suppress(ExternalShutdownException):
            executor.spin()

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield node
    finally:
        executor.shutdown()
        rclpy.shutdown(context=context)
        thread.join()
