"""Courses: the same reference as a controller's, its past, and the states a controller may take a message up in."""

from __future__ import annotations

import numpy as np
import pytest

from dit_policy_ros.runtime.commands import Command
from dit_policy_ros.runtime.course import JITTER_NS, Course
from dit_policy_ros.runtime.trajectory import Point, Trajectory, plan

S = 1_000_000_000
NOW = 1_700_000_000 * S
JOINTS = ("a", "b")
TIMES = np.arange(1, 9) * 0.1
BEFORE = Point(0, np.array([0.1, -0.2]), np.array([0.5, 0.0]))


def wave(times: np.ndarray) -> np.ndarray:
    return np.stack([0.1 + 0.5 * np.sin(times), -0.2 * np.cos(3 * times)], axis=1)


def course(now_ns: int = NOW, previous: Course | None = None) -> Course:
    return Course.follow(plan(JOINTS, wave(TIMES), TIMES, BEFORE), BEFORE, now_ns, previous)


def uniform(now_ns: int = NOW, speed: float = 1.0) -> Course:
    """Joint a at p = speed * t, joint b still; the cubics through these points are the line itself."""
    way = np.stack([speed * TIMES, 0 * TIMES], axis=1)
    trajectory = Trajectory(JOINTS, TIMES, way, np.tile([speed, 0.0], (len(TIMES), 1)))
    return Course.follow(trajectory, Point(0, np.zeros(2), np.array([speed, 0.0])), now_ns)


def test_it_is_what_a_controller_makes_of_the_message() -> None:
    trajectory = plan(JOINTS, wave(TIMES), TIMES, BEFORE)
    assert trajectory.velocities is not None
    knots = [
        Point(round(time * S), position, velocity)
        for time, position, velocity in zip(trajectory.times, trajectory.positions, trajectory.velocities, strict=True)
    ]
    # A message that names the joints the other way round, as a controller of (b, a) would complete it.
    execution = Command(0, (0, 1), tuple(knots)).follow(
        Point(NOW, BEFORE.position, BEFORE.velocity, np.zeros(2)), BEFORE.position, NOW
    )
    followed = course()
    for t_ns in range(NOW, NOW + S, 13_000_000):
        expected, got = execution.sample(t_ns), followed.at(t_ns)
        np.testing.assert_array_equal(got.position, expected.position)
        np.testing.assert_array_equal(got.velocity, expected.velocity)
        assert got.acceleration is not None
    assert followed.end_ns == NOW + 850_000_000  # 0.8 s and half an interval to brake in
    assert followed.told_until_ns == NOW + 700_000_000


def test_at_its_end_it_is_held() -> None:
    held = course().at(NOW + 9 * S)
    np.testing.assert_array_equal(held.position, wave(TIMES)[-1])
    assert held.velocity is not None
    assert held.acceleration is not None
    assert not held.velocity.any()
    assert not held.acceleration.any()


def test_positions_are_those_of_at() -> None:
    later = course(NOW + 300_000_000, course())
    times = NOW + np.arange(-100, 1500, 37) * 1_000_000
    expected = np.array([later.at(int(t_ns)).position for t_ns in times])
    np.testing.assert_allclose(later.positions(times), expected, atol=1e-12)
    assert later.positions(np.zeros(0, np.int64)).shape == (0, 2)


def test_what_was_followed_before_is_remembered() -> None:
    first = course()
    second = uniform(NOW + 400_000_000)
    second = Course.follow(
        Trajectory(JOINTS, TIMES, wave(TIMES), np.zeros((8, 2))), second.at(NOW + 400_000_000), NOW + 400_000_000, first
    )
    for t_ns in (NOW, NOW + 200_000_000, NOW + 399_999_999):
        np.testing.assert_array_equal(second.at(t_ns).position, first.at(t_ns).position)
        assert second.knows(t_ns)
    assert not second.knows(NOW - 1)
    np.testing.assert_array_equal(second.at(NOW - S).position, BEFORE.position)


def test_memory_is_short() -> None:
    followed = course()
    for number in range(1, 30):
        followed = course(NOW + number * 100_000_000, followed)
    assert len(followed.earlier) == 4
    assert not followed.knows(NOW + 24 * 100_000_000)
    assert followed.knows(NOW + 26 * 100_000_000)


def test_a_clock_that_went_back_leaves_no_past() -> None:
    again = course(NOW - 5 * S, course())
    assert again.earlier == ()
    assert again.start_ns == NOW - 5 * S


def test_a_state_without_velocity_is_at_rest() -> None:
    still = Course.follow(plan(JOINTS, wave(TIMES), TIMES, BEFORE), Point(0, BEFORE.position), NOW)
    velocity = still.at(NOW).velocity
    assert velocity is not None
    assert not velocity.any()


@pytest.mark.parametrize("after_ms", [200, 352, 400, 849, 2000])
def test_starts_hold_the_reference_of_the_time_around(after_ms: int) -> None:
    """The box is neither smaller nor larger than what the reference does within the jitter."""
    followed, now_ns = course(), NOW + after_ms * 1_000_000
    first, *corners = followed.starts(now_ns)
    np.testing.assert_array_equal(first.position, followed.at(now_ns).position)
    dense = [followed.at(now_ns + offset) for offset in range(-JITTER_NS, JITTER_NS + 1, 100_000)]
    for name in ("position", "velocity"):
        values = np.array([getattr(point, name) for point in dense])
        box = np.array([getattr(corner, name) for corner in corners])
        np.testing.assert_allclose(box.min(axis=0), values.min(axis=0), atol=1e-5)
        np.testing.assert_allclose(box.max(axis=0), values.max(axis=0), atol=1e-5)
    # Each of the four combinations is there.
    assert len({(tuple(corner.position), tuple(corner.velocity)) for corner in corners}) == (
        1 if after_ms == 2000 else 4
    )


def test_starts_of_a_course_just_begun_hold_those_it_may_have_begun_from() -> None:
    elsewhere = Point(0, BEFORE.position + 0.2, np.array([-1.0, 1.0]))
    trajectory = plan(JOINTS, wave(TIMES), TIMES, BEFORE)
    followed = Course.follow(trajectory, BEFORE, NOW, starts=[elsewhere])
    corners = followed.starts(NOW)[1:]
    assert np.array([corner.position for corner in corners]).max(axis=0) == pytest.approx(
        Course.follow(trajectory, elsewhere, NOW).positions([NOW, NOW + JITTER_NS]).max(axis=0), abs=2e-3
    )
    assert (np.array([corner.velocity for corner in corners]).min(axis=0) <= [-1.0, 0.0]).all()
    # From its first point on it does not matter any more.
    later = NOW + 100_000_000 + JITTER_NS
    lone = Course.follow(trajectory, BEFORE, NOW)
    for one, other in zip(followed.starts(later), lone.starts(later), strict=True):
        np.testing.assert_array_equal(one.position, other.position)


@pytest.mark.parametrize("by_s", [-40, 40])
def test_on_a_clock_that_jumped_it_goes_on_as_before(by_s: int) -> None:
    old = course(NOW, uniform(NOW - S // 2))
    new = old.shifted(by_s * S)
    for t_ns in range(NOW - S // 4, NOW + S, 50_000_000):
        np.testing.assert_array_equal(new.at(t_ns + by_s * S).position, old.at(t_ns).position)
    assert new.knows(NOW - S // 4 + by_s * S)
    for before, after in zip(old.starts(NOW + 1), new.starts(NOW + 1 + by_s * S), strict=True):
        np.testing.assert_array_equal(after.position, before.position)
        np.testing.assert_array_equal(after.velocity, before.velocity)
