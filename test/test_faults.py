"""The fault table's own judgement: an unsafe command is called unsafe, and rest is rest only if it lasts."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed; make setup brings it")

from fault_judge import complaint, rest_since
from fault_robot import HOME, Command
from faults import cases
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.trajectory import Point

pytestmark = pytest.mark.ros

ARM = Embodiment.load(Path(__file__).parents[1] / "config/embodiments/sim_arm.yaml")
NS = 1_000_000_000


def command(*steps: float, velocity: float = 0.0, names: tuple[str, ...] = ARM.action_joints) -> Command:
    """A trajectory of a tenth of a second a step, from an arm at rest at home: each step, in rad, for joint 1."""
    points = []
    for number, step in enumerate(steps, start=1):
        position, speed = HOME.copy(), np.zeros(7)
        position[0], speed[0] = step, velocity if number < len(steps) else 0.0
        point = JointTrajectoryPoint(positions=position.tolist(), velocities=speed.tolist())
        point.time_from_start.nanosec = number * 100_000_000
        points.append(point)
    home = Point(0, HOME, np.zeros(7))
    return Command(0.0, NS, JointTrajectory(joint_names=list(names), points=points), home, home)


def test_a_slow_motion_near_the_arm_is_safe() -> None:
    assert complaint(command(0.02, 0.06, 0.08), ARM) is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (command(0.02, float("nan")), "not finite"),
        (command(0.4, 0.4), "0.400 rad from the arm"),
        (command(0.02, 0.34), r"panda_joint1 reaches .* rad/s, its limit is 2.175"),
        (command(0.02, names=("panda_joint1",) * 7), "refuses it"),
        (command(0.02, 0.04, names=tuple(f"other_{number}" for number in range(7))), "refuses it"),
    ],
)
def test_what_must_not_reach_an_arm_is_called_unsafe(wrong: Command, words: str) -> None:
    assert re.search(words, str(complaint(wrong, ARM)))


def test_the_path_counts_and_not_only_its_points() -> None:
    """A cubic that leaves a point at v and comes back to it at rest after T reaches 4/27 v T beyond: here 0.031 rad."""
    edge = replace(command(2.88, 2.88, velocity=2.1), measured=_at(2.88), reference=_at(2.88))
    assert "panda_joint1 reaches" in str(complaint(edge, ARM))
    inner = replace(command(2.86, 2.86, velocity=2.1), measured=_at(2.86), reference=_at(2.86))
    assert complaint(inner, ARM) is None


def test_both_starts_count() -> None:
    here = command(0.02, 0.04)
    far = replace(here, reference=_at(0.3))
    assert complaint(here, ARM) is None
    assert "from the reference" in str(complaint(far, ARM))


def _at(first: float) -> Point:
    position = HOME.copy()
    position[0] = first
    return Point(0, position, np.zeros(7))


def test_rest_is_where_the_last_motion_ends() -> None:
    motion = [(0.0, 0.5), (0.1, 0.0), (0.2, 0.3), (0.3, 0.01), (0.4, 0.0), (0.5, 0.4)]
    assert rest_since(motion, until=0.45) == 0.3
    assert rest_since(motion, until=0.55) is None
    assert rest_since(motion[1:2], until=1.0) == 0.1
    assert rest_since([], until=1.0) is None


def test_the_table_holds_every_fault_of_the_promise() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    for camera in ("workspace", "wrist"):
        for what in ("stops", "freezes", "size", "encoding", "garbage"):
            assert f"camera_{what}_{camera}" in names
    assert {"joints_stop", "joints_jump", "joints_nan", "joints_lose_one"} < set(names)
    assert {"inference_throws", "inference_hangs", "inference_nan", "inference_beyond_limits"} < set(names)
    assert {"inference_takes_5_s", "checkpoint_deleted", "clock_jumps_back", "clock_jumps_forward"} < set(names)
    assert {"controller_dies", "node_killed", "instruction_flood", "parameter_flood", "network_cut"} < set(names)
    assert {case.recovery for case in cases()} == {"automatic", "manual"}
