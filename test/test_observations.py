"""The stamped buffer: as-of sampling 1/fps apart, ages, disorder, resets, memory, one decode a message."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
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
    # max_age 0.2 + slowest stream 0.3 + one step 0.1 + slack 1.0 = 1.6 s at 100 Hz, and one before
    assert kept == 162


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


def test_cameras_stamped_too_far_apart_are_refused_by_name() -> None:
    buffer = ObservationBuffer(replace(ROBOT, max_camera_skew=0.1), 2)
    add(buffer, *[e for e in recording(1000) if e[0] != "top/image_raw" or stamp_ns(e[1]) <= T0 + 600 * MS])
    # As of 699 ms the wrist's is of 630 ms, 30 ms after the top's last; as of 770 ms it is of 770 ms.
    assert buffer.window(T0 + 699 * MS).ages["top"] == pytest.approx(0.099)
    for sample in (buffer.window, buffer.frame):
        with pytest.raises(ObservationError) as caught:
            sample(T0 + 770 * MS)
        assert caught.value.code == "INPUT_SKEWED"
        for word in ("camera 'top' is 0.170 s behind camera 'wrist'", "0.1 s", "max_camera_skew", "its rate"):
            assert word in str(caught.value)


def test_the_skew_allowed_is_allowed() -> None:
    buffer = ObservationBuffer(replace(ROBOT, max_camera_skew=0.1), 1)
    add(buffer, ("joint_states", joints(T0, 0)), ("top/image_raw", top(T0, 0)))
    add(buffer, ("wrist/compressed", wrist(T0 - 100 * MS, 0)))
    buffer.window(T0)
    buffer = ObservationBuffer(replace(ROBOT, max_camera_skew=0.1), 1)
    add(buffer, ("joint_states", joints(T0, 0)), ("top/image_raw", top(T0, 0)))
    add(buffer, ("wrist/compressed", wrist(T0 - 100 * MS - 1, 0)))
    with pytest.raises(ObservationError, match=r"camera 'wrist' is 0\.100 s behind camera 'top'"):
        buffer.window(T0)


def test_rate_and_age_of_a_stream_and_of_one_that_stopped() -> None:
    buffer = filled(duration_ms=3000)
    now = buffer.statistics(T0 + 3000 * MS)
    assert {name: stream.rate for name, stream in now.items()} == pytest.approx(
        {"top": 1 / 0.06, "wrist": 1 / 0.07, "state": 100}
    )
    assert {name: stream.age for name, stream in now.items()} == pytest.approx(
        {"top": 0.06, "wrist": 0.06, "state": 0.01}
    )
    later = buffer.statistics(T0 + 8000 * MS)["top"]
    assert (later.rate, later.age) == (0.0, pytest.approx(5.06))
    never = ObservationBuffer(ROBOT, 2).statistics(T0)["top"]
    assert never.rate == 0.0
    assert np.isnan(never.age)


def test_frames_ahead_are_those_of_a_chunk_that_starts_now_and_shared_with_it() -> None:
    buffer = filled(n_obs_steps=2)
    ahead = list(buffer.frames_ahead(T0 + 600 * MS))
    assert [frame.camera for frame in ahead] == ["top", "wrist", "top", "wrist"]
    window = buffer.latest(T0 + 600 * MS)
    for camera in ("top", "wrist"):
        frames = [frame for frame in ahead if frame.camera == camera]
        assert tuple(frame.stamp_ns for frame in frames) == window.image_stamps_ns[camera]
        assert all(frame.image is image for frame, image in zip(frames, window.images[camera], strict=True))


def test_frames_ahead_are_decoded_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counting(message: Any, camera: Camera) -> np.ndarray:
        decoded.append(stamp_ns(message))
        return decode_image(message, camera)

    monkeypatch.setattr(observations, "decode_image", counting)
    frames = filled().frames_ahead(T0 + 600 * MS)
    for count in range(1, 5):
        next(frames)
        assert len(decoded) == count


def test_frames_ahead_leave_out_what_the_chunk_will_be_refused_for() -> None:
    buffer = filled()  # newest common instant 540 ms: as of 440 ms 420 and 420, as of 540 ms 540 and 490
    buffer._cameras[1].samples[-2].message.data = b""
    assert buffer._cameras[1].samples[-2].stamp_ns == T0 + 490 * MS
    assert [(frame.camera, frame.stamp_ns - T0) for frame in buffer.frames_ahead(T0 + 600 * MS)] == [
        ("top", 420 * MS),
        ("wrist", 420 * MS),
        ("top", 540 * MS),
    ]
    assert list(ObservationBuffer(ROBOT, 2).frames_ahead(T0)) == []
    short = filled(n_obs_steps=2, duration_ms=70)
    assert [frame.stamp_ns - T0 for frame in short.frames_ahead(T0 + 70 * MS)] == [0, 0]


def test_arrivals_are_what_came_since_and_all_after_the_clocks_went_back() -> None:
    buffer = filled(duration_ms=100)
    first = buffer.arrivals({}, epoch=-1)
    assert {name: [t - T0 for t, _ in came] for name, came in first.messages.items()} == {
        "top": [0, 60 * MS],
        "wrist": [0, 70 * MS],
        "state": [ms * MS for ms in range(0, 100, 10)],
    }
    since = {"top": T0 + 60 * MS, "wrist": T0, "state": T0 + 80 * MS}
    second = buffer.arrivals(since, first.epoch)
    assert {name: [t - T0 for t, _ in came] for name, came in second.messages.items()} == {
        "top": [],
        "wrist": [70 * MS],
        "state": [90 * MS],
    }
    add(buffer, ("joint_states", joints(T0 + 90 * MS, 0)), ("joint_states", joints(T0 - 5000 * MS, 0)))
    third = buffer.arrivals(since, first.epoch)
    assert third.epoch != first.epoch
    assert third.duplicates == {"top": 0, "wrist": 0, "state": 1}
    assert [t - T0 for t, _ in third.messages["state"]] == [-5000 * MS]


def test_a_clock_that_jumps_forward_makes_what_was_before_stale() -> None:
    buffer = filled(duration_ms=1000)
    with pytest.raises(ObservationError, match="or this one jumped forward") as caught:
        buffer.latest(T0 + 60_000 * MS)  # this clock alone
    assert caught.value.code == "INPUT_STALE"
    for ms in (60_000, 60_060, 60_090):
        for topic, make in MAKE.items():
            add(buffer, (topic, make(T0 + ms * MS, 0)))
    with pytest.raises(ObservationError, match=r"newest message is 59\.030 s old") as caught:
        buffer.latest(T0 + 60_090 * MS)  # the step before is from before the jump
    assert caught.value.code == "INPUT_STALE"
    for topic, make in MAKE.items():
        add(buffer, (topic, make(T0 + 60_100 * MS, 0)))
    assert buffer.latest(T0 + 60_100 * MS).image_stamps_ns["top"] == (T0 + 60_000 * MS, T0 + 60_100 * MS)


def test_messages_of_before_a_reset_are_dropped_and_told() -> None:
    buffer = filled(duration_ms=3000)
    add(buffer, ("joint_states", joints(T0, 0)))
    for ms in (2990, 3000):
        add(buffer, ("top/image_raw", top(T0 + ms * MS, 0)))
    assert buffer.statistics()["top"].before_reset == 2
    with pytest.raises(ObservationError, match=r"top/image_raw.*no message since the clocks went backwards but 2"):
        buffer.latest(T0)
    add(buffer, ("top/image_raw", top(T0, 1)), ("wrist/compressed", wrist(T0, 1)))
    assert buffer.frame(T0)["observation.images.top"].max() == 1
    # Settled: a stream may then run ahead, as any stream that jumps forward does.
    add(buffer, ("top/image_raw", top(T0 + 3000 * MS, 0)))
    assert buffer.statistics()["top"].before_reset == 2


@dataclass
class BruteForce:
    """All messages since the clocks went back, searched one by one: stamp -> the first message's value, by topic."""

    robot: Embodiment
    n_obs_steps: int
    kept: dict[str, dict[int, int]] = field(default_factory=dict)

    def add(self, topic: str, stamp: int, value: int) -> None:
        kept = self.kept.setdefault(topic, {})
        if kept and stamp < max(kept) - 10**9:
            self.kept = {topic: {stamp: value}}
        else:
            kept.setdefault(stamp, value)

    def newest(self) -> dict[str, int]:
        return {topic: max(kept) for topic, kept in self.kept.items()}

    def window(self, t_ns: int) -> list[dict[str, int]] | str:
        """{topic: value} of each step, the earliest first; or the code of what is wrong."""
        frames = []
        for step in range(self.n_obs_steps):
            frame, stamps = {}, {}
            as_of = t_ns - round(step * 1e9 / self.robot.fps)
            for sensor in [*self.robot.cameras, self.robot.state]:
                known = [stamp for stamp in self.kept.get(sensor.topic, {}) if stamp <= as_of]
                if not known:
                    return "INPUT_MISSING"
                if as_of - max(known) > round(sensor.max_age * 1e9):
                    return "INPUT_STALE"
                stamps[sensor.topic] = max(known)
                frame[sensor.topic] = self.kept[sensor.topic][max(known)]
            frames.append((frame, [stamps[camera.topic] for camera in self.robot.cameras]))
        skews = frames[0][1]
        if max(skews) - min(skews) > round(self.robot.max_camera_skew * 1e9):
            return "INPUT_SKEWED"
        return [frame for frame, _ in reversed(frames)]


def outcome(buffer: ObservationBuffer, t_ns: int) -> list[dict[str, int]] | str:
    try:
        window = buffer.window(t_ns)
    except ObservationError as error:
        return error.code
    steps = zip(values(window, "top"), values(window, "wrist"), window.state[:, 0], strict=True)
    return [{"top/image_raw": a, "wrist/compressed": b, "joint_states": int(c)} for a, b, c in steps]


MAKE = {"top/image_raw": top, "wrist/compressed": wrist, "joint_states": joints}


@pytest.mark.parametrize("seed", range(8))
def test_a_window_is_what_a_search_through_everything_finds(seed: int) -> None:
    """Streams with jitter, gaps, late, doubled and looped messages, and clocks that jump back and forward."""
    rng = random.Random(seed)
    robot = replace(ROBOT, max_camera_skew=rng.choice([0.03, 0.1, 0.3]))
    buffer, everything = ObservationBuffer(robot, 3), BruteForce(robot, 3)
    seen: Counter[str] = Counter()
    clock = T0
    for step in range(1000):
        clock += rng.randrange(30) * MS
        if rng.random() < 0.004:
            clock += rng.choice([-4000, -1500, 700, 5000]) * MS
        topic = rng.choice(list(MAKE))
        late = rng.choice([0, 0, 0, 0, 0, 50, 300]) * MS
        stamp = clock - late - clock % (10 * MS)  # of a raster, so that stamps double
        add(buffer, (topic, MAKE[topic](stamp, step % 251)))
        everything.add(topic, stamp, step % 251)
        common = min(everything.newest().values())
        for t_ns in (common, common + rng.randrange(300) * MS, common - rng.randrange(300) * MS):
            if max(everything.newest().values()) - t_ns > 10**9:
                continue  # so old that not all of it is kept
            expected = everything.window(t_ns)
            assert outcome(buffer, t_ns) == expected
            seen[expected if isinstance(expected, str) else "window"] += 1
    assert seen["window"] > 200, seen
    assert seen.keys() >= {"INPUT_MISSING", "INPUT_STALE"}, seen


@pytest.mark.parametrize("seed", range(30))
def test_no_window_mixes_what_was_before_a_jump_back_with_what_came_after(seed: int) -> None:
    """Each stream is delayed by its own way, so old messages of one come after new ones of another."""
    rng = random.Random(seed)
    back = rng.uniform(1.5, 4.0)
    jump = 3.0  # s after the start
    sent: list[tuple[float, int, str, int]] = []  # arrival in s, stamp, topic, 1 before the jump and 2 after
    for topic, period in (("top/image_raw", 0.06), ("wrist/compressed", 0.07), ("joint_states", 0.01)):
        # A stream may come back late; if all did, no more than a late message could be seen of the jump.
        delay, silence = rng.uniform(0, 0.3), rng.choice([0.0, 2.0]) if period > 0.01 else 0.0
        for k in range(round(7 / period)):
            moment = k * period
            if jump <= moment < jump + silence:
                continue
            before = moment < jump
            stamp = T0 + round((moment if before else moment - back) * 1e9)
            sent.append((moment + delay, stamp, topic, 1 if before else 2))
    buffer = ObservationBuffer(ROBOT, 2)
    mixed = set()
    for _, stamp, topic, age in sorted(sent):
        add(buffer, (topic, MAKE[topic](stamp, age)))
        newest = [stream.newest_ns for stream in buffer._streams.values() if stream.newest_ns]
        for t_ns in newest:
            got = outcome(buffer, t_ns)
            if not isinstance(got, str):
                ages = {value for frame in got for value in frame.values()}
                assert len(ages) == 1, (got, t_ns - T0)
                mixed |= ages
    assert mixed == {1, 2}  # windows were had before and after
