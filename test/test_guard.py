"""The guard as a process of its own: it stops a moving arm whose policy node is gone, and leaves every other alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed; make setup brings it")

import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from dit_policy_msgs.msg import Heartbeat as HeartbeatMessage
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from robot import wait_for
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.nodes.controllers import GUARD
from dit_policy_ros.nodes.conversions import trajectory_message
from dit_policy_ros.nodes.declaration import table
from dit_policy_ros.nodes.guard_node import DECLARATIONS
from dit_policy_ros.nodes.processes import Child
from dit_policy_ros.runtime.heartbeat import Heartbeat
from dit_policy_ros.runtime.trajectory import Trajectory
from dit_policy_ros.sim.trajectory_controller import TrajectoryController

ROOT = Path(__file__).parents[1]
EMBODIMENT_FILE = ROOT / "config/embodiments/sim_arm.yaml"
EMBODIMENT = Embodiment.load(EMBODIMENT_FILE)
GROUP = EMBODIMENT.action_groups[0]
JOINTS = tuple(GROUP.joints)
HOME = np.array([0.0, -0.5, 0.0, -1.5, 0.0, 1.5, 0.0])
TIMEOUT = 1.0  # s; longer than on a robot, since the machine that runs the tests may stop for a while
PERIOD = 0.02  # s
WAY, DURATION = 0.8, 6.0  # rad and s of a motion from one side to the other: long enough to be stopped on the way
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class Arm:
    """A controller and its arm, which follows exactly, at 50 Hz; and a policy node's heartbeat beside it."""

    def __init__(self) -> None:
        self._context = Context()
        rclpy.init(context=self._context)
        self.node = Node("arm", context=self._context)
        self.controller = TrajectoryController(JOINTS, interpolate_from_desired_state=True)
        self.refused: list[str] = []
        self.stops: list[JointTrajectory] = []
        self.statuses: list[DiagnosticStatus] = []
        self.position, self.velocity = HOME.copy(), np.zeros(len(JOINTS))
        self.fastest = 0.0  # rad/s, since the latest stop came
        self.reports, self.finite, self.sane = True, True, True
        self.alive, self.moving = True, False
        self.last_word: JointTrajectory | None = None  # sent in the third period without a heartbeat
        self._sequence, self._silent = 0, 0
        self._joint_states = self.node.create_publisher(JointState, EMBODIMENT.state.topic, 10)
        self._heartbeats = self.node.create_publisher(HeartbeatMessage, "dit_policy/heartbeat", 10)
        self._commands = self.node.create_publisher(JointTrajectory, GROUP.topic, 10)
        self.node.create_subscription(JointTrajectory, GROUP.topic, self._follow, 10)
        self.node.create_subscription(DiagnosticStatus, f"{GUARD}/status", self.statuses.append, LATCHED)
        self.node.create_timer(PERIOD, self._tick)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._running = True
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._running = False
        self._thread.join()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    def _spin(self) -> None:
        while self._running:
            self._executor.spin_once(timeout_sec=0.05)

    def _follow(self, message: JointTrajectory) -> None:
        rejection = self.controller.receive(message, self.node.get_clock().now().nanoseconds)
        if rejection is not None:
            self.refused.append(rejection.reason)
        if message.header.frame_id == GUARD:
            self.fastest = 0.0
            self.stops.append(message)

    def _tick(self) -> None:
        now = self.node.get_clock().now()
        self.position, self.velocity, _ = self.controller.update(now.nanoseconds, self.position, self.velocity)
        self.fastest = max(self.fastest, float(np.abs(self.velocity).max()))
        if self.reports:
            values = self.position if self.finite else np.full(len(JOINTS), np.nan)
            velocity = self.velocity if self.sane else self.velocity + 60.0
            message = JointState(name=list(JOINTS), position=values.tolist(), velocity=velocity.tolist())
            message.header.stamp = now.to_msg()
            self._joint_states.publish(message)
        self._silent = 0 if self.alive else self._silent + 1
        if self._silent == 3 and self.last_word is not None:
            self._commands.publish(self.last_word)
            self.last_word = None
        if self.alive:
            self._sequence += 1
            self._heartbeats.publish(HeartbeatMessage(sequence=self._sequence, moving=self.moving, period=PERIOD))

    def command(self) -> JointTrajectory:
        """The first joint to the other side, at 0.2 rad/s at most."""
        goal = HOME.copy()
        goal[0] = -WAY / 2 if self.position[0] > 0 else WAY / 2
        positions, times = np.stack([self.position, goal]), np.array([0.2, DURATION])
        trajectory = Trajectory(JOINTS, times, positions, np.zeros_like(positions))
        return trajectory_message(trajectory)

    def under_way(self) -> None:
        """Command it, and wait until it is fast."""
        self._commands.publish(self.command())
        wait_for(lambda: abs(self.velocity[0]) > 0.05, "the arm moves")

    def value(self, key: str) -> str:
        """Of the guard's newest status."""
        values = self.statuses[-1].values if self.statuses else []
        return next((pair.value for pair in values if pair.key == key), "")

    def begin(self) -> None:
        """Everything in order again, the arm at rest, the guard armed."""
        self.reports = self.finite = self.sane = self.alive = True
        self.moving = False
        wait_for(lambda: np.abs(self.velocity).max() == 0, "the arm is at rest")
        wait_for(lambda: self.value("heartbeat") == "alive", f"the guard hears the heartbeat: {self.statuses[-1:]}")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Arm, Child]]:
    command = [sys.executable, "-m", "dit_policy_ros.nodes.guard_node", "--ros-args"]
    command += ["-p", f"embodiment:={EMBODIMENT_FILE}", "-p", f"timeout:={TIMEOUT}"]
    arm = Arm()
    child = Child("guard", command, tmp_path_factory.mktemp("guard") / "log")
    try:
        yield arm, child
        assert child.stop() == 0
        assert "Traceback" not in child.log.read_text()
        assert not arm.refused, "the controller refused a stop"
    finally:
        arm.close()
        child.stop()


@pytest.fixture
def arm(guarded: tuple[Arm, Child]) -> Arm:
    arm, child = guarded
    wait_for(lambda: child.check() or arm.statuses, "the guard's status", 60.0)
    arm.begin()
    arm.stops.clear()
    return arm


def lose(arm: Arm) -> None:
    """The heartbeat ends; until the guard has seen that."""
    arm.alive = False
    wait_for(lambda: arm.value("heartbeat") == "lost", "the guard misses the heartbeat")


def no_more_of_it(arm: Arm) -> None:
    """Two more of the guard's reports, each a second after the other: it has looked a hundred times."""
    seen = len(arm.statuses)
    wait_for(lambda: len(arm.statuses) >= seen + 2, "two more reports")


@pytest.mark.ros
class TestGuard:
    def test_stops_a_moving_arm_once_within_limits_and_says_so(self, arm: Arm) -> None:
        arm.moving = True
        arm.under_way()
        lose(arm)
        wait_for(lambda: arm.stops and np.abs(arm.velocity).max() == 0, "the arm is at rest")
        assert abs(arm.position[0]) < WAY / 2 - 0.05, "stopped on its way, not arrived"
        assert arm.fastest < 0.3, "not thrown"
        assert arm.statuses[-1].level == DiagnosticStatus.ERROR
        assert "'arm' was stopped from where it is measured" in arm.statuses[-1].message
        no_more_of_it(arm)
        assert len(arm.stops) == 1, "one stop for one loss"
        losses = int(arm.value("losses_while_moving"))
        arm.begin()
        arm.moving = True
        arm.under_way()
        lose(arm)
        wait_for(lambda: len(arm.stops) == 2, "a second stop for a second loss")
        assert int(arm.value("losses_while_moving")) == losses + 1

    def test_leaves_an_arm_alone_whose_node_ended_cleanly(self, arm: Arm) -> None:
        arm.moving = True
        arm.under_way()
        wait_for(lambda: arm.statuses[-1].message == "the arm moves", "the guard has heard of it")
        arm.moving = False
        wait_for(lambda: arm.statuses[-1].message == "the arm rests", "the guard has heard the last heartbeat")
        lose(arm)
        arm.under_way()  # somebody else's, long after the policy node
        no_more_of_it(arm)
        assert not arm.stops
        assert "the arm was at rest" in arm.statuses[-1].message

    def test_does_not_command_an_arm_that_rests(self, arm: Arm) -> None:
        arm.moving = True
        no_more_of_it(arm)
        lose(arm)
        no_more_of_it(arm)
        assert not arm.stops
        assert "'arm' rests" in arm.value("last_loss")

    def test_a_command_after_the_last_heartbeat_counts_as_motion(self, arm: Arm) -> None:
        arm.last_word = arm.command()
        arm.alive = False
        wait_for(lambda: arm.stops, "a stop")

    @pytest.mark.parametrize("spoil", ["reports", "finite", "sane"])
    def test_stops_from_where_the_arm_was_told_to_be_if_it_cannot_be_measured(self, arm: Arm, spoil: str) -> None:
        arm.moving = True
        arm.under_way()
        setattr(arm, spoil, False)
        lose(arm)
        wait_for(lambda: arm.stops and np.abs(arm.velocity).max() == 0, "the arm is at rest")
        assert arm.fastest < 0.3, "not thrown"
        assert "from where it was told to be, since topic 'joint_states'" in arm.value("last_loss")

    def test_says_so_if_it_can_make_no_stop(self, arm: Arm) -> None:
        arm.reports, arm.moving = False, True
        # The stop before this test was the last word of its group, so that no command is known.
        arm.under_way()
        lose(arm)
        wait_for(lambda: arm.stops, "a stop from the command")
        arm.begin()
        arm.stops.clear()
        arm.reports, arm.moving = False, True
        no_more_of_it(arm)
        lose(arm)
        assert "'arm' cannot be stopped: " in arm.value("last_loss")
        assert not arm.stops


def test_loads_neither_torch_nor_the_policy() -> None:
    heavy = "[m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'mujoco') or '_ros.policy' in m]"
    program = f"import sys, dit_policy_ros.nodes.guard_node; print({heavy})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("parameter", "words"), [("timeout:=0.3", "is empty"), ("embodiment:=/no.yaml", "/no.yaml")])
def test_says_in_one_line_why_it_cannot_start(parameter: str, words: str) -> None:
    command = [sys.executable, "-m", "dit_policy_ros.nodes.guard_node", "--ros-args", "-p", parameter]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_documents_table_is_current() -> None:
    assert table(DECLARATIONS) in (ROOT / "docs/guard.md").read_text(), "paste table(DECLARATIONS) into docs/guard.md"


MS = 1_000_000


def heard(moving: bool) -> Heartbeat:
    """A heartbeat of a timeout of 200 ms, alive until 1000 ms and looked at every 20 ms."""
    heartbeat = Heartbeat(200 * MS)
    for now in range(0, 1020, 20):
        heartbeat.beat(moving, now * MS)
        assert not heartbeat.check(now * MS)
    return heartbeat


def lost_at(heartbeat: Heartbeat, until: int = 2000, step: int = 20) -> list[int]:
    """The moments, in ms after 1000, at which the arm should be stopped."""
    return [now - 1000 for now in range(1000 + step, 1000 + until, step) if heartbeat.check(now * MS)]


class TestHeartbeat:
    def test_is_lost_once_after_the_timeout(self) -> None:
        assert lost_at(heard(moving=True)) == [220]

    def test_matters_only_while_the_arm_moves(self) -> None:
        heartbeat = heard(moving=False)
        assert lost_at(heartbeat) == []
        assert heartbeat.sign == "lost"

    def test_begins_with_the_first_beat(self) -> None:
        heartbeat = Heartbeat(200 * MS)
        heartbeat.command(10 * MS)
        assert lost_at(heartbeat) == []
        assert heartbeat.sign == "none yet"

    def test_a_command_after_the_last_beat_is_motion(self) -> None:
        heartbeat = heard(moving=False)
        heartbeat.command(1005 * MS)  # may have been sent before the beat at 1000
        assert lost_at(heartbeat) == []
        heartbeat = heard(moving=False)
        heartbeat.command(1050 * MS)
        assert lost_at(heartbeat) == [220]

    def test_a_command_after_the_loss_is_somebody_elses(self) -> None:
        heartbeat = heard(moving=False)
        assert lost_at(heartbeat, 500) == []
        heartbeat.command(1600 * MS)
        assert lost_at(heartbeat) == []

    def test_is_armed_again_by_the_next_beat(self) -> None:
        heartbeat = heard(moving=True)
        assert lost_at(heartbeat, 500) == [220]
        assert heartbeat.beat(True, 1500 * MS)
        assert not heartbeat.beat(True, 1520 * MS)
        assert lost_at(heartbeat) == [740]

    def test_a_guard_that_was_held_up_hears_first_what_came_meanwhile(self) -> None:
        heartbeat = heard(moving=True)
        assert not heartbeat.check(1900 * MS)
        assert heartbeat.sign == "alive"
        assert heartbeat.check(1920 * MS), "nothing had come"
