"""The simulated trajectory controller against the real one's rules, and the converter's use of them."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rosbags.typesys import Stores, get_typestore
from scipy.interpolate import BPoly, CubicHermiteSpline

from dit_policy_ros.runtime.commands import Command, Rejection, read_command
from dit_policy_ros.runtime.trajectory import Point
from dit_policy_ros.sim.trajectory_controller import TrajectoryController

S = 1_000_000_000
MS = 1_000_000
NOW = 1_700_000_000 * S
JOINTS = ("a", "b")
REST = np.zeros(2)


def duration(seconds: float) -> SimpleNamespace:
    ns = round(seconds * S)
    return SimpleNamespace(sec=ns // S, nanosec=ns % S)


def point(time: float, positions: Any, velocities: Any = (), accelerations: Any = (), effort: Any = ()) -> Any:
    return SimpleNamespace(
        positions=list(positions),
        velocities=list(velocities),
        accelerations=list(accelerations),
        effort=list(effort),
        time_from_start=duration(time),
    )


def message(*points: Any, names: tuple[str, ...] = JOINTS, stamp_ns: int = 0) -> SimpleNamespace:
    stamp = SimpleNamespace(sec=stamp_ns // S, nanosec=stamp_ns % S)
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp), joint_names=list(names), points=list(points))


def controller(**options: bool) -> TrajectoryController:
    """A controller that has held the arm at (1, -1) since one cycle before NOW."""
    made = TrajectoryController(JOINTS, **options)
    made.update(NOW - 2 * MS, np.array([1.0, -1.0]), REST)
    return made


def take(made: TrajectoryController, command: Any, now_ns: int = NOW) -> None:
    rejection = made.receive(command, now_ns)
    assert rejection is None, rejection


def reference(
    made: TrajectoryController, seconds: float, measured: Any = (1.0, -1.0), velocity: Any = (0.0, 0.0)
) -> list[list[float]]:
    """Position, velocity and acceleration of the update at NOW + seconds."""
    state = made.update(NOW + round(seconds * S), np.array(measured), np.array(velocity))
    return [array.tolist() for array in state]


# --- validation
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "rule", "words"),
    [
        (message(point(1, [1]), names=("a",)), "joint_count", "1 joints, expected all 2: a, b"),
        (message(point(1, [1, 2, 3]), names=("a", "b", "c")), "joint_count", "3 joints"),
        (message(point(1, []), names=()), "joint_count", "0 joints"),
        (message(point(1, [1, 2]), names=("a", "c")), "unknown_joint", "unknown c"),
        (message(point(1, [1, 2]), names=("a", "a")), "repeated_joint", "twice in a, a"),
        (message(), "no_points", "no points"),
        (message(point(1, [1, 2], [0, 1e-6])), "nonzero_end_velocity", "velocity of b is 1e-06"),
        (message(point(1, [1, 2]), stamp_ns=NOW - S - 1), "ends_in_past", "in the past"),
        (message(point(1, [1, 2]), point(1, [1, 2])), "times_not_increasing", "point 1 is 1.0 s after 1.0 s"),
        (message(point(2, [1, 2]), point(1, [1, 2])), "times_not_increasing", "point 1"),
        (message(point(1, [])), "size_mismatch", "point 0 has 0 positions for 2 joints"),
        (message(point(1, [1, 2]), point(2, [1])), "size_mismatch", "point 1 has 1 positions"),
        (message(point(1, [1, 2], [0]), point(2, [1, 2])), "size_mismatch", "1 velocities"),
        (message(point(1, [1, 2], [0, 0], [0])), "size_mismatch", "1 accelerations"),
        (message(point(1, [1, 2], effort=[1, 1])), "effort", "point 0 carries effort"),
    ],
)
def test_rejections(command: Any, rule: str, words: str) -> None:
    made = controller()
    take(made, message(point(1, [5, 5])))
    rejection = made.receive(command, NOW)
    assert isinstance(rejection, Rejection)
    assert rejection.rule == rule
    assert words in rejection.reason
    assert reference(made, 0)[0] == [1, -1]
    assert reference(made, 1)[0] == [5, 5]  # a refused message leaves the one before in force


@pytest.mark.parametrize(
    "command",
    [
        message(point(1, [2, 1]), names=("b", "a")),
        message(point(1, [1, 2], [0, 1.1e-7])),  # within float's epsilon, as the real one compares
        message(point(1, [1, 2])),  # no velocities at all
        message(point(0, [1, 2])),  # nothing asks the first time to be above zero
        message(point(1, [1, 2]), stamp_ns=NOW - S),  # ends now
        message(point(1, [1, 2]), stamp_ns=NOW + 9 * S),
        message(point(1, [np.nan, np.inf])),  # not checked there either: the publisher's duty
        message(point(1, [1e6, -1e6])),
    ],
)
def test_what_the_real_one_takes(command: Any) -> None:
    assert controller().receive(command, NOW) is None


def test_a_moving_end_is_allowed_if_asked_for() -> None:
    command = message(point(1, [2.0, 0.0], [0.5, 0.0]))
    made = controller(allow_nonzero_velocity_at_trajectory_end=True)
    take(made, command)
    reference(made, 0)
    assert reference(made, 5) == [[2, 0], [0.5, 0], [0, 0]]  # the last point as it stands


def test_messages_of_a_bag_and_of_rclpy() -> None:
    store = get_typestore(Stores.ROS2_KILTED)
    types = store.types
    time = types["builtin_interfaces/msg/Time"](0, 0)
    to = types["trajectory_msgs/msg/JointTrajectoryPoint"](
        np.array([4.0, 3.0]), np.zeros(2), np.zeros(0), np.zeros(0), types["builtin_interfaces/msg/Duration"](1, 0)
    )
    name = "trajectory_msgs/msg/JointTrajectory"
    built = types[name](types["std_msgs/msg/Header"](time, ""), ["b", "a"], [to])
    made = controller()
    take(made, store.deserialize_cdr(store.serialize_cdr(built, name), name))
    reference(made, 0)
    assert reference(made, 1)[0] == [3, 4]

    msg = pytest.importorskip("trajectory_msgs.msg", reason="no ROS messages for Python here")
    live = msg.JointTrajectory(joint_names=["b", "a"])
    live.points.append(msg.JointTrajectoryPoint(positions=[6.0, 5.0]))
    live.points[0].time_from_start.sec = 1
    take(made, live, NOW + S)
    reference(made, 1)
    assert reference(made, 2)[0] == [5, 6]


# --- time
# ------------------------------------------------------------------------------------------------------------


def test_before_any_command_it_holds_where_it_began() -> None:
    made = TrajectoryController(JOINTS)
    assert made.state is None
    assert reference(made, 0, measured=(0.3, 0.4), velocity=(1, 1)) == [[0.3, 0.4], [0, 0], [0, 0]]
    assert reference(made, 1, measured=(0.9, 0.9)) == [[0.3, 0.4], [0, 0], [0, 0]]  # sagging does not move the goal


def test_stamp_zero_starts_at_the_next_update_not_at_receipt() -> None:
    made = controller()
    take(made, message(point(1, [2, 0]), stamp_ns=0), NOW - 500 * MS)
    assert reference(made, 0)[0] == [1, -1]
    assert reference(made, 0.25)[0] == pytest.approx([1.25, -0.75])
    assert reference(made, 1)[0] == [2, 0]


def test_a_past_stamp_skips_the_points_gone_by() -> None:
    made = controller()
    points = [point(t, [10 * t, 0]) for t in (1, 2, 3)]
    take(made, message(*points, stamp_ns=NOW - 1500 * MS))
    assert reference(made, 0)[0] == pytest.approx([15, 0])  # between points 1 and 2, not from the arm
    assert reference(made, 0.5)[0] == pytest.approx([20, 0])
    assert reference(made, 1.5)[0] == pytest.approx([30, 0])


def test_a_past_stamp_before_the_first_point_bridges_from_the_arm() -> None:
    made = controller()
    take(made, message(point(1, [2, 0]), stamp_ns=NOW - 500 * MS))
    reference(made, 0)
    # Half a second is left for the way from (1, -1) to (2, 0).
    assert reference(made, 0.25)[0] == pytest.approx([1.5, -0.5])


def test_a_future_stamp_forgets_the_old_trajectory_at_once() -> None:
    made = controller()
    take(made, message(point(1, [2, -1])))
    reference(made, 0)
    assert reference(made, 0.5)[0] == [1.5, -1]
    take(made, message(point(1, [3, 0]), stamp_ns=NOW + 1500 * MS))
    # From the measured 1.4 at 0.5 s straight to 3 at 2.5 s; the old goal of 2 at 1 s is forgotten.
    assert reference(made, 0.5, measured=(1.4, -1))[0] == pytest.approx([1.4, -1])
    assert reference(made, 1.5)[0] == pytest.approx([2.2, -0.5])
    assert reference(made, 2.5)[0] == pytest.approx([3, 0])


def test_only_the_newest_of_two_messages_between_updates_counts() -> None:
    made = controller()
    take(made, message(point(1, [9, 9])))
    take(made, message(point(1, [2, 0])))
    reference(made, 0)
    assert reference(made, 1)[0] == [2, 0]


def test_after_the_last_point_it_holds() -> None:
    made = controller()
    take(made, message(point(1, [2, 0], [1, 0]), point(2, [3, 1], [0, 0])))
    reference(made, 0)
    for late in (2, 2.5, 1000):
        assert reference(made, late, measured=(7, 7)) == [[3, 1], [0, 0], [0, 0]]


def test_a_clock_going_back_behind_the_start_holds_and_reset_starts_afresh() -> None:
    made = controller()
    take(made, message(point(1, [2, 0])))
    reference(made, 0)
    reference(made, 0.5)
    assert reference(made, -5, measured=(8, 8))[0] == [1.5, -0.5]
    made.reset()
    assert made.state is None
    assert reference(made, -5, measured=(8, 8)) == [[8, 8], [0, 0], [0, 0]]


# --- interpolation
# ---------------------------------------------------------------------------------------------------


def test_positions_only_are_joined_by_lines() -> None:
    made = controller()
    take(made, message(point(1, [2, -1]), point(1.5, [1, 1])))
    assert reference(made, 0, velocity=(5, 5)) == [[1, -1], [1, 0], [0, 0]]
    assert reference(made, 0.5) == [[1.5, -1], [1, 0], [0, 0]]
    assert reference(made, 1.25) == [[1.5, 0], [-2, 4], [0, 0]]


def test_velocities_make_cubics_from_the_measured_state_on() -> None:
    made = controller()
    take(made, message(point(1, [2, 0], [0.4, 0.2]), point(1.8, [2.5, 1], [0, 0])))
    knots = [[1, -1], [2, 0], [2.5, 1]]
    spline = CubicHermiteSpline([0, 1, 1.8], knots, [[0.3, -0.2], [0.4, 0.2], [0, 0]])
    reference(made, 0, velocity=(0.3, -0.2))
    for t in (0.2, 0.7, 1.0, 1.3, 1.79):
        got = reference(made, t)
        for order in range(3):
            np.testing.assert_allclose(got[order], spline(t, order), atol=1e-6)


def test_accelerations_make_quintics_from_rest_acceleration_on() -> None:
    made = controller()
    take(made, message(point(0.5, [2, 0], [0.4, 0.2], [1, -1]), point(1, [2.5, 1], [0, 0], [0, 0])))
    # The arm measures no acceleration; the released controllers take zero for it.
    first = BPoly.from_derivatives([0, 0.5], [[[1, -1], [0.3, 0.1], [0, 0]], [[2, 0], [0.4, 0.2], [1, -1]]])
    second = BPoly.from_derivatives([0.5, 1], [[[2, 0], [0.4, 0.2], [1, -1]], [[2.5, 1], [0, 0], [0, 0]]])
    reference(made, 0, velocity=(0.3, 0.1))
    for t, spline in ((0.1, first), (0.4, first), (0.6, second), (0.9, second)):
        got = reference(made, t)
        for order in range(3):
            np.testing.assert_allclose(got[order], spline(t, order), atol=1e-6)


def test_it_starts_from_the_measured_state_by_default() -> None:
    made = controller()
    take(made, message(point(1, [2, 0])))
    assert reference(made, 0, measured=(0.5, -0.5))[0] == [0.5, -0.5]
    assert reference(made, 0.5)[0] == pytest.approx([1.25, -0.25])


def test_it_starts_from_the_last_reference_if_asked_for() -> None:
    made = controller(interpolate_from_desired_state=True)
    take(made, message(point(1, [2, 0], [1, 1]), point(2, [3, 1], [0, 0])))
    reference(made, 0, measured=(0.5, -0.5), velocity=(9, 9))
    before = reference(made, 1, measured=(0.5, -0.5), velocity=(9, 9))
    assert before[:2] == [pytest.approx([2, 0]), pytest.approx([1, 1])]
    take(made, message(point(1, [4, 2], [0, 0])), NOW + S)
    after = reference(made, 1 + 0.002, measured=(0.5, -0.5), velocity=(9, 9))
    # It runs on from where the reference was one cycle ago, so neither position nor velocity steps.
    np.testing.assert_allclose(after[0], [2.002, 0.002], atol=1e-4)
    np.testing.assert_allclose(after[1], [1, 1], atol=0.02)


# --- partial goals and state
# -----------------------------------------------------------------------------------------


def test_partial_goals_hold_the_missing_joints() -> None:
    made = controller(allow_partial_joints_goal=True)
    take(made, message(point(1, [3]), names=("b",)))
    reference(made, 0, measured=(0.9, -1))
    # Joint a keeps its last command, 1, although it is measured at 0.9 and bridged from there.
    assert reference(made, 0.5)[0] == pytest.approx([0.95, 1])
    assert reference(made, 1)[0] == [1, 3]
    take(made, message(point(1, [5], [0.0]), names=("a",)), NOW + S)
    reference(made, 1, measured=(1, 3))
    assert reference(made, 2) == [[5, 3], [0, 0], [0, 0]]
    rejection = made.receive(message(point(1, []), names=()), NOW)
    assert rejection is not None
    assert rejection.rule == "no_joints"


def test_state_has_reference_feedback_and_error() -> None:
    made = controller()
    take(made, message(point(1, [2, 0])))
    reference(made, 0)
    reference(made, 0.5, measured=(1.4, -0.7), velocity=(0.9, 0.8))
    state = made.state
    assert state is not None
    assert state.joint_names == JOINTS
    np.testing.assert_allclose(state.reference.position, [1.5, -0.5])
    np.testing.assert_allclose(state.feedback.position, [1.4, -0.7])
    np.testing.assert_allclose(state.error.position, [0.1, 0.2])
    np.testing.assert_allclose(state.error.velocity, [0.1, 0.2])


def test_the_callers_arrays_may_change_afterwards() -> None:
    made = TrajectoryController(JOINTS)
    measured = np.array([1.0, -1.0])
    made.update(NOW, measured, REST)
    measured[:] = 9
    assert reference(made, 1)[0] == [1, -1]


def test_receive_and_update_from_two_threads() -> None:
    made = controller()
    sent = 2000

    def publish() -> None:
        for k in range(1, sent + 1):
            made.receive(message(point(0, [k, k])), NOW)

    thread = threading.Thread(target=publish)
    thread.start()
    seen = [reference(made, 0)[0][0]]
    while thread.is_alive():
        seen.append(reference(made, 0)[0][0])
    seen.append(reference(made, 0)[0][0])
    assert seen == sorted(seen)
    assert seen[-1] == sent


# --- the converter's use
# ---------------------------------------------------------------------------------------------


def test_an_arm_without_measured_velocity_counts_as_resting() -> None:
    command = read_command(message(point(1, [2, 0], [0, 0])), JOINTS, NOW)
    assert isinstance(command, Command)
    execution = command.follow(Point(NOW, np.array([1.0, -1.0])), np.array([1.0, -1.0]), NOW)
    # Still a cubic, from rest to rest: 3 u^2 - 2 u^3 = 0.15625 of the way after a quarter, not 0.25.
    np.testing.assert_allclose(execution.sample(NOW + S // 4).position, [1.15625, -0.84375])


def test_a_recording_followed_with_the_same_rules_gives_the_controllers_references() -> None:
    """What the converter does with a bag's commands, against a controller updated each millisecond."""
    random = np.random.default_rng(0)
    made, execution = TrajectoryController(JOINTS), None
    for tick in range(1200):
        now = NOW + tick * MS
        t = tick / 1e3
        position, velocity = np.array([np.sin(t), np.cos(t)]), np.array([np.cos(t), -np.sin(t)])
        if tick % 93 == 0:
            velocities = [random.normal(0, 0.3, 2) if tick % 2 else (), random.normal(0, 0.3, 2), [0, 0]]
            points = [point(0.1 * (j + 1), random.normal(0, 0.3, 2), velocities[j]) for j in range(3)]
            sent = message(*points, names=("b", "a"), stamp_ns=now if tick % 4 else 0)
            take(made, sent, now)
            command = read_command(sent, JOINTS, now)
            assert isinstance(command, Command)
            execution = command.follow(Point(now, position, velocity), position, now)
        assert execution is not None
        np.testing.assert_array_equal(made.update(now, position, velocity)[0], execution.sample(now).position)
