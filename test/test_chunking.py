"""Elapsed steps are dropped by the clock, and the rest is re-timed from now."""

from __future__ import annotations

import numpy as np
import pytest

from dit_policy_ros.runtime.chunking import Chunk, drop_elapsed

STAMP = 1_700_000_000_000_000_000
MS = 1_000_000


def chunk(steps: int = 5, step_duration: float = 0.1) -> Chunk:
    positions = np.arange(steps, dtype=np.float64)[:, None] * [1.0, -1.0]
    return Chunk(STAMP, 7, ("a", "b"), positions, step_duration, 3, "push", 0.05)


def test_rows_are_due_one_step_after_another_from_the_observation() -> None:
    positions, times, dropped = drop_elapsed(chunk(), STAMP)
    assert dropped == 0
    assert times == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert positions[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_elapsed_rows_go_and_the_tail_stays() -> None:
    positions, times, dropped = drop_elapsed(chunk(), STAMP + 230 * MS)
    assert dropped == 2
    assert times == pytest.approx([0.07, 0.17, 0.27])
    assert positions.tolist() == [[2, -2], [3, -3], [4, -4]]


@pytest.mark.parametrize(
    ("now_ms", "lead", "dropped"),
    [
        (49, None, 0),  # row 0 is 51 ms away, half a step is 50
        (50, None, 1),
        (51, None, 1),
        (99, 0.0, 0),
        (100, 0.0, 1),  # a row due now would have time_from_start 0
        (100, 0.02, 1),
        (181, 0.02, 2),
    ],
)
def test_a_row_due_too_soon_goes_too(now_ms: int, lead: float | None, dropped: int) -> None:
    positions, times, got = drop_elapsed(chunk(), STAMP + now_ms * MS, lead)
    assert got == dropped
    assert len(positions) == len(times) == 5 - dropped
    assert (times > (0.05 if lead is None else lead)).all()


def test_at_high_rates_the_lead_is_more_than_half_a_step() -> None:
    """Rows 10 ms apart: what a controller's take-up varies by, a few ms, must stay small against the first segment."""
    positions, times, dropped = drop_elapsed(chunk(step_duration=0.01), STAMP + 5 * MS)
    assert dropped == 2  # due in 5 and 15 ms
    assert times == pytest.approx([0.025, 0.035, 0.045])
    assert positions[:, 0].tolist() == [2, 3, 4]


def test_nothing_is_left_of_an_old_chunk() -> None:
    positions, times, dropped = drop_elapsed(chunk(), STAMP + 10_000 * MS)
    assert positions.shape == (0, 2)
    assert times.shape == (0,)
    assert dropped == 5


def test_no_drift_at_a_step_that_is_no_whole_nanosecond() -> None:
    due = chunk(steps=300, step_duration=1 / 30).due_times_ns - STAMP
    assert due[29] == 1_000_000_000
    assert due[299] == 10_000_000_000
