"""The stamped buffer: as-of sampling 1/fps apart, ages, disorder, resets, memory, one decode a message."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
from stream_fixtures import MS, ROBOT, T0, add, joints, top, wrist

from dit_policy_ros.embodiment import Camera, Embodiment
from dit_policy_ros.runtime import observations
from dit_policy_ros.runtime.messages import MessageError, decode_image, stamp_ns
from dit_policy_ros.runtime.observations import Observation, ObservationBuffer, ObservationError


def recording(duration_ms: int) -> list[tuple[str, Any]]:
    """Top every 60 ms, wrist every 70 ms, joints every 10 ms; every value is the stamp in units of 10 ms."""
    messages: list[tuple[str, Any]] = []
    for ms in range(0, duration_ms, 10):
        t = T0 + ms * MS
        if ms % 60 == 0:
            messages.append(("top/image_raw", top(t, ms // 10)))
        if ms % 70 == 0:
            messages.append(("wrist/compressed", wrist(t, ms // 10)))
        messages.append(("joint_states", joints(t, ms / 10)))
    return messages


def filled(n_obs_steps: int = 2, duration_ms: int = 600) -> ObservationBuffer:
    buffer = ObservationBuffer(ROBOT, n_obs_steps)
    add(buffer, *recording(duration_ms))
    return buffer


def values(window: Observation, camera: str) -> list[int]:
    """The value of each of a camera's pictures, which are of one value each."""
    assert all(image.min() == image.max() for image in window.images[camera])
    return [int(image[0, 0, 0]) for image in window.images[camera]]


def test_a_frame_is_what_each_stream_said_last_as_of_the_tick() -> None:
    frame = filled().frame(T0 + 405 * MS)
    # 360 = 6 * 60 and 350 = 5 * 70 are the last stamps not after 405 ms.
    assert np.unique(frame["observation.images.top"]).tolist() == [36]
    assert np.unique(frame["observation.images.wrist"]).tolist() == [35]
    assert frame["observation.state"].tolist() == [40.0, -40.0]
    assert frame["observation.images.top"].shape == (4, 6, 3)
    assert frame["observation.state"].dtype == np.float32


def test_a_stamp_at_the_tick_counts_and_one_nanosecond_later_does_not() -> None:
    buffer = filled()
    assert buffer.frame(T0 + 420 * MS)["observation.images.top"].max() == 42
    assert buffer.frame(T0 + 420 * MS - 1)["observation.images.top"].max() == 36


def test_a_window_is_the_frames_one_step_apart_earliest_first() -> None:
    buffer = filled(n_obs_steps=3)
    window = buffer.window(T0 + 405 * MS)
    assert window.tensors()["observation.images.top"].shape == (3, 3, 4, 6)
    assert window.tensors()["observation.images.wrist"].shape == (3, 3, 8, 16)
    # As of 205, 305 and 405 ms.
    assert values(window, "top") == [18, 30, 36]
    assert values(window, "wrist") == [14, 28, 35]
    assert window.state.tolist() == [[20, -20], [30, -30], [40, -40]]
    assert window.ages == pytest.approx({"top": 0.045, "wrist": 0.055, "state": 0.005})
    for k, t in enumerate((205, 305, 405)):
        frame = buffer.frame(T0 + t * MS)
        for key, array in window.tensors().items():
            step = array[k].transpose(1, 2, 0) if array.ndim == 4 else array[k]
            assert np.array_equal(step, frame[key])


def test_channels_come_first_and_arrays_are_ready_for_torch() -> None:
    torch = pytest.importorskip("torch")
    image = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    buffer = filled(n_obs_steps=1)
    message = top(T0 + 600 * MS, 0)
    message.data = image.tobytes()
    add(buffer, ("top/image_raw", message))
    tensors = buffer.window(T0 + 600 * MS).tensors()
    assert list(tensors) == ["observation.images.top", "observation.images.wrist", "observation.state"]
    for array in tensors.values():
        assert array.flags.c_contiguous
        assert array.flags.writeable
    got = torch.from_numpy(tensors["observation.images.top"])
    assert torch.equal(got[0], torch.from_numpy(image).permute(2, 0, 1))


def test_steps_are_whole_nanoseconds_at_a_rate_that_does_not_divide_a_second() -> None:
    robot = Embodiment("t", 30, "i", (Camera("top", "top/image_raw", "raw", 6, 4, 0.3),), 0.2, ROBOT.state, ())
    buffer = ObservationBuffer(robot, 2)
    step = 33_333_333  # round(1e9 / 30)
    for value, t in enumerate((T0 - step - 1, T0 - step, T0 - step + 1, T0)):
        add(buffer, ("top/image_raw", top(t, value)), ("joint_states", joints(t, value)))
    assert values(buffer.window(T0), "top") == [1, 3]


def test_the_order_of_arrival_plays_no_part() -> None:
    messages = recording(600)
    shuffled = messages.copy()
    random.Random(0).shuffle(shuffled)
    buffer = ObservationBuffer(ROBOT, 2)
    add(buffer, *shuffled)
    want, got = filled().window(T0 + 590 * MS).tensors(), buffer.window(T0 + 590 * MS).tensors()
    assert all(np.array_equal(got[key], want[key]) for key in want)
    assert buffer.statistics()["state"].late > 0
    assert buffer.statistics()["state"].received == 60


def test_nothing_yet_is_missing_and_names_the_topic() -> None:
    buffer = ObservationBuffer(ROBOT, 2)
    assert buffer.newest_common_ns() is None
    add(buffer, ("joint_states", joints(T0, 0)), ("top/image_raw", top(T0, 0)))
    with pytest.raises(ObservationError, match="no message yet on topic 'wrist/compressed'") as caught:
        buffer.window(T0)
    assert caught.value.code == "INPUT_MISSING"
    assert buffer.newest_common_ns() is None


def test_a_history_shorter_than_the_window_is_missing_not_padded() -> None:
    buffer = filled(n_obs_steps=2, duration_ms=100)
    buffer.frame(T0 + 99 * MS)
    with pytest.raises(ObservationError, match="no message as old as") as caught:
        buffer.window(T0 + 99 * MS)
    assert caught.value.code == "INPUT_MISSING"
    buffer.window(T0 + 100 * MS)


@pytest.mark.parametrize(("stopped", "limit_ms"), [("top/image_raw", 300), ("joint_states", 200)])
def test_a_stream_that_stops_is_stale_once_past_its_max_age(stopped: str, limit_ms: int) -> None:
    buffer = ObservationBuffer(ROBOT, 2)
    add(buffer, *[entry for entry in recording(1500) if entry[0] != stopped or stamp_ns(entry[1]) <= T0 + 600 * MS])
    last = T0 + 600 * MS
    buffer.window(last + limit_ms * MS)
    with pytest.raises(ObservationError, match=stopped) as caught:
        buffer.window(last + limit_ms * MS + 1)
    assert caught.value.code == "INPUT_STALE"
    assert f"{limit_ms / 1e3} s" in str(caught.value)


def test_a_driver_that_does_not_stamp_is_told_apart() -> None:
    buffer = filled()
    buffer.clear()
    add(buffer, ("top/image_raw", top(0, 1)), ("wrist/compressed", wrist(T0, 1)), ("joint_states", joints(T0, 1)))
    with pytest.raises(ObservationError, match="header stamp is zero"):
        buffer.frame(T0)


def test_latest_is_the_window_at_the_newest_common_instant() -> None:
    buffer = filled()  # newest stamps: top 540, wrist 560, joints 590
    assert buffer.newest_common_ns() == T0 + 540 * MS
    latest = buffer.latest(T0 + 600 * MS)
    assert latest.stamp_ns == T0 + 540 * MS
    assert latest.ages["top"] == 0.0
    assert latest.state[-1].tolist() == [54.0, -54.0]


def test_latest_is_never_of_a_stream_that_has_stopped() -> None:
    buffer = filled()
    add(buffer, *[("joint_states", joints(T0 + ms * MS, 0)) for ms in range(600, 900, 10)])
    assert buffer.newest_common_ns() == T0 + 540 * MS  # a window exists there, but it is old by now
    with pytest.raises(ObservationError, match="top/image_raw") as caught:
        buffer.latest(T0 + 890 * MS)
    assert caught.value.code == "INPUT_STALE"


def test_latest_refuses_a_clock_that_runs_ahead() -> None:
    buffer = filled()
    add(buffer, ("wrist/compressed", wrist(T0 + 5000 * MS, 1)))
    with pytest.raises(ObservationError, match=r"wrist/compressed.*4\.400 s in the future") as caught:
        buffer.latest(T0 + 600 * MS)
    assert caught.value.code == "INPUT_INVALID"


def test_a_clock_that_jumps_back_starts_every_stream_afresh() -> None:
    buffer = filled(duration_ms=3000)
    late = T0 + 2990 * MS - 1000 * MS
    add(buffer, ("joint_states", joints(late, 1)))  # one second behind the newest is merely late
    assert buffer.statistics()["state"].resets == 0
    add(buffer, *recording(600))
    # The first message of the new time is the top camera's; the others had nothing left to go back from.
    assert {name: counts.resets for name, counts in buffer.statistics().items()} == {"top": 1, "wrist": 0, "state": 0}
    window = buffer.window(T0 + 405 * MS)
    assert window.state.tolist() == [[30, -30], [40, -40]]
    assert buffer.newest_common_ns() == T0 + 540 * MS


def test_the_first_of_two_messages_of_one_stamp_stays() -> None:
    buffer = filled()
    before = buffer.frame(T0 + 590 * MS)["observation.state"].tolist()
    add(buffer, ("joint_states", joints(T0 + 590 * MS, 1234)), ("joint_states", joints(T0 + 500 * MS, 1234)))
    assert buffer.frame(T0 + 590 * MS)["observation.state"].tolist() == before
    assert buffer.frame(T0 + 505 * MS)["observation.state"].tolist() == [50, -50]
    assert buffer.statistics()["state"].duplicates == 2


def test_memory_is_bounded() -> None:
    buffer = ObservationBuffer(ROBOT, 2)
    for k in range(20_000):
        buffer.add("joint_states", T0 + k * 10 * MS, joints(T0 + k * 10 * MS, k))
    kept = len(buffer._state.samples)
    # max_age 0.2 + slowest stream 0.3 + one step 0.1 + slack 1.0 = 1.6 s at 100 Hz
    assert kept == 161


def test_what_is_kept_suffices_for_the_slowest_window() -> None:
    """Another stream may lag by its max_age; the window at its newest stamp must still be found here."""
    buffer = ObservationBuffer(ROBOT, 2)
    add(buffer, *[e for e in recording(3000) if e[0] == "joint_states" or stamp_ns(e[1]) <= T0 + 2700 * MS])
    assert buffer.latest(T0 + 2960 * MS).stamp_ns == T0 + 2660 * MS


def test_each_image_is_decoded_once_and_only_if_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counting(message: Any, camera: Camera) -> np.ndarray:
        decoded.append(stamp_ns(message))
        return decode_image(message, camera)

    monkeypatch.setattr(observations, "decode_image", counting)
    buffer = filled(n_obs_steps=2)
    assert decoded == []  # add() decodes nothing
    buffer.window(T0 + 405 * MS)
    buffer.window(T0 + 405 * MS)
    assert len(decoded) == len(set(decoded)) == 4
    buffer.window(T0 + 505 * MS)  # shares its earlier step with the window before
    assert len(decoded) == len(set(decoded)) == 6


def test_an_undecodable_message_is_told_when_it_is_sampled() -> None:
    buffer = filled()
    bad = joints(T0 + 600 * MS, float("nan"))
    add(buffer, ("joint_states", bad))
    buffer.window(T0 + 599 * MS)
    with pytest.raises(MessageError, match="'a' is nan"):
        buffer.window(T0 + 600 * MS)


def test_an_unknown_topic_is_refused() -> None:
    with pytest.raises(KeyError, match="'scan' is not an observed topic, expected one of top/image_raw"):
        filled().add("scan", T0, None)


def test_measured_state_and_velocity() -> None:
    buffer = ObservationBuffer(ROBOT, 2)
    add(buffer, ("joint_states", joints(T0, 1.0, velocity=0.5)))
    position, velocity = buffer.measured(("b", "a"), T0 + 100 * MS)
    assert position.tolist() == [-1.0, 1.0]
    assert velocity is not None
    assert velocity.tolist() == [-0.5, 0.5]
    with pytest.raises(ObservationError) as caught:
        buffer.measured(("a",), T0 + 201 * MS)
    assert caught.value.code == "INPUT_STALE"


def test_velocity_comes_from_positions_where_none_is_measured() -> None:
    buffer = ObservationBuffer(ROBOT, 2)
    add(buffer, ("joint_states", joints(T0, 1.0)))
    assert buffer.measured(("a",), T0)[1] is None
    add(buffer, *[("joint_states", joints(T0 + ms * MS, 1.0 + ms / 500)) for ms in range(10, 100, 10)])
    velocity = buffer.measured(("a", "b"), T0 + 90 * MS)[1]
    assert velocity == pytest.approx([2.0, -2.0], abs=1e-4)  # 1 rad in 500 ms


def test_callbacks_and_inference_may_run_at_once() -> None:
    buffer = filled(duration_ms=1000)
    errors: list[BaseException] = []
    done, sampled = threading.Event(), threading.Event()

    def sample() -> None:
        try:
            while not done.is_set():
                window = buffer.latest(buffer.newest_common_ns() or 0)
                # Joints are stamped every 10 ms with their own time, so each step tells when it was measured.
                wanted = [(window.stamp_ns - T0 - age * MS) // (10 * MS) for age in (100, 0)]
                assert window.state[:, 0].tolist() == wanted
                sampled.set()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=sample)
    thread.start()
    for count, (topic, message) in enumerate(recording(4000)[len(recording(1000)) :]):
        buffer.add(topic, stamp_ns(message), message)
        if count % 10 == 0:  # some 80 ms of messages for a window: faster, and they outrun what is kept
            sampled.clear()
            assert sampled.wait(timeout=10) or errors
    done.set()
    thread.join()
    assert errors == []


def test_zero_observation_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="n_obs_steps is 0"):
        ObservationBuffer(ROBOT, 0)
