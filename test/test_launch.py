"""The launch files: their arguments, and, where launch_ros is, that they take the nodes up."""

import ast
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from policy_fixtures import demo_config, make_stats
from robot import wait_for

ROOT = Path(__file__).parents[1]
BLOCK = {
    "namespace", "params_file", "embodiment", "checkpoint", "dry_run", "recovery", "use_sim_time", "autostart",
    "log_level",
}  # fmt: skip
ARGUMENTS = {
    "dit_policy": BLOCK,
    "sim": BLOCK - {"dry_run", "recovery"},
    "robot": BLOCK | {"guard"},
    "robots": BLOCK - {"namespace", "use_sim_time"} | {"namespaces", "guard"},
    "robot_host": {"namespace", "params_file", "embodiment", "guard", "compress", "log_level"},
    "gpu_host": BLOCK - {"use_sim_time"} | {"compress"},
    "record": {"namespace", "embodiment", "output", "use_sim_time"},
}

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


def calls_in(name: str) -> list[ast.Call]:
    tree = ast.parse((ROOT / "launch" / f"{name}.launch.py").read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def declared(name: str) -> dict[str, ast.Call]:
    calls = [call for call in calls_in(name) if getattr(call.func, "id", "") == "DeclareLaunchArgument"]
    return {ast.literal_eval(call.args[0]): call for call in calls}


def default(call: ast.Call) -> object:
    """The default where it is a plain text, else its expression."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == "default_value"]
    return values[0].value if isinstance(values[0], ast.Constant) else values[0]


def test_every_file_is_known_here() -> None:
    assert {path.name.removesuffix(".launch.py") for path in (ROOT / "launch").glob("*.launch.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_declares_the_arguments_each_with_a_description(name: str) -> None:
    declarations = declared(name)
    assert set(declarations) == ARGUMENTS[name]
    for call in declarations.values():
        assert {keyword.arg for keyword in call.keywords} == {"default_value", "description"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_asks_for_declared_arguments_only(name: str) -> None:
    """A misspelt LaunchConfiguration is an error only when the file runs."""
    asked = [call.args[0] for call in calls_in(name) if getattr(call.func, "id", "") == "LaunchConfiguration"]
    names = {ast.literal_eval(argument) for argument in asked if isinstance(argument, ast.Constant)}
    assert names <= ARGUMENTS[name]
    assert names


@pytest.mark.parametrize("name", ["robot", "robots", "gpu_host"])
def test_real_arms_begin_with_a_dry_run_and_recover_by_hand(name: str) -> None:
    declarations = declared(name)
    assert default(declarations["dry_run"]) == "true"
    assert default(declarations["recovery"]) == "manual"


def test_parameters_of_a_real_arm_are_declared() -> None:
    from dit_policy_ros.nodes.parameters import DECLARATIONS

    content = yaml.safe_load((ROOT / "config" / "robot.yaml").read_text())
    policy = content["/**/dit_policy"]["ros__parameters"]
    assert policy.keys() <= {declaration.name for declaration in DECLARATIONS}
    assert policy["dry_run"] is True


@pytest.mark.ros
class TestWithLaunch:
    """With processes of their own, over DDS."""

    @pytest.fixture(autouse=True)
    def _needs_launch(self) -> None:
        pytest.importorskip(
            "launch_ros", reason="launch_ros is not here: it comes with a ROS installation, not as a wheel"
        )

    environment: Mapping[str, str] = {}

    @contextmanager
    def launched(self, name: str, log: Path, **arguments: object) -> Iterator[None]:
        pairs = [f"{key}:={value}" for key, value in arguments.items()]
        with log.open("w") as output:
            command = [sys.executable, "-c", LAUNCH, ROOT / "launch" / f"{name}.launch.py", *pairs]
            environment = {**os.environ, **self.environment}
            launch = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
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

    def test_robot_begins_with_a_dry_run_beside_a_guard(self, tmp_path: Path, checkpoint: Path) -> None:
        options = {"namespace": "/launch_robot", "checkpoint": checkpoint, "autostart": "false"}
        with self.launched("robot", tmp_path / "log", **options), ros_node() as node:
            values = parameters_of(node, "/launch_robot/dit_policy", "dry_run", "recovery", "checkpoint")
            assert values == [True, "manual", str(checkpoint)]
            values = parameters_of(node, "/launch_robot/dit_policy_guard", "embodiment", "timeout")
            assert values == [str(checkpoint / "embodiment.yaml"), 0.2]

    def test_robots_are_each_in_their_namespace(self, tmp_path: Path, checkpoint: Path) -> None:
        options = {"namespaces": "left,right", "checkpoint": f"{checkpoint.parent}/{{robot}}", "autostart": "false"}
        for name in ("left", "right"):
            (checkpoint.parent / name).symlink_to(checkpoint)
        with self.launched("robots", tmp_path / "log", **options), ros_node() as node:
            for name in ("left", "right"):
                assert parameters_of(node, f"/{name}/dit_policy", "checkpoint") == [str(checkpoint.parent / name)]
                expected = str(checkpoint.parent / name / "embodiment.yaml")
                assert parameters_of(node, f"/{name}/dit_policy_guard", "embodiment") == [expected]

    def test_gpu_host_sees_the_cameras_compressed(self, tmp_path: Path, checkpoint: Path) -> None:
        from dit_policy_ros.embodiment import Embodiment

        options = {"namespace": "/launch_gpu", "checkpoint": checkpoint, "autostart": "false"}
        with self.launched("gpu_host", tmp_path / "log", **options), ros_node() as node:
            path, dry_run = parameters_of(node, "/launch_gpu/dit_policy", "embodiment", "dry_run")
            assert dry_run is True
            cameras = Embodiment.load(path).cameras
            Path(path).unlink()
        assert {camera.transport for camera in cameras} == {"compressed"}
        assert "workspace_camera/image_raw/compressed" in {camera.topic for camera in cameras}

    def test_robot_host_compresses_each_raw_camera_once(self, tmp_path: Path) -> None:
        """image_transport is not here: a stand-in notes how it was started."""
        prefix = tmp_path / "prefix"
        (prefix / "share/ament_index/resource_index/packages").mkdir(parents=True)
        (prefix / "share/ament_index/resource_index/packages/image_transport").touch()
        (prefix / "share/image_transport").mkdir()
        note = tmp_path / "arguments"
        stand_in(prefix / "lib/image_transport/republish", note)
        self.environment = {"AMENT_PREFIX_PATH": f"{prefix}:{os.environ['AMENT_PREFIX_PATH']}"}
        embodiment = ROOT / "config/embodiments/sim_arm.yaml"
        options = {"namespace": "/left", "embodiment": embodiment, "guard": "false"}
        with self.launched("robot_host", tmp_path / "log", **options):
            wait_for(note.exists, "image_transport is started", 60)
        arguments = note.read_text().splitlines()
        topic = "/left/workspace_camera/image_raw"
        assert f"in:={topic}" in arguments
        assert f"out/compressed:={topic}/compressed" in arguments
        file = Path(arguments[arguments.index("--params-file") + 1])
        parameters = yaml.safe_load(file.read_text())["/left/compress_workspace"]["ros__parameters"]
        assert parameters[f"qos_overrides.{topic}.subscription.reliability"] == "best_effort"
        assert (parameters["in_transport"], parameters["out_transport"]) == ("raw", "compressed")

    def test_record_asks_for_exactly_the_embodiments_topics(self, tmp_path: Path) -> None:
        note = tmp_path / "arguments"
        stand_in(tmp_path / "bin/ros2", note)
        self.environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        with self.launched("record", tmp_path / "log", namespace="left", output=tmp_path / "bag"):
            wait_for(note.exists, "ros2 bag is started", 60)
        arguments = note.read_text().splitlines()
        topics = arguments.index("--topics") + 1
        assert arguments[:topics] == [
            "bag",
            "record",
            "--storage",
            "mcap",
            "--output",
            str(tmp_path / "bag"),
            "--topics",
        ]
        assert sorted(arguments[topics:]) == [
            "/left/arm_controller/joint_trajectory",
            "/left/instruction",
            "/left/joint_states",
            "/left/workspace_camera/image_raw",
            "/left/wrist_camera/image_raw/compressed",
        ]


def stand_in(path: Path, note: Path) -> None:
    """A program that writes its arguments, one a line, and ends."""
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {note}.new\nmv {note}.new {note}\n")
    path.chmod(0o755)


def parameters_of(node: Any, name: str, *names: str) -> list[Any]:
    """Values of another node's parameters, once it is there."""
    from rcl_interfaces.srv import GetParameters
    from rclpy.parameter import parameter_value_to_python

    client = node.create_client(GetParameters, f"{name}/get_parameters")
    wait_for(client.service_is_ready, f"{name} is there", 60)
    future = client.call_async(GetParameters.Request(names=names))
    wait_for(future.done, f"{name} answers")
    return [parameter_value_to_python(value) for value in future.result().values]


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
