"""The gate: what passes, and each refusal's code and sentence with joint, value, limit and unit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_policy_ros.embodiment import Embodiment, JointLimits
from dit_policy_ros.runtime.course import Course
from dit_policy_ros.runtime.gate import Admission, Decision, Gate, Verdict
from dit_policy_ros.runtime.trajectory import Point, Trajectory

ARM = Embodiment.load(Path(__file__).parents[1] / "config" / "embodiments" / "sim_arm.yaml")
HOME = np.array([0.0, -0.5, 0.0, -2.0, 0.0, 1.6, 0.8])
NOW = 1_700_000_000_000_000_000
TIMES = np.arange(1, 17) * 0.1
DIRECTIONS = np.array([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0])


def motion() -> np.ndarray:
    """All joints accelerate gently from rest: 0.2 rad/s^2 over 1.6 s."""
    return HOME + DIRECTIONS * (0.5 * 0.2 * TIMES**2)[:, None]


def admit(positions: np.ndarray | None = None, gate: Gate | None = None, **changed: Any) -> Admission:
    arguments: dict[str, Any] = {
        "rows": motion() if positions is None else positions,
        "times": TIMES,
        "joint_names": ARM.action_joints,
        "measured": HOME,
        "observation_stamp_ns": NOW - 100_000_000,
        "now_ns": NOW,
    }
    arguments |= changed
    if "starts" not in arguments:
        at_rest = HOME if arguments["measured"] is None else arguments["measured"]
        arguments["starts"] = [Point(NOW, at_rest, np.zeros_like(at_rest))]
    return (gate or Gate(ARM)).admit(**arguments)


def check(positions: np.ndarray | None = None, gate: Gate | None = None, **changed: Any) -> Decision:
    return admit(positions, gate, **changed).decision


def with_element(step: int, joint: int, value: float) -> np.ndarray:
    positions = motion()
    positions[step, joint] = value
    return positions


def test_a_gentle_motion_passes() -> None:
    assert check() == Decision(Verdict.ACCEPTED, "")
    assert check().accepted


def test_the_noise_of_a_policy_at_10_hz_passes() -> None:
    """5 mrad of white noise on each step gives second differences of 1.2 rad/s^2 rms."""
    random = np.random.default_rng(0)
    for _ in range(200):
        decision = check(motion() + random.normal(0, 0.005, (16, 7)))
        assert decision.accepted, decision.reason


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value: float) -> None:
    decision = check(with_element(3, 2, value))
    assert decision.verdict is Verdict.NOT_FINITE
    assert "panda_joint3 at step 3" in decision.reason
    assert str(value) in decision.reason


def test_a_time_that_is_not_finite() -> None:
    times = TIMES.copy()
    times[-1] = np.nan
    assert check(times=times).verdict is Verdict.NOT_FINITE


def test_joint_names_in_another_order() -> None:
    swapped = (*ARM.action_joints[1::-1], *ARM.action_joints[2:])
    decision = check(joint_names=swapped)
    assert decision.verdict is Verdict.JOINT_NAMES
    assert "panda_joint2, panda_joint1, panda_joint3" in decision.reason
    assert "in this order" in decision.reason


@pytest.mark.parametrize("positions", [motion()[:, :6], motion()[:8], motion()[0]])
def test_the_wrong_number_of_values(positions: np.ndarray) -> None:
    decision = check(positions)
    assert decision.verdict is Verdict.JOINT_NAMES
    assert "expected (steps, 7)" in decision.reason


@pytest.mark.parametrize(("value", "told"), [(2.9, "2.9000"), (-2.9, "-2.9000")])
def test_position_limit(value: float, told: str) -> None:
    decision = check(with_element(15, 0, value))
    assert decision.verdict is Verdict.POSITION_LIMIT
    for word in ("panda_joint1 at step 15", told, "[-2.8973, 2.8973]"):
        assert word in decision.reason


def test_a_position_limit_in_float32_is_still_the_limit() -> None:
    at_limit = np.tile(HOME, (16, 1))
    at_limit[:, 3], at_limit[:, 5] = np.float32(-0.0698), np.float32(-0.0175)
    assert at_limit[0, 3] > -0.0698  # they round to beyond
    assert at_limit[0, 5] < -0.0175
    assert check(at_limit, measured=at_limit[0]).accepted


def test_velocity_between_steps() -> None:
    # Joint 1: 0.218 rad in 0.1 s is 2.18 rad/s, above 2.175; 0.217 rad is below.
    ramp = HOME + np.outer(np.arange(16), np.eye(7)[0]) * 0.217
    gate = Gate(ARM)
    moving = Point(NOW, HOME - 0.217 * np.eye(7)[0], 2.17 * np.eye(7)[0])
    short = {"times": TIMES[:10], "starts": [moving]}
    assert check(ramp[:10], gate, **short).accepted
    ramp[6:, 0] += 0.001
    decision = check(ramp[:10], gate, **short)
    assert decision.verdict is Verdict.VELOCITY_LIMIT
    assert decision.reason == ("panda_joint1 moves at 2.180 from step 5 to step 6, the limit is 2.175")


def test_acceleration_between_steps() -> None:
    # Joint 2 turns from +0.8 to -0.8 rad/s within 0.1 s: 16 rad/s^2; the limit is 7.5 x margin 2 = 15.
    positions = np.tile(HOME, (16, 1))
    positions[:, 1] = -0.5 + 0.08 * np.concatenate([np.arange(8), np.arange(6, -2, -1)])
    decision = check(positions)
    assert decision.verdict is Verdict.ACCELERATION_LIMIT
    for word in ("panda_joint2", "-16.00", "at step 7", "15.00", "7.5 x margin 2"):
        assert word in decision.reason
    assert check(positions, Gate(ARM, acceleration_margin=2.2)).accepted


def test_a_first_step_far_from_the_arm() -> None:
    measured = HOME.copy()
    measured[4] += 0.5
    decision = check(measured=measured, times=TIMES + 2.0)
    assert decision.verdict is Verdict.START_TOO_FAR
    assert "0.501 from the measured panda_joint5" in decision.reason
    assert "allowed are 0.35" in decision.reason
    assert check(gate=Gate(ARM, max_start_distance=0.6), measured=measured, times=TIMES + 2.0).accepted


def test_the_way_from_the_arm_to_the_first_step_has_a_speed_too() -> None:
    measured = HOME.copy()
    measured[6] -= 0.3
    fast = check(measured=measured)  # 0.3 rad in 0.1 s, from rest to nearly rest: 1.5 times as fast on its way
    assert fast.verdict is Verdict.VELOCITY_LIMIT
    assert "panda_joint7 moves at 4.4" in fast.reason
    assert "on the way to the first step" in fast.reason
    assert check(measured=measured, times=TIMES + 0.07).verdict is Verdict.VELOCITY_LIMIT  # 2.6 rad/s, limit 2.61
    assert check(measured=measured, times=TIMES + 0.08).accepted


@pytest.mark.parametrize(
    ("age_ms", "verdict"),
    [
        (1000, Verdict.ACCEPTED),
        (1001, Verdict.TOO_OLD),
        (-1000, Verdict.ACCEPTED),
        (-1001, Verdict.TOO_OLD),
    ],
)
def test_age_of_the_observation(age_ms: int, verdict: Verdict) -> None:
    decision = check(observation_stamp_ns=NOW - age_ms * 1_000_000)
    assert decision.verdict is verdict
    if verdict is Verdict.TOO_OLD:
        assert "1.001 s" in decision.reason


def test_a_chunk_of_which_nothing_is_left() -> None:
    decision = check(np.zeros((0, 7)), times=np.zeros(0))
    assert decision.verdict is Verdict.TOO_OLD
    assert "no step of the chunk is left" in decision.reason


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_chunks(steps: int) -> None:
    assert check(motion()[:steps], times=TIMES[:steps]).accepted


def test_measured_state_missing_bad_and_stale() -> None:
    assert check(measured=None).verdict is Verdict.INPUT_MISSING
    assert check(measured=HOME[:6]).verdict is Verdict.INPUT_INVALID
    broken = HOME.copy()
    broken[5] = np.nan
    assert check(measured=broken) == Decision(Verdict.INPUT_INVALID, "the measured position of panda_joint6 is nan")
    assert check(measured_stamp_ns=NOW - 200_000_000).accepted
    stale = check(measured_stamp_ns=NOW - 201_000_000)
    assert stale.verdict is Verdict.INPUT_STALE
    assert "0.201 s" in stale.reason


@pytest.mark.parametrize("times", [TIMES - 0.1, TIMES[::-1], np.full(16, 0.1)])
def test_times_that_do_not_rise_from_above_zero(times: np.ndarray) -> None:
    assert check(times=times).verdict is Verdict.VELOCITY_LIMIT


def ramp(speeds: list[float], before: float = 0.0) -> tuple[np.ndarray, Point]:
    """Joint 1 at these mean speeds from one step to the next, 0.1 s apart, coming from a state that moves like this."""
    rows = np.tile(HOME, (len(speeds), 1))
    rows[:, 0] = np.cumsum(speeds) * 0.1
    return rows, Point(NOW, HOME, before * np.eye(7)[0])


def test_the_spline_may_be_faster_than_its_mean() -> None:
    """Mean speeds of 0.9, 2.0, 0.9 rad/s are within 2.175; the cubic of the middle is not.

    It begins and ends at the harmonic mean of 0.9 and 2.0, 1.241 rad/s, so half-way it is at 1.5 * 2 - 1.241 / 2.
    """
    rows, start = ramp([0.9, 0.9, 2.0, 0.9, 0.9], before=0.9)
    decision = check(rows, times=TIMES[:5], starts=[start])
    assert decision.verdict is Verdict.VELOCITY_LIMIT
    assert decision.reason == "panda_joint1 moves at 2.379 on the way from step 1 to step 2, the limit is 2.175"
    assert check(rows, Gate(ARM, velocity_margin=1.1), times=TIMES[:5], starts=[start]).accepted


def test_a_chunk_that_ends_in_full_motion_is_not_refused_for_its_end() -> None:
    """Every trajectory must end at rest; a steady 2 rad/s is not made faster by that."""
    rows, start = ramp([2.0] * 5, before=2.0)
    assert check(rows, times=TIMES[:5], starts=[start]).accepted
    assert check(rows[:1], times=TIMES[:1], starts=[start]).accepted


def test_every_start_is_judged() -> None:
    rows, start = ramp([1.0] * 5, before=1.0)
    behind = Point(NOW, HOME - 0.15 * np.eye(7)[0], start.velocity)
    assert check(rows, times=TIMES[:5], starts=[start]).accepted
    for starts in ([start, behind], [start, start, behind, start]):
        decision = check(rows, times=TIMES[:5], starts=starts)
        assert decision.verdict is Verdict.VELOCITY_LIMIT
        # 0.25 rad in 0.1 s, at 1 rad/s at both ends: 1.5 * 2.5 - 0.5 half-way.
        assert decision.reason == "panda_joint1 moves at 3.250 on the way to the first step, the limit is 2.175"


def test_what_a_late_controller_makes_of_it_is_judged() -> None:
    """The reference alone would pass; one that is taken up some milliseconds earlier or later would be too fast."""
    speed = 1.85
    rows, start = ramp([speed] * 5, before=speed)
    rows[:, 0] += 0.015  # 2 rad/s to the first step in the mean, 2.075 half-way
    way = Trajectory(ARM.action_joints, np.array([0.5]), HOME[None] + speed * 0.5 * np.eye(7)[0], start.velocity[None])
    course = Course.follow(way, start, NOW - 300_000_000)
    begin = Point(NOW, course.at(NOW).position, start.velocity)
    shifted = {"times": TIMES[:5], "measured": begin.position}
    rows[:, 0] += begin.position[0]
    assert check(rows, starts=[begin], **shifted).accepted
    assert check(rows, starts=course.starts(NOW), **shifted).verdict is Verdict.VELOCITY_LIMIT


def near_the_limit(position: float, speed: float, first: float) -> Decision:
    """Joint 1, whose limit is 2.8973, at a position and speed; its first step, at which it stays, due in 0.1 s."""
    rows = np.tile(HOME, (4, 1))
    rows[:, 0] = first
    here = HOME + (position - HOME[0]) * np.eye(7)[0]
    start = Point(NOW, here, speed * np.eye(7)[0])
    return check(rows, times=TIMES[:4], starts=[start], measured=here)


def test_the_way_may_leave_the_limits_though_no_step_does() -> None:
    assert near_the_limit(2.85, 1.0, 2.89).accepted
    decision = near_the_limit(2.85, 2.0, 2.895)  # 0.045 rad in 0.1 s, beginning at 4 times that: it swings over
    assert decision.verdict is Verdict.POSITION_LIMIT
    # The cubic turns at u = 2 / 3.3, where it is 0.0484 rad on.
    assert decision.reason == "panda_joint1 on the way to the first step is 2.8984, outside [-2.8973, 2.8973]"


def test_from_beyond_a_limit_there_is_only_a_way_back() -> None:
    assert near_the_limit(2.92, 0.0, 2.88).accepted
    assert near_the_limit(2.92, -0.3, 2.88).accepted
    assert near_the_limit(2.92, 0.3, 2.88).verdict is Verdict.POSITION_LIMIT


def test_the_trajectory_comes_only_with_an_accepted_decision() -> None:
    accepted = admit()
    assert accepted.trajectory is not None
    assert accepted.trajectory.joint_names == ARM.action_joints
    np.testing.assert_array_equal(accepted.trajectory.positions, motion())
    for refused in (admit(with_element(3, 0, np.nan)), admit(times=TIMES - 0.1), admit(measured=None)):
        assert not refused.decision.accepted
        assert refused.trajectory is None


def test_starts_that_are_no_states() -> None:
    broken = Point(NOW, HOME, np.full(7, np.nan))
    decision = check(starts=[Point(NOW, HOME), broken])
    assert decision == Decision(Verdict.INPUT_INVALID, "the velocity to start from of panda_joint1 is nan")
    assert check(starts=[Point(NOW, HOME[:5])]).verdict is Verdict.INPUT_INVALID
    with pytest.raises(ValueError, match="got none"):
        check(starts=[])


def test_position_margin() -> None:
    rows = np.tile(HOME, (4, 1))
    rows[:, 0] = 2.88
    gate = Gate(ARM)
    here = {"measured": rows[0], "times": TIMES[:4]}
    assert check(rows, gate, **here).accepted
    gate.position_margin = 0.02
    decision = check(rows, gate, **here)
    assert decision.verdict is Verdict.POSITION_LIMIT
    assert decision.reason.startswith("panda_joint1 at step 0 is 2.8800, outside [-2.877")


def test_other_limits() -> None:
    gate = Gate(ARM)
    narrow = dict(gate.limits) | {"panda_joint1": JointLimits(-0.1, 0.1, 1.0, 1.0)}
    gate.limits = narrow
    assert gate.limits == narrow
    assert check(gate=gate).verdict is Verdict.POSITION_LIMIT
    with pytest.raises(ValueError, match="no limits are given for panda_joint1, panda_joint3"):
        gate.limits = {joint: narrow[joint] for joint in ARM.action_joints if joint[-1] in "24567"}
    assert gate.limits == narrow


def test_clamp() -> None:
    rows = with_element(3, 0, 4.0)
    rows[5, 3], rows[6, 0], rows[7, 1] = 1.0, np.nan, -1.7628 - 1e-7
    clamped, count = Gate(ARM, position_margin=0.1).clamp(rows[:7])
    assert count == 2
    assert clamped[3, 0] == pytest.approx(2.7973)
    assert clamped[5, 3] == pytest.approx(-0.1698)
    assert np.isnan(clamped[6, 0])
    rest = np.ones_like(rows[:7], dtype=bool)
    rest[3, 0] = rest[5, 3] = rest[6, 0] = False
    np.testing.assert_array_equal(clamped[rest], rows[:7][rest])
    unchanged, none = Gate(ARM).clamp(rows[7:])  # beyond by rounding only
    assert none == 0
    np.testing.assert_array_equal(unchanged, rows[7:])


def test_limits_follow_the_attributes() -> None:
    gate = Gate(ARM)
    assert check(gate=gate).accepted
    gate.max_chunk_age = 0.05
    assert check(gate=gate).verdict is Verdict.TOO_OLD


def test_the_order_of_the_checks() -> None:
    """Worst first: a chunk with every fault is told its first one, then the next when that is mended."""
    names = ("x", *ARM.action_joints[1:])
    bad = motion()
    bad[4, 0], bad[8, 1] = 9.0, np.nan
    old = {"observation_stamp_ns": NOW - 9_000_000_000, "measured": HOME + 1.0}
    assert check(bad, joint_names=names, **old).verdict is Verdict.NOT_FINITE
    bad[8, 1] = HOME[1]
    assert check(bad, joint_names=names, **old).verdict is Verdict.JOINT_NAMES
    assert check(bad, **old).verdict is Verdict.POSITION_LIMIT
    bad[4, 0] = 1.0
    assert check(bad, **old).verdict is Verdict.VELOCITY_LIMIT
    assert check(**old).verdict is Verdict.START_TOO_FAR
    fast = Point(NOW, HOME + 0.5, np.zeros(7))
    assert check(**(old | {"measured": HOME}), starts=[fast]).verdict is Verdict.VELOCITY_LIMIT
    assert check(observation_stamp_ns=old["observation_stamp_ns"]).verdict is Verdict.TOO_OLD


def test_the_codes_are_those_of_the_message() -> None:
    """ActionChunk.msg repeats the numbers for other languages."""
    text = (Path(__file__).parents[1] / "msg" / "msg" / "ActionChunk.msg").read_text()
    constants = {name: int(value) for name, value in re.findall(r"uint8 VERDICT_(\w+)\s*=\s*(\d+)", text)}
    assert constants == {verdict.name: verdict.value for verdict in Verdict}
