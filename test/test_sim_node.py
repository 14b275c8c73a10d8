"""The simulator's node, as a process of its own over DDS; and its pacing, against a clock of our own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed; make setup brings it")

from action_msgs.msg import GoalStatus
from action_msgs.srv import CancelGoal
from dit_policy_msgs.msg import SceneState, TrajectoryControllerState
from dit_policy_msgs.srv import ResetScene
from listener import Listener
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from dit_policy_ros.embodiment import INTERFACES, Embodiment
from dit_policy_ros.nodes.controllers import follow_trajectory
from dit_policy_ros.nodes.conversions import trajectory_message
from dit_policy_ros.nodes.outlets import make_outlet
from dit_policy_ros.nodes.pacing import Due, Pacer
from dit_policy_ros.nodes.processes import Child
from dit_policy_ros.nodes.watchers import ControllerWatch
from dit_policy_ros.runtime.messages import decode_image, stamp_ns
from dit_policy_ros.runtime.trajectory import Point, Trajectory, plan
from dit_policy_ros.sim.scene import ARM_JOINTS, HOME, JOINTS

pytestmark = pytest.mark.ros

EMBODIMENT = Embodiment.load(Path(__file__).parents[1] / "config/embodiments/sim_arm.yaml")
CAMERAS = {camera.name: camera for camera in EMBODIMENT.cameras}
ACTION, _ = follow_trajectory()
ACTION_NAME = "arm_controller/follow_joint_trajectory"
TOPICS = {
    f"{ACTION_NAME}/_action/feedback": ACTION.Impl.FeedbackMessage,
    "workspace_camera/image_raw": Image,
    "wrist_camera/image_raw/compressed": CompressedImage,
    "joint_states": JointState,
    "arm_controller/controller_state": TrajectoryControllerState,
    "scene_state": SceneState,
}
HOME_NOISE = 0.021  # rad, by which a reset scatters the arm around home


def command(*parameters: str) -> list[str]:
    settings = [word for parameter in parameters for word in ("-p", parameter)]
    return [sys.executable, "-m", "dit_policy_ros.nodes.sim_node", "--ros-args", *settings]


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listener]:
    child = Child("simulator", command(), tmp_path_factory.mktemp("sim") / "log", {"OMP_NUM_THREADS": "1"})
    listener = Listener(child, TOPICS)
    try:
        for topic in set(TOPICS) - {f"{ACTION_NAME}/_action/feedback"}:
            listener.wait(lambda topic=topic: listener.heard[topic], f"the first message on {topic}", 60.0)
        yield listener
        child.send(signal.SIGINT)
        assert child.wait(10) == 0
        assert "Traceback" not in child.log.read_text()
    finally:
        listener.close()
        child.stop()


def positions(message: JointState) -> dict[str, float]:
    return dict(zip(message.name, message.position, strict=True))


def arm(message: JointState) -> np.ndarray:
    return np.array([positions(message)[joint] for joint in ARM_JOINTS])


def reset(simulator: Listener, seed: int) -> SceneState:
    """The first scene_state of the new scene."""
    assert simulator.call(ResetScene, "reset_scene", ResetScene.Request(seed=seed)).success
    return simulator.wait(
        lambda: (scene := simulator.heard["scene_state"][-1]).seed == seed and scene, f"the scene of seed {seed}"
    )


def test_cameras_publish_what_the_embodiment_says(simulator: Listener) -> None:
    for name, camera in CAMERAS.items():
        message = simulator.next(camera.topic)[0]
        image = decode_image(message, camera)
        assert message.header.frame_id == f"{name}_camera_optical_frame"
        assert image.shape == (camera.height, camera.width, 3)
        assert image.std() > 10, f"{name}: a picture, not one colour"


def test_streams_keep_their_rates(simulator: Listener) -> None:
    # By the median of the stamps' distances: on a busy machine the simulation may give up time now and then.
    for topic, count, period in (
        ("joint_states", 100, 0.01),
        ("workspace_camera/image_raw", 20, 1 / 15),
        ("wrist_camera/image_raw/compressed", 20, 1 / 15),
        ("arm_controller/controller_state", 50, 0.02),
        ("scene_state", 15, 0.1),
    ):
        stamps = [stamp_ns(message) for message in simulator.next(topic, count)]
        assert np.median(np.diff(stamps)) / 1e9 == pytest.approx(period, abs=0.006), topic
        assert min(np.diff(stamps)) > 0, topic


def test_joint_states_are_whole_and_in_an_order_of_their_own(simulator: Listener) -> None:
    message = simulator.next("joint_states")[0]
    assert set(message.name) == set(JOINTS)
    assert [name for name in message.name if name in ARM_JOINTS] != list(ARM_JOINTS)
    assert len(message.velocity) == len(JOINTS)
    assert len(message.effort) == 0


def test_the_arm_follows_a_trajectory_and_the_controller_says_how_well(simulator: Listener) -> None:
    reset(simulator, 3)
    goal = np.array(HOME) + 0.15
    simulator.move("arm_controller/joint_trajectory", ARM_JOINTS[::-1], goal[::-1], 0.5)
    arrived = simulator.wait(
        lambda: (
            np.allclose((state := simulator.heard["arm_controller/controller_state"][-1]).reference.positions, goal)
            and np.abs(state.error.positions).max() < 0.01
            and state
        ),
        "the arm arrives",
    )
    assert tuple(arrived.joint_names) == ARM_JOINTS
    difference = np.subtract(arrived.reference.positions, arrived.feedback.positions)
    assert np.allclose(difference, arrived.error.positions)
    assert np.allclose(arrived.output.positions, goal)
    assert np.abs(arm(simulator.next("joint_states")[0]) - goal).max() < 0.02


def test_the_gripper_has_its_own_controller(simulator: Listener) -> None:
    reset(simulator, 3)
    simulator.move("gripper_controller/joint_trajectory", ["panda_finger_joint1"], [0.03], 0.3)
    simulator.wait(
        lambda: abs(positions(simulator.heard["joint_states"][-1])["panda_finger_joint1"] - 0.03) < 0.002,
        "the finger opens",
    )


def trajectory(goal: np.ndarray, seconds: float) -> JointTrajectory:
    return trajectory_message(Trajectory(ARM_JOINTS, np.array([seconds]), goal[None]))


def now() -> int:
    return time.time_ns()


class Goal:
    """A goal of the arm's action, by the action's services."""

    def __init__(self, simulator: Listener, message: JointTrajectory) -> None:
        self._simulator = simulator
        self.id = uuid.uuid4().bytes
        request = ACTION.Impl.SendGoalService.Request(goal=ACTION.Goal(trajectory=message))
        request.goal_id.uuid = list(self.id)
        self.accepted = simulator.call(
            ACTION.Impl.SendGoalService, f"{ACTION_NAME}/_action/send_goal", request
        ).accepted

    def cancel(self) -> None:
        request = CancelGoal.Request()
        request.goal_info.goal_id.uuid = list(self.id)
        answer = self._simulator.call(CancelGoal, f"{ACTION_NAME}/_action/cancel_goal", request)
        assert [bytes(goal.goal_id.uuid) for goal in answer.goals_canceling] == [self.id]

    def result(self) -> tuple[int, int, str]:
        """Status, error_code and error_string, once the goal has ended."""
        request = ACTION.Impl.GetResultService.Request()
        request.goal_id.uuid = list(self.id)
        answer = self._simulator.call(ACTION.Impl.GetResultService, f"{ACTION_NAME}/_action/get_result", request)
        return answer.status, answer.result.error_code, answer.result.error_string


def under_way(simulator: Listener) -> None:
    simulator.wait(lambda: np.abs(arm(simulator.heard["joint_states"][-1]) - HOME).max() > 0.05, "the arm is under way")


def test_the_action_follows_a_goal_and_succeeds_at_its_end(simulator: Listener) -> None:
    reset(simulator, 3)
    goal = np.array(HOME) + 0.15
    sent = Goal(simulator, trajectory(goal, 0.5))
    assert sent.accepted
    assert sent.result() == (GoalStatus.STATUS_SUCCEEDED, 0, "")
    assert np.abs(arm(simulator.next("joint_states")[0]) - goal).max() < 0.05
    feedback = simulator.heard[f"{ACTION_NAME}/_action/feedback"][-1]
    assert bytes(feedback.goal_id.uuid) == sent.id
    assert tuple(feedback.feedback.joint_names) == ARM_JOINTS
    assert np.abs(np.array(feedback.feedback.desired.positions) - HOME).max() > 0.05


def test_the_action_refuses_what_the_topic_refuses(simulator: Listener) -> None:
    message = trajectory(np.array(HOME), 0.5)
    message.joint_names[0] = "elbow"
    assert not Goal(simulator, message).accepted
    assert "goal refused (unknown_joint)" in simulator.child.log.read_text()


def test_a_canceled_goal_stops_the_arm(simulator: Listener) -> None:
    reset(simulator, 3)
    sent = Goal(simulator, trajectory(np.array(HOME) + 0.4, 8.0))
    under_way(simulator)
    sent.cancel()
    assert sent.result()[0] == GoalStatus.STATUS_CANCELED
    assert np.abs(arm(simulator.next("joint_states", 100)[-1]) - HOME).max() < 0.38, "not arrived"


def test_a_newer_command_ends_the_goal(simulator: Listener) -> None:
    for newer in ("goal", "trajectory on a topic", "positions on a topic"):
        reset(simulator, 3)
        sent = Goal(simulator, trajectory(np.array(HOME) + 0.4, 8.0))
        under_way(simulator)
        if newer == "goal":
            assert Goal(simulator, trajectory(np.array(HOME), 0.5)).result()[0] == GoalStatus.STATUS_SUCCEEDED
        elif newer == "trajectory on a topic":
            simulator.move("arm_controller/joint_trajectory", ARM_JOINTS, HOME, 0.5)
        else:
            simulator.publish("arm_controller/commands", Float64MultiArray(data=list(HOME)))
        status, code, text = sent.result()
        assert (status, code) == (GoalStatus.STATUS_ABORTED, -1)
        assert newer in text


def test_a_target_out_of_range_aborts_the_goal(simulator: Listener) -> None:
    reset(simulator, 3)
    status, code, text = Goal(simulator, trajectory(np.array([*HOME[:6], 3.5]), 0.5)).result()
    assert (status, code) == (GoalStatus.STATUS_ABORTED, -4)
    assert "panda_joint7" in text


@pytest.mark.parametrize("interface", INTERFACES)
def test_the_policys_outlets_move_the_arm(simulator: Listener, interface: str) -> None:
    reset(simulator, 3)
    ends = {"trajectory": "joint_trajectory", "follow_joint_trajectory": "follow_joint_trajectory"}
    topic = f"arm_controller/{ends.get(interface, 'commands')}"
    outlet = make_outlet(simulator.node, replace(EMBODIMENT.action_groups[0], topic=topic, interface=interface), 100.0)
    watch = ControllerWatch(simulator.node, outlet)
    simulator.wait(outlet.listeners, "the controller")
    start = Point(0, arm(simulator.next("joint_states")[0]), np.zeros(7), np.zeros(7))
    goal = np.array(HOME) + 0.1
    outlet.send(plan(ARM_JOINTS, np.linspace(start.position, goal, 11)[1:], np.arange(1, 11) / 10, start), now(), start)
    assert outlet.flush(20.0)
    simulator.wait(lambda: np.abs(arm(simulator.heard["joint_states"][-1]) - goal).max() < 0.02, "the arm arrives")
    assert outlet.troubles() == []
    assert watch.check(now()) == []
    watch.close()
    outlet.close()


def test_positions_are_the_reference_at_once(simulator: Listener) -> None:
    reset(simulator, 3)
    goal = np.array(HOME) + 0.02
    simulator.publish("arm_controller/commands", Float64MultiArray(data=goal.tolist()))
    state = simulator.wait(
        lambda: (
            np.allclose((state := simulator.heard["arm_controller/controller_state"][-1]).reference.positions, goal)
            and state
        ),
        "the reference",
    )
    assert np.allclose(state.reference.velocities, 0)
    simulator.publish("arm_controller/commands", Float64MultiArray(data=[0.0]))
    simulator.wait(lambda: "positions refused (size_mismatch)" in simulator.child.log.read_text(), "a refusal")


def test_a_refused_trajectory_is_logged_and_moves_nothing(simulator: Listener) -> None:
    reset(simulator, 3)
    simulator.move("arm_controller/joint_trajectory", ARM_JOINTS[:1], [1.0], 0.2)
    simulator.wait(lambda: "trajectory refused" in simulator.child.log.read_text(), "the log says so")
    assert "1 joints, expected all 7" in simulator.child.log.read_text()
    assert np.abs(arm(simulator.next("joint_states", 30)[-1]) - HOME).max() < HOME_NOISE


def test_a_target_out_of_range_makes_the_arm_hold_and_the_node_lives(simulator: Listener) -> None:
    reset(simulator, 3)
    simulator.move("arm_controller/joint_trajectory", ARM_JOINTS, [*HOME[:6], 3.5], 0.5)
    simulator.wait(lambda: "trajectory dropped" in simulator.child.log.read_text(), "the log says why")
    assert arm(simulator.next("joint_states", 30)[-1])[6] < 2.9


def test_reset_gives_the_seeds_scene_and_drops_the_motion(simulator: Listener) -> None:
    first = reset(simulator, 7)
    simulator.move("arm_controller/joint_trajectory", ARM_JOINTS, np.array(HOME) + 0.3, 1.0)
    simulator.wait(lambda: np.abs(arm(simulator.heard["joint_states"][-1]) - HOME).max() > 0.1, "the arm is under way")
    other = reset(simulator, 8)
    again = reset(simulator, 7)
    assert list(first.blocks) == ["red", "green", "blue"]
    assert np.allclose([first.x, first.y, first.yaw], [again.x, again.y, again.yaw], atol=1e-3)
    assert not np.allclose([first.x, first.y], [other.x, other.y], atol=1e-2)
    assert max(again.displacement) < 1e-3
    assert not any(again.over_line)
    # The trajectory would have gone on for most of this second.
    assert np.abs([arm(m) - HOME for m in simulator.next("joint_states", 100)[5:]]).max() < HOME_NOISE


def test_blank_images_are_black_while_the_parameter_is_set(simulator: Listener) -> None:
    camera = CAMERAS["workspace"]

    def brightness() -> int:
        return int(decode_image(simulator.next(camera.topic)[0], camera).max())

    assert simulator.set_parameter("simulator", "blank_images", True).successful
    simulator.wait(lambda: brightness() == 0, "black images")
    assert decode_image(simulator.next(CAMERAS["wrist"].topic, 2)[1], CAMERAS["wrist"]).max() == 0
    assert simulator.set_parameter("simulator", "blank_images", False).successful
    simulator.wait(lambda: brightness() > 0, "pictures again")


def test_what_is_fixed_at_start_cannot_be_set(simulator: Listener) -> None:
    assert not simulator.set_parameter("simulator", "camera_rate", 5.0).successful


OTHER_ROBOT = """<mujoco model="crane"><worldbody>
  <body><joint name="swing" range="-1 1"/><geom size="0.1" pos="0.3 0 0"/>
    <body pos="0.5 0 0"><joint name="lift" type="slide" range="-1 1"/><geom size="0.1"/></body></body></worldbody>
  <actuator><position joint="swing" kp="10"/><position joint="lift" kp="100"/></actuator></mujoco>"""


def test_another_robot_on_simulated_time_until_sigterm(tmp_path: Path) -> None:
    (tmp_path / "crane.xml").write_text(OTHER_ROBOT)
    parameters = command(f"model:={tmp_path}/crane.xml", "publish_clock:=true")
    child = Child("simulator", [*parameters, "-r", "__ns:=/crane"], tmp_path / "log", {"OMP_NUM_THREADS": "1"})
    listener = Listener(child, {"/clock": Clock, "joint_states": JointState}, "/crane")
    try:
        message = listener.wait(
            lambda: listener.heard["joint_states"] and listener.next("joint_states")[0], "joints", 60
        )
        assert set(message.name) == {"swing", "lift"}
        clock = [tick.clock.sec * 10**9 + tick.clock.nanosec for tick in listener.next("/clock", 50)]
        assert set(np.diff(clock)) <= {10_000_000, 20_000_000, 30_000_000}, "10 ms a tick, but for lost messages"
        assert abs(stamp_ns(listener.next("joint_states")[0]) - clock[-1]) < 1e9, "stamped with the simulated time"
        child.send(signal.SIGTERM)
        assert child.wait(10) == 0
        log = child.log.read_text()
        assert "no camera 'wrist'" in log
        assert "Traceback" not in log
    finally:
        listener.close()
        child.stop()


def test_what_cannot_start_says_so_in_one_line() -> None:
    cases = {"model:=/no/such/robot.xml": "/no/such/robot.xml", "joint_state_rate:=70.0": "joint_state_rate 70.0 Hz"}
    runs = {parameter: subprocess.Popen(command(parameter), stderr=subprocess.PIPE, text=True) for parameter in cases}
    for parameter, run in runs.items():
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 1
        assert cases[parameter] in errors
        assert len(errors.splitlines()) == 1


class FakeClock:
    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


def test_the_pacer_does_not_drift_and_catches_up_short_delays() -> None:
    clock = FakeClock()
    pacer = Pacer(10_000_000, clock)
    began = clock.now
    for tick in range(1, 101):
        clock.now += 25_000_000 if tick == 50 else 3_000_000  # one tick takes two and a half periods
        assert pacer.next(clock.sleep) == 0
    assert clock.now - began == 100 * 10_000_000
    assert pacer.lost_ns == 0


def test_the_pacer_gives_a_long_delay_up_and_counts_it() -> None:
    clock = FakeClock()
    pacer = Pacer(10_000_000, clock)
    clock.now += 500_000_000
    assert pacer.next(clock.sleep) == 490_000_000
    assert pacer.lost_ns == 490_000_000
    assert pacer.lag_ns == 0
    before = clock.now
    assert pacer.next(clock.sleep) == 0
    assert clock.now - before == 10_000_000, "no burst after it"


@pytest.mark.parametrize(("rate", "phase"), [(15.0, 0.0), (15.0, 0.4), (100.0, 0.0), (50.0, 0.9), (7.0, 0.0)])
def test_due_is_exact_in_the_long_run_and_even(rate: float, phase: float) -> None:
    due = Due(rate, 100.0, phase)
    ticks = [tick for tick in range(1000) if due()]
    assert len(ticks) == pytest.approx(rate * 10, abs=1)
    assert max(np.diff(ticks)) - min(np.diff(ticks)) <= 1


def test_ticks_wake_up_for_a_signal() -> None:
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    pacer = Pacer(10_000_000_000)
    pacer.next(stop.wait)
    assert pacer.lag_ns < -5_000_000_000, "it did not sleep its 10 s"
