"""Joining: the blend's weights, the seam, and the chunk in motion as the policy takes it, against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from policy_fixtures import demo_config
from test_course import JOINTS, NOW, TIMES, uniform

from dit_policy_ros.runtime.course import Course
from dit_policy_ros.runtime.joining import JOININGS, Seam, blend, chunk_in_motion, seam
from dit_policy_ros.runtime.trajectory import Point, Trajectory

MS = 1_000_000


def test_the_choices() -> None:
    assert JOININGS == ("replace", "blend", "rtc")


# --- seam ------------------------------------------------------------------------------------------------------------


def test_seam_is_the_jump_on_the_way_to_the_new_first_point() -> None:
    """The course is p = t. The new one, sent at 0.3 s, is p = 0.4 + 0.5 s + s^2 at s after it: an exact cubic."""
    new_times = np.array([0.1, 0.2, 0.3])
    way = np.stack([0.4 + 0.5 * new_times + new_times**2, 0 * new_times], axis=1)
    speed = np.stack([0.5 + 2 * new_times, 0 * new_times], axis=1)
    got = seam(uniform(), Trajectory(JOINTS, new_times, way, speed), NOW + 300 * MS)
    # At s = 0.1 the new one says 0.46, the course 0.4. The way there is the cubic from (0.3, 1) to (0.46, 0.7), whose
    # velocity is 1 + 4.2 u - 4.5 u^2: most, of the five moments, at u = 1/2; its acceleration, (4.2 - 9 u) / 0.1, at 1.
    assert got.position == pytest.approx(0.06)
    assert got.velocity == pytest.approx(2.1 - 1.125)
    assert got.acceleration == pytest.approx(48.0)


def test_seam_of_what_goes_on_alike_is_none() -> None:
    rest = Trajectory(JOINTS, TIMES[:4], np.stack([0.3 + TIMES[:4], np.zeros(4)], axis=1), np.tile([1.0, 0.0], (4, 1)))
    got = seam(uniform(), rest, NOW + 300 * MS)
    assert got.position == pytest.approx(0, abs=1e-12)
    assert got.velocity == pytest.approx(0, abs=1e-12)
    assert got.acceleration == pytest.approx(0, abs=1e-9)


def test_seam_is_that_of_the_worst_joint() -> None:
    one = Trajectory(JOINTS, np.array([0.1]), np.array([[0.41, -0.2]]), np.array([[0.0, 0.0]]))
    got = seam(uniform(), one, NOW + 300 * MS)
    # Joint b goes 0.2 in 0.1 s from rest to rest: 3/2 of the mean speed half-way, 6 * 0.2 / 0.1^2 as it sets off.
    assert got == Seam(pytest.approx(0.2), pytest.approx(3.0), pytest.approx(120.0))


# --- blend -----------------------------------------------------------------------------------------------------------


def still(value: float) -> Course:
    """A course that stays at `value` on all joints, and says so for 0.7 s; then it brakes until 0.8 s."""
    rows = np.full((8, 2), value)
    return Course.follow(Trajectory(JOINTS, TIMES, rows, 0 * rows), Point(0, rows[0]), NOW)


@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0])
def test_blend_weights(decay: float) -> None:
    """New rows of 1 over a course of 0 show the new chunk's share. 5 of 9 rows are due while the course tells."""
    due = NOW + (np.arange(9) * 100 + 260) * MS
    got = blend(np.ones((9, 2)), due, still(0.0), decay)
    for row, share in enumerate([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]):
        oldest, newest = share * np.exp(0), (1 - share) * np.exp(-decay)
        np.testing.assert_allclose(got[row], newest / (oldest + newest), atol=1e-12)
    np.testing.assert_array_equal(got[5:], 1.0)


def test_blend_leaves_no_jump_at_either_end() -> None:
    due = NOW + (np.arange(20) * 50 + 20) * MS
    share = blend(np.ones((20, 2)), due, still(0.0))[:, 0]
    steps = np.diff(np.concatenate([[0.0], share]))
    assert (steps >= 0).all()
    assert steps.max() < 1.1 / 14  # 14 rows overlap: no step is much larger than an even one


def test_blend_of_two_that_agree_changes_nothing() -> None:
    due = NOW + (np.arange(6) * 100 + 130) * MS
    rows = uniform().positions(due)
    np.testing.assert_allclose(blend(rows, due, uniform()), rows, atol=1e-12)


def test_a_course_that_only_brakes_or_is_held_has_no_weight() -> None:
    rows, due = np.ones((4, 2)), NOW + (np.arange(4) * 100 + 701) * MS
    np.testing.assert_array_equal(blend(rows, due, still(0.0)), rows)
    assert blend(np.zeros((0, 2)), np.zeros(0, np.int64), still(0.0)).shape == (0, 2)


# --- the chunk in motion ---------------------------------------------------------------------------------------------


def in_motion(observed_ms: int = 200, ready_ms: int = 400, n_action_steps: int = 3, **changes: Any) -> Any:
    """The course p = t as a chunk of 8 steps 0.1 s apart after an observation; it tells until 0.7 s, ends at 0.8 s."""
    keep_rest = changes.pop("keep_rest", True)
    config = demo_config("unused", **({"horizon": 8, "n_action_steps": 8} | changes))
    course = uniform()
    motion = chunk_in_motion(
        course, NOW + observed_ms * MS, 0.1, config, NOW + ready_ms * MS, n_action_steps, keep_rest
    )
    if motion is not None:
        assert [problem for problem in motion.problems(config, 1) if "shape" not in problem] == []
    return motion


def test_rows_are_the_course_at_the_new_chunks_times() -> None:
    motion = in_motion()
    # Due at 0.3, 0.4, ... 0.7 s, of which two are due by 0.4 s.
    np.testing.assert_allclose(motion.actions[0, :, 0], [0.3, 0.4, 0.5, 0.6, 0.7], rtol=1e-6)
    assert motion.actions.shape == (1, 5, 2)
    assert (motion.delay, motion.execution_horizon, motion.past) == (2, 3, None)


def test_after_a_new_instruction_only_committed_rows_count() -> None:
    motion = in_motion(keep_rest=False)
    np.testing.assert_allclose(motion.actions[0, :, 0], [0.3, 0.4], rtol=1e-6)
    assert motion.delay == 2
    assert in_motion(ready_ms=299, keep_rest=False) is None


@pytest.mark.parametrize(
    ("observed_ms", "ready_ms", "rows", "delay"),
    [
        (200, 250, 5, 0),  # nothing will have run
        (200, 760, 5, 5),  # braking: committed rows are what the arm does, however it does it
        (200, 820, 6, 6),  # held from 0.8 s on: nothing is told beyond
        (600, 650, 1, 0),  # only the row due at 0.7 s
        (650, 660, None, None),  # due at 0.75 s, when the course only brakes
        (650, 760, 1, 1),  # but by then it will have run
        (900, 950, None, None),
    ],
)
def test_how_much_is_told(observed_ms: int, ready_ms: int, rows: int | None, delay: int | None) -> None:
    motion = in_motion(observed_ms, ready_ms)
    assert (motion is None) == (rows is None)
    if motion is not None:
        assert (motion.actions.shape[1], motion.delay) == (rows, delay)


def test_one_step_at_least_is_the_new_chunks_own() -> None:
    late = in_motion(0, 700, n_action_steps=50)
    assert late.execution_horizon == 1
    assert late.delay == 7


def test_the_past_is_what_was_followed_then() -> None:
    motion = in_motion(n_obs_steps=3, n_action_steps=3, horizon=10)
    # The observations are of 0, 0.1 and 0.2 s; the actions of the first two are due a step later.
    np.testing.assert_allclose(motion.past[0, :, 0], [0.1, 0.2], rtol=1e-6)
    assert in_motion(observed_ms=50, n_obs_steps=3, horizon=10).past is None  # due at -0.05 s: not known
