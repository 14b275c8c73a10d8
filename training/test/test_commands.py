"""What the arm was commanded, of every kind of command: against scipy's splines and the formulas of the messages."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dit_policy_training.conversion.options import ControllerOptions, OptionError, Source, TimeOptions, VectorOptions
from sampled import sample, seconds
from scipy.interpolate import CubicHermiteSpline
from toy_robot import (
    CONTROLLER_STATES,
    DEFINITIONS,
    MORE,
    START_NS,
    STORE,
    Recorded,
    header,
    messages,
    position,
    store_with,
    trajectory,
    velocity,
)

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.messages import stamp_ns

COMMANDS = "arm_controller/joint_trajectory"
PERIOD_NS = 100_000_000
SECOND = 10**9


@pytest.mark.parametrize("from_desired", [False, True])
def test_action_is_the_reference_of_the_controller_one_period_later(
    embodiment: Embodiment, tmp_path: Path, from_desired: bool
) -> None:
    recorded = messages(3.0)
    options = ControllerOptions(interpolate_from_desired_state=from_desired)
    rows = sample(tmp_path, recorded, embodiment, controller=options).rows
    commands = [m for m in recorded if m.topic == COMMANDS]

    def reference(joint: str, ns: int) -> float:
        number = max(i for i, m in enumerate(commands) if m.receive_ns <= ns)
        return float(spline(commands[number], joint, reference_start(number, joint))(seconds(ns)))

    @cache
    def reference_start(number: int, joint: str) -> tuple[float, float]:
        """Position and velocity that a command set out from, by scipy's cubics."""
        began = seconds(commands[number].receive_ns)
        if number == 0 or not from_desired:
            return measured(joint, began)
        curve = spline(commands[number - 1], joint, reference_start(number - 1, joint))
        return float(curve(began)), float(curve(began, 1))

    def measured(joint: str, t: float) -> tuple[float, float]:
        state = max(
            (m for m in recorded if m.topic == "joint_states" and seconds(m.receive_ns) <= t),
            key=lambda m: m.receive_ns,
        )
        at = seconds(stamp_ns(state.msg))
        return float(np.float32(position(joint, at))), velocity(joint, at)

    def spline(command: Recorded, joint: str, start: tuple[float, float]) -> CubicHermiteSpline:
        began, column = seconds(command.receive_ns), command.msg.joint_names.index(joint)
        points = command.msg.points
        return CubicHermiteSpline(
            [began, began + 0.1, began + 0.2, began + 9.0],
            [start[0], *(p.positions[column] for p in points), points[-1].positions[column]],
            [start[1], *(p.velocities[column] for p in points), 0.0],
        )

    assert len(rows) > 20
    for row in rows:
        expected = [reference(joint, row.stamp_ns + PERIOD_NS) for joint in ("turn", "lift")]
        np.testing.assert_allclose(row.action, expected, atol=2e-6)


def test_a_source_of_trajectories_is_followed_too(embodiment: Embodiment, tmp_path: Path) -> None:
    recorded = messages(2.0)
    vectors = VectorOptions(action=[Source("/arm_controller/joint_trajectory", joints=["lift", "turn"])])
    rows = sample(tmp_path, recorded, embodiment, vectors=vectors).rows
    usual = sample(tmp_path, recorded, embodiment).rows
    for row, other in zip(rows, usual, strict=True):
        np.testing.assert_array_equal(row.action, other.action[::-1])
    odd = VectorOptions(action=[Source(COMMANDS, fields=["velocity"], joints=["lift", "turn"])])
    with pytest.raises(OptionError, match="carries trajectories, of which the positions of `joints`"):
        sample(tmp_path, recorded, embodiment, vectors=odd)
    some = VectorOptions(action=[Source(COMMANDS, joints=["lift"])])
    said = r"It is for .*; the `joints` of --vectors\.action must be all those of the controller, but are lift$"
    with pytest.raises(ValueError, match=said):
        sample(tmp_path, recorded, embodiment, vectors=some)


def test_a_stamped_command_begins_at_its_stamp_or_when_received(embodiment: Embodiment, tmp_path: Path) -> None:
    """One command, stamped 0.5 s ahead, with a point 0.4 s after its beginning: a straight line to it."""
    given = START_NS + SECOND

    def one(m: Recorded) -> Iterable[Recorded]:
        if m.topic == "instruction":
            ahead = trajectory(["turn", "lift"], [(0.4, [2.0, -2.0], [])], given + SECOND // 2)
            yield Recorded(COMMANDS, given, ahead)
        if m.topic != COMMANDS:
            yield m

    recorded = messages(3.0, edit=one)
    for choice, length in (("header", 0.9), ("receive", 0.4)):
        rows = sample(tmp_path, recorded, embodiment, time=TimeOptions(stamps={COMMANDS: choice})).rows
        start = [np.float32(position(joint, 0.98)) for joint in ("turn", "lift")]
        for row in rows:
            share = min((row.stamp_ns + PERIOD_NS - given) / 1e9 / length, 1.0)
            expected = [begin + share * (end - begin) for begin, end in zip(start, (2.0, -2.0), strict=True)]
            np.testing.assert_allclose(row.action, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "points", "said"),
    [
        (["lift", "elbow"], [(0.1, [0.0, 0.0], [])], "refuses the command at .*: unknown elbow, expected turn, lift"),
        (["lift", "turn"], [(0.1, [np.nan, 0.0], [])], "the command in force at .* sends 'lift' to nan"),
        (["lift", "turn"], [(0.1, [0.0, 0.0], [0.3, 0.0])], "the last point's velocity of lift is 0.3"),
    ],
)
def test_a_command_that_a_controller_refuses_refuses_the_bag(
    embodiment: Embodiment, tmp_path: Path, names: list[str], points: list[Any], said: str
) -> None:
    def wrong(m: Recorded) -> Iterable[Recorded]:
        late = m.topic == COMMANDS and m.receive_ns > START_NS + SECOND
        yield replace(m, msg=trajectory(names, points)) if late else m

    with pytest.raises(ValueError, match=f"{COMMANDS}: .*{said}"):
        sample(tmp_path, messages(2.0, edit=wrong), embodiment)


def test_a_command_stamped_by_another_clock_says_what_to_do(embodiment: Embodiment, tmp_path: Path) -> None:
    def simulated(m: Recorded) -> Iterable[Recorded]:
        yield replace(m, msg=replace(m.msg, header=header(12 * SECOND))) if m.topic == COMMANDS else m

    recorded = messages(2.0, edit=simulated)
    with pytest.raises(ValueError, match=r"in the past.*--time\.stamps='\{arm_controller/joint_trajectory: receive\}'"):
        sample(tmp_path, recorded, embodiment)
    options = TimeOptions(stamps={COMMANDS: "receive"})
    for row, other in zip(
        sample(tmp_path, recorded, embodiment, time=options).rows,
        sample(tmp_path, messages(2.0), embodiment).rows,
        strict=True,
    ):
        np.testing.assert_array_equal(row.action, other.action)


def commanded(joint: str, number: int) -> float:
    """What the number-th command of a stream at 25 Hz says."""
    return {"turn": 0.01, "lift": -0.02, "reach": 0.03}[joint] * number


def stream_of(topic: str, msgtype: str, make: Callable[[int, int], Any]) -> Callable[[Recorded], Iterable[Recorded]]:
    """Adds the messages make(number, ns) at 25 Hz, received 3 ms after each whole 40 ms, and takes the usual commands
    away."""

    def edit(m: Recorded) -> Iterable[Recorded]:
        if m.topic == "instruction":
            for number in range(1, 50):
                ns = START_NS + number * 40_000_000
                yield Recorded(topic, ns + 3_000_000, make(number, ns), msgtype)
        if m.topic != COMMANDS:
            yield m

    return edit


def in_force(row_ns: int, by_stamp: bool = False) -> int:
    """The number of the latest command at a row's action."""
    return (row_ns + PERIOD_NS - START_NS - (0 if by_stamp else 3_000_000)) // 40_000_000


def point(values: list[float]) -> Any:
    none = np.array([])
    duration = STORE.types["builtin_interfaces/msg/Duration"](sec=0, nanosec=0)
    kind = STORE.types["trajectory_msgs/msg/JointTrajectoryPoint"]
    return kind(np.array(values), none, none, none, duration)


def multi_array(values: list[float]) -> Any:
    layout = STORE.types["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
    return STORE.types["std_msgs/msg/Float64MultiArray"](layout=layout, data=np.array(values))


def test_a_position_controllers_commands_hold_until_the_next(embodiment: Embodiment, tmp_path: Path) -> None:
    (arm,) = embodiment.action_groups
    robot = replace(embodiment, action_groups=(replace(arm, topic="arm/commands", interface="position"),))
    kind = "std_msgs/msg/Float64MultiArray"
    edit = stream_of("arm/commands", kind, lambda n, ns: multi_array([commanded(j, n) for j in ("turn", "lift")]))
    rows = sample(tmp_path, messages(2.0, edit=edit), robot).rows
    assert rows[0].stamp_ns == START_NS + 43_000_000 - PERIOD_NS or rows[0].stamp_ns >= START_NS
    for row in rows:
        number = in_force(row.stamp_ns)
        np.testing.assert_array_equal(row.action, np.float32([commanded(j, number) for j in ("turn", "lift")]))

    def stopped(m: Recorded) -> Iterable[Recorded]:
        return [each for each in edit(m) if each.topic != "arm/commands" or seconds(each.receive_ns) < 1.0]

    held = sample(tmp_path, messages(2.0, edit=stopped), robot)
    assert len(held.rows) == len(rows), "a controller holds what it was told last"
    np.testing.assert_array_equal(held.rows[-1].action, np.float32([commanded(j, 24) for j in ("turn", "lift")]))

    short = stream_of("arm/commands", kind, lambda n, ns: multi_array([0.0]))
    with pytest.raises(ValueError, match=r"arm/commands, received at .*: found 1 values of 'position'; expected 2"):
        sample(tmp_path, messages(2.0, edit=short), robot)


def follow_feedback(number: int, ns: int) -> Any:
    """Desired are the commands, measured something else; names in an order of their own."""
    names = ["reach", "lift", "turn"]
    desired, actual = ([scale * commanded(j, number) for j in names] for scale in (1, 7))
    feedback = MORE.types["control_msgs/action/FollowJointTrajectory_Feedback"](
        header(ns), names, point(desired), point(actual), point([0.0] * 3)
    )
    goal = MORE.types["unique_identifier_msgs/msg/UUID"](uuid=np.zeros(16, np.uint8))
    return MORE.types["control_msgs/action/FollowJointTrajectory_FeedbackMessage"](goal, feedback)


def test_follow_joint_trajectorys_feedback_tells_what_was_desired(embodiment: Embodiment, tmp_path: Path) -> None:
    (arm,) = embodiment.action_groups
    group = replace(arm, topic="arm/follow_joint_trajectory", interface="follow_joint_trajectory")
    robot = replace(embodiment, action_groups=(group,))
    kind = "control_msgs/action/FollowJointTrajectory_FeedbackMessage"
    edit = stream_of("arm/follow_joint_trajectory/_action/feedback", kind, follow_feedback)
    for row in sample(tmp_path, messages(2.0, edit=edit), robot, MORE).rows:
        number = in_force(row.stamp_ns)
        np.testing.assert_array_equal(row.action, np.float32([commanded(j, number) for j in ("turn", "lift")]))


@pytest.mark.parametrize("release", CONTROLLER_STATES)
def test_a_controllers_state_tells_the_reference(embodiment: Embodiment, tmp_path: Path, release: str) -> None:
    """In both of the spellings that releases have."""
    kind = "control_msgs/msg/JointTrajectoryControllerState"
    store = store_with({kind: CONTROLLER_STATES[release]})

    def make(number: int, ns: int) -> Any:
        names = ["lift", "reach", "turn"]
        points = [point([scale * commanded(j, number) for j in names]) for scale in (1, 7, 0, 0)]
        fields = 3 if release == "humble" else 4
        return store.types[kind](header(ns), names, *points[:fields])

    state = Source("arm/controller_state", fields=["feedback.position"], joints=["reach"])
    action = Source("arm/controller_state", joints=["turn", "lift"])
    vectors = VectorOptions(state=[replace(state, joints=["reach"])], action=[action], state_fields=["position"])
    robot = replace(embodiment, state=replace(embodiment.state, joints=("lift", "turn")))
    edit = stream_of("arm/controller_state", kind, make)
    rows = sample(tmp_path, messages(2.0, edit=edit), robot, store, vectors=vectors).rows
    assert len(rows) > 10
    for row in rows:
        number = in_force(row.stamp_ns, by_stamp=True)
        np.testing.assert_array_equal(row.action, np.float32([commanded(j, number) for j in ("turn", "lift")]))
        before = in_force(row.stamp_ns - PERIOD_NS, by_stamp=True)
        assert row.frame["observation.state"][2] == np.float32(7 * commanded("reach", before))


def test_a_stream_of_commands_that_pauses_is_a_gap(embodiment: Embodiment, tmp_path: Path) -> None:
    """Unlike an action group's, a source's commands may grow too old."""
    source = Source("arm/commands", joints=["turn", "lift"], max_age=0.3)
    edit = stream_of("arm/commands", "std_msgs/msg/Float64MultiArray", lambda n, ns: multi_array([0.0, 0.0]))

    def pausing(m: Recorded) -> Iterable[Recorded]:
        return [each for each in edit(m) if each.topic != "arm/commands" or not 0.8 < seconds(each.receive_ns) < 1.3]

    sampled = sample(tmp_path, messages(2.0, edit=pausing), embodiment, vectors=VectorOptions(action=[source]))
    (gap,) = sampled.account.gaps
    assert (gap.stream, gap.kind) == ("action 0: arm/commands", "stale")
    assert len(sampled.episodes) == 2
    for row in sampled.rows:
        assert not 0.803 < seconds(row.stamp_ns + PERIOD_NS) < 1.283


@pytest.mark.parametrize("kind", ["GripperCommand", "GripperCommand_FeedbackMessage", "Float64"])
def test_gripper_commands(embodiment: Embodiment, tmp_path: Path, kind: str) -> None:
    def make(number: int, ns: int) -> Any:
        if kind == "Float64":
            return STORE.types["std_msgs/msg/Float64"](data=commanded("reach", number))
        if kind == "GripperCommand":
            return MORE.types["control_msgs/msg/GripperCommand"](commanded("reach", number), 5.0)
        inner = MORE.types["control_msgs/action/GripperCommand_Feedback"]
        feedback = inner(commanded("reach", number), 5.0, False, True)
        goal = MORE.types["unique_identifier_msgs/msg/UUID"](uuid=np.zeros(16, np.uint8))
        return MORE.types[f"control_msgs/action/{kind}"](goal, feedback)

    msgtype = next((name for name in DEFINITIONS if name.endswith(f"/{kind}")), "std_msgs/msg/Float64")
    action = [Source("gripper/cmd", joints=["finger"]), Source("gripper/cmd", fields=["position"], joints=["thumb"])]
    edit = stream_of("gripper/cmd", msgtype, make)
    recorded = messages(2.0, edit=edit)
    for row in sample(tmp_path, recorded, embodiment, MORE, vectors=VectorOptions(action=action)).rows:
        value = np.float32(commanded("reach", in_force(row.stamp_ns)))
        np.testing.assert_array_equal(row.action, [value, value])
    two = VectorOptions(action=[Source("gripper/cmd", joints=["finger", "thumb"])])
    with pytest.raises(ValueError, match=r"gripper/cmd: .* is of one joint, but finger, thumb are named"):
        sample(tmp_path, recorded, embodiment, MORE, vectors=two)


def test_another_interface_than_the_bag_has_is_named(embodiment: Embodiment, tmp_path: Path) -> None:
    (arm,) = embodiment.action_groups
    robot = replace(embodiment, action_groups=(replace(arm, topic="arm/commands"),))
    edit = stream_of("arm/commands", "std_msgs/msg/Float64MultiArray", lambda n, ns: multi_array([0.0, 0.0]))
    with pytest.raises(ValueError, match=r"arm/commands: it carries std_msgs/msg/Float64MultiArray, .* trajectory"):
        sample(tmp_path, messages(1.0, edit=edit), robot)
