"""Splines against their boundary conditions and scipy; planned velocities against analytic curves; stops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.interpolate import BPoly, CubicHermiteSpline

from dit_policy_ros.embodiment import JointLimits
from dit_policy_ros.runtime.trajectory import Point, Trajectory, approaches, interpolate, peaks, plan, stop

S = 1_000_000_000
START = 1_700_000_000 * S
LIMITS = {"a": JointLimits(-2.0, 2.0, 2.0, 10.0), "b": JointLimits(-0.5, 0.5, 2.0, 4.0)}


def state(position: list[float], velocity: list[float] | None = None) -> Point:
    return Point(0, np.array(position), None if velocity is None else np.array(velocity))


def random_points(seed: int, velocity: bool, acceleration: bool) -> tuple[Point, Point, np.ndarray]:
    values = np.random.default_rng(seed).normal(size=(2, 3, 4))  # end, derivative, joint
    ends = [
        Point(START + k * 700_000_000, v[0], v[1] if velocity else None, v[2] if acceleration else None)
        for k, v in enumerate(values)
    ]
    return ends[0], ends[1], values


@pytest.mark.parametrize("seed", range(5))
def test_quintic_is_the_polynomial_with_these_ends(seed: int) -> None:
    start, end, values = random_points(seed, True, True)
    expected = BPoly.from_derivatives([0, 0.7], values)
    for t in np.linspace(0, 0.7, 15):
        got = interpolate(start, end, START + round(t * 1e9))
        np.testing.assert_allclose(got.position, expected(t), atol=1e-8)
        np.testing.assert_allclose(got.velocity, expected(t, 1), atol=1e-7)
        np.testing.assert_allclose(got.acceleration, expected(t, 2), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_cubic_is_the_hermite_spline(seed: int) -> None:
    start, end, values = random_points(seed, True, False)
    expected = CubicHermiteSpline([0, 0.7], values[:, 0], values[:, 1])
    for t in np.linspace(0, 0.7, 15):
        got = interpolate(start, end, START + round(t * 1e9))
        np.testing.assert_allclose(got.position, expected(t), atol=1e-8)
        np.testing.assert_allclose(got.velocity, expected(t, 1), atol=1e-7)
        np.testing.assert_allclose(got.acceleration, expected(t, 2), atol=1e-6)


def test_both_ends_are_met() -> None:
    start, end, _ = random_points(9, True, True)
    for knot in (start, end):
        got = interpolate(start, end, knot.time_ns)
        np.testing.assert_allclose(got.position, knot.position, atol=1e-12)
        np.testing.assert_allclose(got.velocity, knot.velocity, atol=1e-11)
        np.testing.assert_allclose(got.acceleration, knot.acceleration, atol=1e-10)


def test_the_degree_is_that_of_the_poorer_end() -> None:
    rich, _, _ = random_points(1, True, True)
    bare = Point(rich.time_ns + S, rich.position + 1.0)
    halfway = interpolate(rich, bare, rich.time_ns + S // 4)
    np.testing.assert_allclose(halfway.position, rich.position + 0.25)
    np.testing.assert_allclose(halfway.velocity, 1.0)
    np.testing.assert_allclose(halfway.acceleration, 0.0)
    no_acceleration = Point(rich.time_ns + S, rich.position + 1.0, np.zeros(4))
    cubic = interpolate(rich, no_acceleration, rich.time_ns + S // 2)
    # Midway a cubic lies at the mean of the ends + T (v0 - v1) / 8, whatever the accelerations.
    np.testing.assert_allclose(cubic.position, rich.position + 0.5 + rich.velocity / 8)


def test_outside_the_segment_nothing_is_extrapolated() -> None:
    start, end, _ = random_points(0, True, True)
    for t in (start.time_ns - 1, end.time_ns + 1):
        with pytest.raises(ValueError, match="outside the segment"):
            interpolate(start, end, t)


def planned(curve: np.ndarray, times: np.ndarray, here: float, speed: float | None) -> Trajectory:
    return plan(["a"], curve[:, None], times, state([here], None if speed is None else [speed]))


def test_velocities_of_a_straight_line_are_its_slope_and_zero_at_the_end() -> None:
    times = np.array([0.07, 0.17, 0.27, 0.37])
    line = planned(1.0 + 0.4 * times, times, 1.0, 0.4)
    assert line.velocities is not None
    np.testing.assert_allclose(line.velocities[:, 0], [0.4, 0.4, 0.4, 0.0])
    np.testing.assert_allclose(line.times, [0.07, 0.17, 0.27, 0.42])  # half an interval more to brake in


def test_velocities_of_a_smooth_curve() -> None:
    times = np.arange(1, 13) * 0.1
    got = planned(np.sin(times), times, 0.0, 1.0).velocities
    assert got is not None
    np.testing.assert_allclose(got[:-1, 0], np.cos(times[:-1]), atol=0.04)


def test_the_spline_never_leaves_its_points() -> None:
    """Between two points the cubic stays within them, so position limits hold at every instant."""
    random = np.random.default_rng(3)
    times = np.cumsum(random.uniform(0.03, 0.2, 12))
    for _ in range(50):
        positions = random.normal(0, 0.1, (12, 1)).cumsum(axis=0)
        line = plan(["a"], positions, times, Point(0, positions[0] - 0.01, np.array([0.1])))
        assert line.velocities is not None
        spline = CubicHermiteSpline(line.times, line.positions[:, 0], line.velocities[:, 0])
        for (first, t0), (second, t1) in pairwise(zip(positions[:, 0], line.times, strict=True)):
            dense = spline(np.linspace(t0, t1, 50))
            assert dense.min() >= min(first, second) - 1e-9
            assert dense.max() <= max(first, second) + 1e-9


def test_a_turning_point_has_zero_velocity() -> None:
    line = planned(np.array([0.1, 0.2, 0.1, 0.0]), np.arange(1, 5) * 0.1, 0.0, 1.0)
    assert line.velocities is not None
    assert line.velocities[1, 0] == 0.0
    assert line.velocities[0, 0] > 0.5
    assert line.velocities[2, 0] < -0.5


@pytest.mark.parametrize(
    ("here", "measured", "low", "high"),
    [
        (0.0, 0.0, 0.3, 0.5),  # from rest: it need not stop at the first point
        (0.02, 0.5, 0.45, 0.55),  # lagging or level, moving at the path's speed
        (0.052, 0.5, 0.45, 0.55),  # a hair ahead of the first point: no stop there either
        (0.052, None, 0.0, 0.0),  # the same without a measured velocity: the points turn
        (0.0, None, 0.5, 0.5),
        (-0.03, 0.5, 0.45, 0.55),  # far behind, due soon: the catching up does not go on beyond the point
    ],
)
def test_velocity_at_the_first_point(here: float, measured: float | None, low: float, high: float) -> None:
    """The path moves at 0.5 rad/s; its first point, 0.05 rad, is due in 0.1 s."""
    times = np.arange(1, 6) * 0.1
    line = planned(0.05 * np.arange(1, 6), times, here, measured)
    assert line.velocities is not None
    assert low - 1e-9 <= line.velocities[0, 0] <= high + 1e-9


def test_one_point_only_ends_at_rest() -> None:
    line = planned(np.array([0.3]), np.array([0.2]), 0.1, 1.0)
    assert line.velocities is not None
    assert line.velocities.tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("positions", "times", "here", "words"),
    [
        (np.zeros((3, 1)), [0.1, 0.2], [0.0], "shape"),
        (np.zeros((2, 2)), [0.1, 0.2], [0.0], "shape"),
        (np.zeros((0, 1)), [], [0.0], "1 row or more"),
        (np.zeros((2, 1)), [0.0, 0.1], [0.0], "rise"),
        (np.zeros((2, 1)), [0.2, 0.2], [0.0], "rise"),
        (np.zeros((2, 1)), [0.1, 0.2], [0.0, 0.0], "start's position"),
    ],
)
def test_plan_refuses_what_does_not_fit(
    positions: np.ndarray, times: list[float], here: list[float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        plan(["a"], positions, times, state(here))


def test_stop_is_an_even_deceleration_within_limits() -> None:
    line = stop(["a", "b"], state([0.5, 0.1], [1.0, -0.6]), LIMITS)
    # b is the slowest to stop: 0.6 rad/s at half of 4 rad/s^2 takes 0.3 s; a then needs 3.3 of its 10
    # rad/s^2.
    assert line.times == pytest.approx([0.3])
    np.testing.assert_allclose(line.positions, [[0.5 + 1.0 * 0.15, 0.1 - 0.6 * 0.15]])
    assert line.velocities is not None
    assert line.velocities.tolist() == [[0.0, 0.0]]
    start = Point(0, np.array([0.5, 0.1]), np.array([1.0, -0.6]))
    end = Point(round(0.3 * S), line.positions[0], line.velocities[0])
    for t in np.linspace(0, 0.3, 31):
        got = interpolate(start, end, min(round(t * 1e9), end.time_ns))
        np.testing.assert_allclose(got.acceleration, [-1.0 / 0.3, 2.0], atol=1e-6)


def test_stop_does_not_pass_a_position_limit() -> None:
    line = stop(["b"], state([0.48], [1.0]), LIMITS)
    assert 0.48 < line.positions[-1, 0] < 0.5  # with 0.02 of room: an even braking would take 0.5
    assert peaks(Point(0, np.array([0.48]), np.array([1.0])), line).highest.max() < 0.5
    outside = stop(["b"], state([0.51], [0.0]), LIMITS)
    assert outside.positions.tolist() == [[0.51]]  # measured beyond the limit: stay, do not jump back


def test_stop_of_a_resting_arm_holds_it() -> None:
    line = stop(["a", "b"], state([0.5, 0.1], [0.0, 0.0]), LIMITS)
    assert line.positions.tolist() == [[0.5, 0.1]]
    assert line.times[0] > 0


def test_stop_uses_more_of_the_limit_rather_than_much_time() -> None:
    fast = stop(["a"], state([0.0], [2.4]), {"a": JointLimits(-9.0, 9.0, 3.0, 10.0)})
    assert fast.times[-1] == pytest.approx(0.35)  # at half of 10 rad/s^2 it would take 0.48 s
    slow = stop(["a"], state([0.0], [2.4]), {"a": JointLimits(-9.0, 9.0, 3.0, 4.0)})
    assert slow.times[-1] == pytest.approx(0.6)  # all of 4 rad/s^2, and no more


def test_stop_takes_longer_where_a_start_is_far_behind() -> None:
    """0.2 rad behind, the 0.15 rad of braking in 0.1 s would be 0.35 rad: beyond 2 rad/s, in the mean already."""
    start, behind = state([0.0], [1.0]), state([-0.2], [1.0])
    assert stop(["a"], start, LIMITS).times[-1] < 0.25
    line = stop(["a"], start, LIMITS, [behind])
    assert peaks(behind, line).speed.max() <= 2.0
    assert line.positions[-1, 0] > 0.0


def test_every_point_of_a_stop_lies_on_the_parabola() -> None:
    """b, short of room, rests before a: at the point between, a is as far as an even braking has it."""
    line = stop(["a", "b"], state([0.0, 0.47], [1.0, 0.5]), LIMITS)
    assert len(line.times) == 2
    assert line.velocities is not None
    t, end = line.times
    assert line.velocities[0].tolist() == pytest.approx([1 - t / end, 0.0])
    assert line.positions[0, 0] == pytest.approx(t - t**2 / (2 * end))
    assert line.positions[0, 1] == pytest.approx(line.positions[1, 1])
    assert line.positions[1, 1] < 0.5


# --- peaks -----------------------------------------------------------------------------------------------------------


def random_trajectory(seed: int, linear: bool = False) -> tuple[Point, Trajectory]:
    random = np.random.default_rng(seed)
    times = np.cumsum(random.uniform(0.02, 0.3, 6))
    velocities = None if linear else random.normal(0, 2, (6, 3))
    start = Point(START, random.normal(size=3), random.normal(0, 2, 3))
    return start, Trajectory(("a", "b", "c"), times, random.normal(size=(6, 3)), velocities)


@pytest.mark.parametrize("seed", range(20))
def test_peaks_are_those_of_the_spline(seed: int) -> None:
    start, line = random_trajectory(seed)
    assert line.velocities is not None
    knots = np.concatenate([[0.0], line.times])
    spline = CubicHermiteSpline(
        knots, np.vstack([start.position, line.positions]), np.vstack([start.velocity, line.velocities])
    )
    found = peaks(start, line)
    for segment, (begin, end) in enumerate(pairwise(knots)):
        dense = np.linspace(begin, end, 4001)
        way, speed = spline(dense), spline(dense, 1)
        np.testing.assert_allclose(found.lowest[segment], way.min(axis=0), atol=1e-5)
        np.testing.assert_allclose(found.highest[segment], way.max(axis=0), atol=1e-5)
        np.testing.assert_allclose(found.slowest[segment], speed.min(axis=0), atol=1e-4)
        np.testing.assert_allclose(found.fastest[segment], speed.max(axis=0), atol=1e-4)
        assert (found.lowest[segment] <= way.min(axis=0) + 1e-9).all()
        assert (found.highest[segment] >= way.max(axis=0) - 1e-9).all()
        assert (found.speed[segment] >= np.abs(speed).max(axis=0) - 1e-8).all()


def test_peaks_of_cubics_that_are_straight_or_still() -> None:
    """Where the cubic's coefficients vanish, the closed form divides by zero."""
    times = np.array([0.1, 0.2, 0.3])
    way = np.array([[0.1, 0.5], [0.2, 0.5], [0.3, 0.5]])
    line = Trajectory(("a", "b"), times, way, np.tile([1.0, 0.0], (3, 1)))
    found = peaks(Point(0, np.array([0.0, 0.5]), np.array([1.0, 0.0])), line)
    np.testing.assert_allclose(found.highest, way, atol=1e-12)
    np.testing.assert_allclose(found.lowest, way - [0.1, 0.0], atol=1e-12)
    np.testing.assert_allclose(found.speed, np.tile([1.0, 0.0], (3, 1)), atol=1e-12)


def test_peaks_of_straight_lines() -> None:
    start, line = random_trajectory(1, linear=True)
    found = peaks(start, line)
    ends = np.vstack([start.position, line.positions])
    np.testing.assert_array_equal(found.highest, np.maximum(ends[:-1], ends[1:]))
    slopes = np.diff(ends, axis=0) / np.diff(line.times, prepend=0.0)[:, None]
    np.testing.assert_allclose(found.speed, np.abs(slopes))


def test_peaks_of_quintics_are_not_known() -> None:
    start, line = random_trajectory(1)
    with pytest.raises(ValueError, match="carries accelerations"):
        peaks(start, Trajectory(line.joint_names, line.times, line.positions, line.velocities, line.positions))


def test_approaches_are_the_first_segment_from_each_start() -> None:
    starts = [random_trajectory(seed)[0] for seed in range(3)]
    line = random_trajectory(7)[1]
    found = approaches(starts, line, (0.0, 0.01))
    later = Trajectory(line.joint_names, line.times + 0.01, line.positions, line.velocities)
    expected = [peaks(start, way) for way in (line, later) for start in starts]
    for name in ("lowest", "highest", "slowest", "fastest"):
        np.testing.assert_allclose(getattr(found, name), [getattr(one, name)[0] for one in expected])


def test_select_takes_columns_by_name() -> None:
    line = random_trajectory(2)[1]
    chosen = line.select(["c", "a"])
    assert chosen.joint_names == ("c", "a")
    assert line.velocities is not None
    assert chosen.velocities is not None
    np.testing.assert_array_equal(chosen.positions, line.positions[:, [2, 0]])
    np.testing.assert_array_equal(chosen.velocities, line.velocities[:, [2, 0]])
    assert chosen.accelerations is None
    with pytest.raises(ValueError, match="no d, only a, b, c"):
        line.select(["a", "d"])


def test_the_last_segment_is_nowhere_faster_than_its_mean() -> None:
    """What a trajectory adds in order to end at rest never costs a chunk its admission."""
    random = np.random.default_rng(5)
    for _ in range(200):
        times = np.cumsum(random.uniform(0.02, 0.2, 5))
        positions = random.normal(0, 0.1, (5, 1)).cumsum(axis=0)
        line = plan(["a"], positions, times, Point(0, positions[0] - 0.01, np.array([0.1])))
        last = peaks(Point(0, positions[0]), line)
        slope = abs(positions[-1, 0] - positions[-2, 0]) / (times[-1] - times[-2])
        assert line.velocities is not None
        assert last.speed[-1, 0] <= max(slope, abs(line.velocities[-2, 0])) + 1e-9
        assert min(positions[-2:, 0]) - 1e-9 <= last.lowest[-1, 0]
        assert last.highest[-1, 0] <= max(positions[-2:, 0]) + 1e-9
