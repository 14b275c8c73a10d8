"""The beat: steady, undisturbed by what it calls, ended by close; and the watch over the clock that may jump."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed; make setup brings it")

from dit_policy_ros.nodes.beat import Beat
from dit_policy_ros.nodes.clock_watch import ClockWatch
from dit_policy_ros.runtime.faults import Fault

SECOND = 1_000_000_000
WAIT_S = 20.0


def test_calls_keep_to_the_grid_of_the_start_and_none_is_early() -> None:
    """Ten calls whose work takes time: each is due a whole number of periods after the first, so nothing adds up."""
    period, times, enough = 0.02, [], threading.Event()

    def work() -> None:
        times.append(time.monotonic())
        time.sleep(0.005)
        if len(times) == 10:
            enough.set()

    began = time.monotonic()
    beat = Beat(period, work, lambda: False, lambda error: None)
    assert enough.wait(WAIT_S)
    assert beat.close()
    for number, moment in enumerate(times[:10], start=1):
        assert moment - began >= number * period - 1e-6
    late = beat.lateness(0, busy=False)
    assert 0 <= late <= times[9] - began


def test_what_was_slept_through_is_left_out_and_counted() -> None:
    calls, enough = [], threading.Event()

    def work() -> None:
        calls.append(time.monotonic())
        if len(calls) == 1:
            time.sleep(0.2)  # ten periods
        if len(calls) == 4:
            enough.set()

    beat = Beat(0.02, work, lambda: False, lambda error: None)
    assert enough.wait(WAIT_S)
    beat.close()
    assert beat.missed >= 8
    assert calls[3] - calls[1] >= 0.01  # no burst


def test_an_exception_is_told_and_counted_and_the_beat_goes_on() -> None:
    told, calls, enough = [], [], threading.Event()

    def work() -> None:
        calls.append(1)
        if len(calls) == 5:
            enough.set()
        if len(calls) < 3:
            raise ValueError("broken")

    beat = Beat(0.005, work, lambda: False, told.append)
    assert enough.wait(WAIT_S)
    beat.close()
    assert [str(error) for error in told] == ["broken", "broken"]
    assert beat.errors == 2


def test_lateness_with_inference_and_without_is_kept_apart_and_bounded() -> None:
    busy, calls, enough = [False], [], threading.Event()

    def work() -> None:
        calls.append(1)
        busy[0] = len(calls) >= 3
        if len(calls) == 6:
            enough.set()

    beat = Beat(0.005, work, lambda: busy[0], lambda error: None)
    assert enough.wait(WAIT_S)
    beat.close()
    assert beat.lateness(50, busy=False) >= 0
    assert beat.lateness(99, busy=True) >= beat.lateness(50, busy=True) >= 0
    beat.forget()
    assert beat.lateness(50, busy=True) != beat.lateness(50, busy=True)  # NaN: none is kept


def test_close_ends_the_calls_also_from_within() -> None:
    calls = []
    closed = threading.Event()

    def work() -> None:
        calls.append(1)
        beat.close()
        closed.set()

    ready = threading.Event()
    beat = Beat(0.005, lambda: ready.wait(WAIT_S) and work(), lambda: False, lambda error: None)
    ready.set()
    assert closed.wait(WAIT_S)
    assert beat.close(WAIT_S)
    assert calls == [1]


def test_a_period_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected more than 0"):
        Beat(0.0, lambda: None, lambda: False, lambda error: None)


def jumps(simulated: bool, *looks: tuple[float, float]) -> list[str]:
    """The reasons told at the last of some looks (node's clock, steady clock), in s."""
    watch = ClockWatch(simulated)
    troubles = []
    for now, steady in looks:
        troubles = watch.check(round(now * SECOND), round(steady * SECOND))
    assert all(trouble.fault is Fault.CLOCK for trouble in troubles)
    return [trouble.reason for trouble in troubles]


@pytest.mark.parametrize("simulated", [False, True])
def test_a_clock_that_jumps_is_told_with_the_way_for_a_second(simulated: bool) -> None:
    assert "back by 5.0" in jumps(simulated, (100.0, 0.0), (95.0, 0.01))[0]
    assert "forward by 5.0" in jumps(simulated, (100.0, 0.0), (105.01, 0.01))[0]
    assert jumps(simulated, (100.0, 0.0), (95.0, 0.01), (95.9, 0.91))
    assert not jumps(simulated, (100.0, 0.0), (95.0, 0.01), (96.1, 1.11))


def test_a_clock_that_stands_still_or_drifts_is_no_jump() -> None:
    assert not jumps(False, (100.0, 0.0), (103.0, 3.0))  # the process was stopped for 3 s
    assert not jumps(False, *((100 + 1.01 * t, t) for t in range(200)))  # 2 s off in the end, 10 ms a look
    assert jumps(False, (100.0, 0.0), (100.0, 3.0))  # a system clock that stands still is set back again and again
    assert not jumps(True, (100.0, 0.0), (100.0, 3.0), (100.01, 3.01))  # a simulation paused
    assert not jumps(True, (0.0, 0.0), (1000.0, 0.01))  # it had not begun
    assert jumps(True, (5.0, 1.0), (0.0, 1.01), (0.0, 1.02))  # it begins anew


def test_a_simulation_reset_soon_after_its_start_is_a_jump_though_a_short_one() -> None:
    assert "back by 0.300" in jumps(True, (0.3, 0.0), (0.0, 0.01))[0]
