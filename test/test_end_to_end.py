"""The whole line: simulator and policy node in two processes over DDS, and `make demo`'s program around them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed; make setup brings it")

import rclpy
from dit_policy_msgs.msg import ActionChunk, TrajectoryControllerState
from dit_policy_msgs.srv import ResetScene
from listener import Listener
from policy_fixtures import INSTRUCTIONS, demo_config, make_stats
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from dit_policy_ros.nodes import demo
from dit_policy_ros.nodes.demo_operator import DemoError, Operator
from dit_policy_ros.nodes.processes import Child
from dit_policy_ros.policy.checkpoint import save_checkpoint
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import make_tiny_clip
from dit_policy_ros.runtime.gate import Verdict
from dit_policy_ros.sim.scene import ARM_JOINTS

pytestmark = pytest.mark.ros

ROOT = Path(__file__).parents[1]
STATE = "arm_controller/controller_state"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, or while there is none an untrained one whose actions are small, so that all of them are safe."""
    if (ROOT / "checkpoints/demo/config.json").is_file():
        return ROOT / "checkpoints/demo"
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_clip(folder / "clip")
    config = demo_config(str(folder / "clip"), tasks=INSTRUCTIONS)
    stats = make_stats(config)
    stats["action"] = {"min": [-0.02] * 7, "max": [0.02] * 7, "mean": [0.0] * 7, "std": [0.01] * 7}
    embodiment = (ROOT / "config/embodiments/sim_arm.yaml").read_text()
    save_checkpoint(folder / "policy", MultitaskDiTPolicy(config, stats), embodiment, "a test's")
    return folder / "policy"


def arm(message: JointState, field: str = "position") -> np.ndarray:
    return np.array([getattr(message, field)[message.name.index(joint)] for joint in ARM_JOINTS])


@pytest.fixture
def nodes(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[Listener, Child, Child]]:
    """The two processes as the demo starts them, and a third party that listens."""
    with ExitStack() as stack:
        options = demo.parse([f"--checkpoint={checkpoint}", f"--output={tmp_path}"])
        simulator, policy = demo.children(options, stack)
        topics = {"joint_states": JointState, STATE: TrajectoryControllerState, "dit_policy/action_chunk": ActionChunk}
        listener = Listener(policy, topics)
        stack.callback(listener.close)
        listener.wait(lambda: listener.heard["joint_states"], "the simulator's joint states", 60)
        yield listener, simulator, policy


@pytest.mark.timeout(180)
def test_images_and_words_move_the_arm_and_deactivation_stops_it(nodes: tuple[Listener, Child, Child]) -> None:
    listener, simulator, policy = nodes
    chunks = listener.heard["dit_policy/action_chunk"]
    assert listener.transition("configure"), policy.last_lines()
    assert listener.call(ResetScene, "reset_scene", ResetScene.Request(seed=500_000)).success
    home = arm(listener.next("joint_states", 5)[-1])
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    instruction = listener.node.create_publisher(String, "instruction", latched)
    instruction.publish(String(data=INSTRUCTIONS[0]))
    assert listener.transition("activate")

    accepted = listener.wait(
        lambda: len(sent := [chunk for chunk in chunks if chunk.verdict == Verdict.ACCEPTED]) >= 3 and sent,
        "three chunks are sent",
    )
    for chunk in accepted:
        assert chunk.instruction == INSTRUCTIONS[0]
        assert len(chunk.positions) == chunk.steps * chunk.dims
        assert np.isfinite(chunk.positions).all()
    listener.wait(lambda: np.abs(arm(listener.heard["joint_states"][-1]) - home).max() > 0.01, "the arm moves")
    errors = [np.abs(state.error.positions).max() for state in listener.next(STATE, 50)]
    assert max(errors) < 0.15, "the arm follows the controller's reference (rad)"

    assert listener.transition("deactivate")
    sent = len(chunks)
    listener.wait(
        lambda: max(np.abs(arm(m, "velocity")).max() for m in listener.next("joint_states", 20)) < 0.02,
        "the arm comes to rest (rad/s)",
        5,
    )
    rest = arm(listener.heard["joint_states"][-1])
    # Longer than a chunk: nothing is left in the controller, and nothing more is sent.
    assert np.abs(arm(listener.next("joint_states", 170)[-1]) - rest).max() < 0.01
    assert len(chunks) == sent

    if os.environ.get("ROS_DISTRO") != "jazzy":  # its rclpy leaves an impossible request without an answer
        operator_hears_why_a_transition_fails((simulator, policy))
    for child, number in ((policy, signal.SIGTERM), (simulator, signal.SIGINT)):
        child.send(number)
        assert child.wait(20) == 0, child.last_lines()
        assert "Traceback" not in child.log.read_text()


def operator_hears_why_a_transition_fails(children: tuple[Child, Child]) -> None:
    """Configuring a configured node is refused."""
    rclpy.init()
    operator = Operator(children)
    try:
        with pytest.raises(DemoError, match=r"policy node did not configure(?s:.*)loaded"):
            operator.prepare()
    finally:
        operator.close()
        rclpy.shutdown()


def start_demo(output: Path, *options: str) -> Child:
    command = [sys.executable, "-m", "dit_policy_ros.nodes.demo", f"--output={output}", *options]
    return Child("demo", command, output / "demo.log")


@pytest.mark.timeout(240)
def test_the_demo_judges_reports_and_draws(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--episodes=1", "--video-episodes=0", "--seed=500007", "--parameter=n_action_steps=7"]
    run = start_demo(tmp_path, f"--checkpoint={checkpoint}", *options)
    status = run.wait(200)
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == (0 if report["holds"] else 1), run.last_lines()
    assert (report["episodes"], report["seeds"]) == (1, [500_007])
    assert report["parameters"] == ["n_action_steps:=7"]
    assert report["chunks"] > 0
    assert 0 < report["chunk_ms"]["p50"] <= report["chunk_ms"]["p95"]
    assert report["results"][0]["outcome"] in ("over the line", "moved another block", "time limit")
    assert report["results"][0]["instruction"] == INSTRUCTIONS[0]
    assert (tmp_path / "contact_sheet.png").stat().st_size > 10_000
    assert "push the red block over the line" in run.log.read_text()
    for log in ("simulator.log", "policy_node.log"):
        assert "Traceback" not in (tmp_path / log).read_text()


@pytest.mark.timeout(120)
def test_an_interrupted_demo_leaves_no_process_behind(checkpoint: Path, tmp_path: Path) -> None:
    run = start_demo(tmp_path, f"--checkpoint={checkpoint}")
    children: list[str] = []
    while len(children) < 2:
        run.check()
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.send(signal.SIGINT)
    assert run.wait(30) == 130
    assert "Traceback" not in run.log.read_text()
    assert "interrupted" in run.last_lines()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_a_parameter_that_the_node_does_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.parse(["--parameter=sampler=euler", "--parameter=dry_run=true"]).parameter == [
        "sampler:=euler",
        "dry_run:=true",
    ]
    for wrong in ("n_steps=4", "n_action_steps"):
        with pytest.raises(SystemExit):
            demo.parse([f"--parameter={wrong}"])
        assert f"'{wrong}' is no NAME=VALUE of a parameter of the policy node" in capsys.readouterr().err


def test_without_a_checkpoint_the_demo_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="make demo-train"):
        demo.run(demo.parse([f"--checkpoint={tmp_path}/none", f"--output={tmp_path}"]))
