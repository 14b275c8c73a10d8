"""Splines against their boundary conditions and scipy; planned velocities against analytic curves; stops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.interpolate import BPoly, CubicHermiteSpline

from dit_policy_ros.embodiment import JointLimits
from dit_policy_ros.runtime.trajectory import Point, Trajectory, interpolate, peaks, plan, stop

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
