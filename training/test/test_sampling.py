"""Rows of made-up bags: what each holds is computed here again, from the formulas that made the bag."""

import gc
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.message import BagMessage
from dit_policy_training.conversion.options import (
    ConvertConfig,
    DepthCamera,
    EpisodeOptions,
    OptionError,
    Source,
    TimeOptions,
    VectorOptions,
)
from dit_policy_training.conversion.recording import Recording
from dit_policy_training.conversion.sampling import Row, Sampler
from sampled import Sampled, sample, seconds
from toy_robot import (
    JOINTS,
    START_NS,
    STORE,
    Recorded,
    messages,
    picture,
    position,
    string,
    trajectory,
    velocity,
    with_header_ns,
    write_bag,
)

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.messages import stamp_ns
from dit_policy_ros.runtime.observations import ObservationBuffer

CAMERAS = {"side": "side/image_raw", "hand": "hand/image_raw/compressed"}
COMMANDS = "arm_controller/joint_trajectory"
PERIOD_NS = 100_000_000


@pytest.fixture(scope="session")
def recorded() -> list[Recorded]:
    return messages(3.0)


@pytest.fixture(scope="session")
def sampled(recorded: list[Recorded], embodiment: Embodiment, tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    return sample(tmp_path_factory.mktemp("bags"), recorded, embodiment)


def test_ticks_are_an_integer_grid_from_the_last_streams_start_to_the_first_ones_end(
    recorded: list[Recorded], sampled: Sampled
) -> None:
    rows = sampled.rows
    first_command_ns = next(m.receive_ns for m in recorded if m.topic == COMMANDS)
    assert [row.stamp_ns for row in rows] == [first_command_ns + (k - 1) * PERIOD_NS for k in range(len(rows))]
    newest = {t: max(stamp_ns(m.msg) for m in recorded if m.topic == t) for t in (*CAMERAS.values(), "joint_states")}
    end_ns = max(m.receive_ns for m in recorded)
    last_ns = rows[-1].stamp_ns
    assert last_ns <= min(newest.values())
    assert last_ns + PERIOD_NS <= end_ns
    assert last_ns + PERIOD_NS > min(newest.values()) or last_ns + 2 * PERIOD_NS > end_ns
    assert sampled.account.warm_up == pytest.approx(seconds(first_command_ns) - 0.1)
    assert sampled.account.warm_up_stream == "action arm"
    assert sampled.account.trimmed == pytest.approx((end_ns - min(newest.values())) / 1e9)


def test_fps_of_the_rows_is_as_asked(recorded: list[Recorded], embodiment: Embodiment, tmp_path: Path) -> None:
    rows = sample(tmp_path, recorded, embodiment, fps=30).rows
    steps = {later.stamp_ns - earlier.stamp_ns for earlier, later in pairwise(rows)}
    assert steps == {33_333_333, 33_333_334}
    assert rows[30].stamp_ns - rows[0].stamp_ns == 10**9
    with pytest.raises(OptionError, match=r"--fps=0: expected 1 or more"):
        sample(tmp_path, recorded, embodiment, fps=0)


@pytest.mark.parametrize("delay_ns", [0, 180_000_000])
def test_a_tick_sees_the_newest_image_and_joints_stamped_before_it(
    embodiment: Embodiment, tmp_path: Path, delay_ns: int
) -> None:
    """Also where a camera's images arrive later than the tick after them."""

    def late(m: Recorded) -> Iterable[Recorded]:
        yield replace(m, receive_ns=m.receive_ns + delay_ns) if m.topic == CAMERAS["side"] else m

    recorded = messages(3.0, edit=late)
    rows = sample(tmp_path, recorded, embodiment).rows
    assert len(rows) > 20
    stamps = sorted(stamp_ns(m.msg) for m in recorded if m.topic == CAMERAS["side"])
    for row in rows:
        index = max(i for i, stamp in enumerate(stamps) if stamp <= row.stamp_ns)
        np.testing.assert_array_equal(row.frame["observation.images.side"], picture(index, 48, 32))
        assert row.ages["side"] == pytest.approx((row.stamp_ns - stamps[index]) / 1e9)
        measured_at = np.floor(seconds(row.stamp_ns) * 50 + 1e-6) / 50
        expected = np.float32([position(joint, measured_at) for joint in JOINTS])
        np.testing.assert_array_equal(row.frame["observation.state"], expected)


def test_rows_are_the_windows_of_the_nodes_buffer(
    recorded: list[Recorded], sampled: Sampled, embodiment: Embodiment
) -> None:
    buffer = ObservationBuffer(embodiment, n_obs_steps=1)
    pending = iter(m for m in recorded if m.topic in (*CAMERAS.values(), "joint_states"))
    for row in sampled.rows:
        while (buffer.newest_common_ns() or 0) < row.stamp_ns:
            message = next(pending)
            buffer.add(message.topic, stamp_ns(message.msg), message.msg)
        window = buffer.window(row.stamp_ns).tensors()
        for camera in CAMERAS:
            key = f"observation.images.{camera}"
            np.testing.assert_array_equal(window[key][0].transpose(1, 2, 0), row.frame[key])
        assert window["observation.state"][0].tobytes() == row.frame["observation.state"].tobytes()


def test_streams_taken_nearest_and_interpolated(
    recorded: list[Recorded], embodiment: Embodiment, tmp_path: Path
) -> None:
    options = TimeOptions(sampling={"side": "nearest", "state": "interpolate"})
    rows = sample(tmp_path, recorded, embodiment, time=options).rows
    assert len(rows) > 20
    stamps = np.array(sorted(stamp_ns(m.msg) for m in recorded if m.topic == CAMERAS["side"]))
    hands = np.array(sorted(stamp_ns(m.msg) for m in recorded if m.topic == CAMERAS["hand"]))
    times = START_NS + np.array([round(index / 50 * 1e9) for index in range(150)])
    earlier = 0
    for row in rows:
        index = int(np.argmin(np.abs(stamps - row.stamp_ns)))
        earlier += stamps[index] > row.stamp_ns
        np.testing.assert_array_equal(row.frame["observation.images.side"], picture(index, 48, 32))
        assert row.ages["hand"] == pytest.approx((row.stamp_ns - hands[hands <= row.stamp_ns].max()) / 1e9)
        # numpy's interpolation, of readings kept as float32.
        expected = [
            np.interp(
                (row.stamp_ns - START_NS) / 1e9,
                (times - START_NS) / 1e9,
                np.float32([position(joint, i / 50) for i in range(150)]),
            )
            for joint in JOINTS
        ]
        np.testing.assert_allclose(row.frame["observation.state"], expected, atol=1e-6)
    assert earlier > 3, "some picture nearest to its tick comes after it"


def test_a_camera_is_not_interpolated(recorded: list[Recorded], embodiment: Embodiment, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'side' cannot be interpolated, only joints"):
        sample(tmp_path, recorded, embodiment, time=TimeOptions(sampling={"side": "interpolate"}))
    with pytest.raises(OptionError, match=r"there is no 'left', expected of side, hand, state"):
        sample(tmp_path, recorded, embodiment, time=TimeOptions(sampling={"left": "nearest"}))


def test_receive_time_where_asked_for(recorded: list[Recorded], embodiment: Embodiment, tmp_path: Path) -> None:
    sampled = sample(tmp_path, recorded, embodiment, time=TimeOptions(stamps={"/side/image_raw": "receive"}))
    received = sorted(m.receive_ns for m in recorded if m.topic == CAMERAS["side"])
    for row in sampled.rows:
        index = max(i for i, at in enumerate(received) if at <= row.stamp_ns)
        np.testing.assert_array_equal(row.frame["observation.images.side"], picture(index, 48, 32))
        assert row.ages["side"] == pytest.approx((row.stamp_ns - received[index]) / 1e9)
    assert {stream.name: stream.stamp for stream in sampled.account.streams} == {
        "side": "receive",
        "hand": "header",
        "state": "header",
        "action arm": "receive",
        "instruction": "receive",
    }


def test_headers_for_every_topic_are_for_those_that_have_one(
    recorded: list[Recorded], sampled: Sampled, embodiment: Embodiment, tmp_path: Path
) -> None:
    gripper = Source("/gripper", fields=["data"])
    kind = "std_msgs/msg/Float64"
    number = STORE.types[kind](0.5)
    joints = [m for m in recorded if m.topic == "joint_states"]
    more = [*recorded, *(Recorded("gripper", m.receive_ns, number, kind) for m in joints)]
    options = TimeOptions(stamps={"*": "header"})
    every = sample(tmp_path, more, embodiment, time=options, vectors=VectorOptions(state=[gripper]))
    assert {stream.name: stream.stamp for stream in every.account.streams} == {
        "side": "header",
        "hand": "header",
        "state": "header",
        "state 0: /gripper": "receive",
        "action arm": "receive",
        "instruction": "receive",
    }
    for row, other in zip(every.rows, sampled.rows, strict=True):
        assert row.stamp_ns == other.stamp_ns
        np.testing.assert_array_equal(row.frame["observation.state"][:-1], other.frame["observation.state"])


@pytest.mark.parametrize(
    ("stamps", "said"),
    [
        (
            {"side/image": "receive"},
            r"--time\.stamps: 'side/image' is not read, only arm_controller/joint_trajectory, ",
        ),
        ({"joint_states": "arrival"}, r"--time\.stamps: joint_states is 'arrival', expected header or receive"),
        ({"instruction": "header"}, r"--time\.stamps: instruction is known by its receive time only"),
    ],
)
def test_stamps_that_make_no_sense_are_named(
    recorded: list[Recorded], embodiment: Embodiment, tmp_path: Path, stamps: dict[str, str], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        sample(tmp_path, recorded, embodiment, time=TimeOptions(stamps=stamps))


def test_the_account_tells_rates_ages_and_skews(recorded: list[Recorded], sampled: Sampled) -> None:
    for name, topic in CAMERAS.items():
        (stream,) = [each for each in sampled.account.streams if each.name == name]
        of_topic = [m for m in recorded if m.topic == topic]
        stamps = np.array([stamp_ns(m.msg) for m in of_topic])
        skews = np.array([stamp_ns(m.msg) - m.receive_ns for m in of_topic]) / 1e9
        ages = np.array([row.stamp_ns - stamps[stamps <= row.stamp_ns].max() for row in sampled.rows]) / 1e9
        assert stream.count == len(of_topic) == 45
        assert stream.rate == pytest.approx(44 / ((stamps.max() - stamps.min()) / 1e9))
        assert stream.longest_pause == pytest.approx(np.diff(stamps).max() / 1e9)
        quantile = "inverted_cdf"
        assert stream.age_p50 == pytest.approx(np.quantile(ages, 0.5, method=quantile), abs=1e-4)
        assert stream.age_p95 == pytest.approx(np.quantile(ages, 0.95, method=quantile), abs=1e-4)
        assert stream.age_max == pytest.approx(ages.max())
        assert stream.skew_median == pytest.approx(np.quantile(skews, 0.5, method=quantile), abs=1e-4)
        assert stream.skew_p95 == pytest.approx(np.quantile(-skews, 0.95, method=quantile), abs=1e-4)
        assert stream.skew_max == pytest.approx(np.abs(skews).max())
    assert sampled.account.gaps == []
    assert sampled.account.from_json(sampled.account.as_json()) == sampled.account


def test_task_follows_the_instruction_topic(embodiment: Embodiment, tmp_path: Path) -> None:
    def change(m: Recorded) -> Iterable[Recorded]:
        yield m
        if m.topic == "instruction":
            yield replace(m, receive_ns=START_NS + 1_500_000_000, msg=string("  push the green block\n"))

    sampled = sample(tmp_path, messages(3.0, edit=change), embodiment)
    for row in sampled.rows:
        late = row.stamp_ns >= START_NS + 1_500_000_000
        assert row.task == ("push the green block" if late else "push the red block")
    (episode,) = sampled.account.episodes
    first_green = next(i for i, row in enumerate(sampled.rows) if "green" in row.task)
    assert episode.tasks == [(0, "push the red block"), (first_green, "push the green block")]


def test_a_task_by_hand_is_for_bags_without_instructions(embodiment: Embodiment, tmp_path: Path) -> None:
    silent = messages(1.0, edit=lambda m: [] if m.topic == "instruction" else [m])
    with pytest.raises(ValueError, match=r"no message on instruction; .*/joint_states.*--episodes\.task='"):
        sample(tmp_path, silent, embodiment)
    given = EpisodeOptions(task=" fold the towel ")
    assert {row.task for row in sample(tmp_path, silent, embodiment, episodes=given).rows} == {"fold the towel"}
    told = sample(tmp_path, messages(1.0), embodiment, episodes=given)
    assert {row.task for row in told.rows} == {"push the red block"}
    assert any("its own instructions" in note for note in told.account.notes)


def test_an_instruction_of_blanks_refuses_the_bag(embodiment: Embodiment, tmp_path: Path) -> None:
    def blank(m: Recorded) -> Iterable[Recorded]:
        yield replace(m, msg=string("  ")) if m.topic == "instruction" else m

    with pytest.raises(ValueError, match=r"the instruction on instruction at \d+\.\d{3} s is empty"):
        sample(tmp_path, messages(1.0, edit=blank), embodiment)


def test_velocities_in_the_state(recorded: list[Recorded], embodiment: Embodiment, tmp_path: Path) -> None:
    vectors = VectorOptions(state_fields=["position", "velocity"])
    for row in sample(tmp_path, recorded, embodiment, vectors=vectors).rows:
        at = np.floor(seconds(row.stamp_ns) * 50 + 1e-6) / 50
        expected = [*(position(joint, at) for joint in JOINTS), *(velocity(joint, at) for joint in JOINTS)]
        np.testing.assert_array_equal(row.frame["observation.state"], np.float32(expected))
    with pytest.raises(ValueError, match=r"joint_states, stamp 1700000000\.\d{9}: found 0 values of 'effort'"):
        sample(tmp_path, recorded, embodiment, vectors=VectorOptions(state_fields=["position", "effort"]))


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_the_next_state_where_no_command_was_recorded(embodiment: Embodiment, tmp_path: Path, mode: str) -> None:
    vectors = VectorOptions(action_from="next_state", action_mode=mode)
    uncommanded = messages(2.0, edit=lambda m: [] if m.topic == COMMANDS else [m])
    rows = sample(tmp_path, uncommanded, embodiment, vectors=vectors).rows
    assert len(rows) > 15
    for row in rows:
        now, later = (np.floor(seconds(ns) * 50 + 1e-6) / 50 for ns in (row.stamp_ns, row.stamp_ns + PERIOD_NS))
        expected = np.array([np.float32(position(joint, later)) for joint in ("turn", "lift")], dtype=np.float64)
        if mode == "relative":
            expected -= np.float32([position(joint, now) for joint in ("turn", "lift")])
        np.testing.assert_array_equal(row.action, expected.astype(np.float32))


def test_an_action_relative_to_the_joints_measured(
    recorded: list[Recorded], sampled: Sampled, embodiment: Embodiment, tmp_path: Path
) -> None:
    relative = sample(tmp_path, recorded, embodiment, vectors=VectorOptions(action_mode="relative")).rows
    for row, absolute in zip(relative, sampled.rows, strict=True):
        measured = absolute.frame["observation.state"][[1, 0]]  # turn, lift
        np.testing.assert_allclose(row.action, absolute.action - measured, atol=2e-7)
    blind = replace(embodiment, state=replace(embodiment.state, joints=("lift", "reach")))
    with pytest.raises(OptionError, match=r"relative: the state does not measure turn"):
        sample(tmp_path, recorded, blind, vectors=VectorOptions(action_mode="relative"))


def test_the_layout_says_what_rows_hold(embodiment: Embodiment) -> None:
    vectors = VectorOptions(
        state_fields=["position", "velocity"],
        state=[
            Source("/left/pose", fields=["position", "orientation.w"]),
            Source("/right/pose", fields=["position.x"]),
            Source("wrench", fields=["force"]),
            Source("gripper/state", fields=["position", "effort"], joints=["finger"]),
        ],
        action=[Source("gripper/command", joints=["finger"])],
    )
    depth = {"below": DepthCamera("below/depth", "raw", 64, 48, 0.3)}
    config = ConvertConfig("bags", Path("e"), Path("o"), fps=30, vectors=vectors, depth=depth)
    layout = Layout.of(config, embodiment)
    assert (layout.fps, layout.robot_type) == (30, "toy")
    assert layout.cameras == {"observation.images.side": (32, 48), "observation.images.hand": (32, 32)}
    assert layout.depth == {"observation.images.below": depth["below"]}
    assert layout.state_names == (
        *("lift", "turn", "reach", "lift.velocity", "turn.velocity", "reach.velocity"),
        *("left.pose.position.x", "left.pose.position.y", "left.pose.position.z", "left.pose.orientation.w"),
        *("right.pose.position.x", "wrench.force.x", "wrench.force.y", "wrench.force.z"),
        *("finger", "finger.effort"),
    )
    assert layout.action_names == ("finger",)
    assert set(layout.topics) == {
        *("side/image_raw", "hand/image_raw/compressed", "below/depth", "joint_states", "instruction"),
        *("/left/pose", "/right/pose", "wrench", "gripper/state", "gripper/command"),
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vectors": VectorOptions(state_fields=["velocity"])}, r"state_fields=\['velocity'\]: expected position"),
        ({"vectors": VectorOptions(action_from="guess")}, "action_from=guess: expected commands or next_state"),
        ({"time": TimeOptions(max_skew=float("nan"))}, r"--time\.max_skew=nan: expected 0 or more"),
        ({"episodes": EpisodeOptions(idle_margin=-1)}, r"--episodes\.idle_margin=-1: expected 0 or more"),
        ({"vectors": VectorOptions(action_mode="delta")}, "action_mode=delta: expected absolute or relative"),
        ({"vectors": VectorOptions(state=[Source("pose")])}, "pose: neither joints nor fields"),
        (
            {"vectors": VectorOptions(state=[Source("pose", fields=["position"], sampling="interpolate")])},
            "only joints are interpolated",
        ),
        ({"vectors": VectorOptions(state=[Source("other", joints=["lift"])])}, "lift more than once"),
        ({"depth": {"side": DepthCamera("d", "raw", 4, 4, 0.1)}}, "'side' is a name that the embodiment has already"),
        ({"depth": {"d": DepthCamera("d", "zip", 4, 4, 0.1)}}, "d.transport is 'zip', expected raw or compressed"),
    ],
)
def test_options_that_make_no_sense_are_named(embodiment: Embodiment, options: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Layout.of(ConvertConfig("bags", Path("e"), Path("o"), **options), embodiment)


def test_a_topic_of_another_type_is_named(embodiment: Embodiment, tmp_path: Path) -> None:
    cameras = tuple(
        replace(camera, transport="compressed") if camera.name == "side" else camera for camera in embodiment.cameras
    )
    with pytest.raises(ValueError, match=r"side/image_raw: it carries sensor_msgs/msg/Image, .*/CompressedImage"):
        sample(tmp_path, messages(1.0), replace(embodiment, cameras=cameras))


def test_a_command_before_the_first_joint_state_does_not_start_an_episode(
    embodiment: Embodiment, tmp_path: Path
) -> None:
    early, late = START_NS + 337_000_000, START_NS + 1_337_000_000

    def edit(m: Recorded) -> Iterable[Recorded]:
        kept = m.receive_ns in (early, late) if m.topic == COMMANDS else True
        return [m] if kept and (m.topic != "joint_states" or m.receive_ns > START_NS + 700_000_000) else []

    sampled = sample(tmp_path, messages(3.0, edit=edit), embodiment)
    assert sampled.rows[0].stamp_ns == late - PERIOD_NS
    assert any("1 commands on arm_controller/joint_trajectory came before" in note for note in sampled.account.notes)


class Counted(BagMessage):
    """Counts the messages that somebody keeps."""

    __slots__ = ()
    alive = most = 0

    @classmethod
    def of(cls, message: BagMessage) -> "Counted":
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)
        return cls(message.topic, message.receive_ns, message._kind, message.raw)

    def __del__(self) -> None:
        Counted.alive -= 1


@pytest.mark.parametrize("sampling", ["as_of", "nearest"])
def test_memory_does_not_grow_with_the_bag(embodiment: Embodiment, tmp_path: Path, sampling: str) -> None:
    """Also while a camera is away, and before the last stream begins."""
    options = TimeOptions(sampling={"side": sampling})

    def kept(length: float) -> tuple[int, int]:
        def edit(m: Recorded) -> Iterable[Recorded]:
            at = seconds(m.receive_ns) / length
            absent = m.topic == CAMERAS["hand"] and 0.5 < at < 0.8
            if m.topic == "instruction":
                m = replace(m, receive_ns=START_NS + round(0.3 * length * 1e9))
            return [] if absent else [m]

        bag = write_bag(tmp_path / f"{length}", messages(length, edit=edit))
        gc.collect()  # else what is left of an earlier run dies while this one is counted
        Counted.alive = Counted.most = 0
        with Recording(bag) as recording:
            read = recording.messages
            recording.messages = lambda topics: map(Counted.of, read(topics))  # type: ignore[method-assign]
            config = ConvertConfig(str(bag), Path("e"), Path("o"), time=options)
            sampler = Sampler(recording, config, embodiment)
            rows = sum(isinstance(event, Row) for event in sampler.events())
        return Counted.most, rows

    (short, few), (long, many) = kept(8.0), kept(16.0)
    assert many > 1.8 * few
    assert long <= short * 1.1
    assert short < 3 * 80, "no more than three seconds of 15 + 15 + 50 messages a second"


def test_a_bag_too_short_for_a_row_says_so(embodiment: Embodiment, tmp_path: Path) -> None:
    def one_command(m: Recorded) -> Iterable[Recorded]:
        yield m
        if m.topic == "instruction":
            points = [(0.1, [0.0, 0.0], [0.0, 0.0])]
            yield Recorded(COMMANDS, START_NS + 250_000_000, trajectory(["lift", "turn"], points))

    with pytest.raises(ValueError, match=r"no row can be made: .*it is too short"):
        sample(tmp_path, messages(0.16, edit=one_command), embodiment)
    options = EpisodeOptions(min_seconds=0.9)
    with pytest.raises(ValueError, match=r"no episode can be kept: only 0\.800 s long, --episodes\.min_seconds=0\.9"):
        sample(tmp_path, messages(0.9), embodiment, episodes=options)


def test_header_stamps_of_a_simulated_clock_are_told(embodiment: Embodiment, tmp_path: Path) -> None:
    def simulated(m: Recorded) -> Iterable[Recorded]:
        if m.topic in (*CAMERAS.values(), "joint_states"):
            m = replace(m, msg=with_header_ns(m.msg, stamp_ns(m.msg) - START_NS + 10**9))
        yield m

    recorded = messages(2.0, edit=simulated)
    with pytest.raises(ValueError, match=r"simulated clock: record with `ros2 bag record --use-sim-time`"):
        sample(tmp_path, recorded, embodiment)
    rows = sample(tmp_path, recorded, embodiment, time=TimeOptions(stamps={"*": "receive"})).rows
    received = sorted(m.receive_ns for m in recorded if m.topic == CAMERAS["side"])
    assert len(rows) > 10
    for row in rows:
        index = max(i for i, at in enumerate(received) if at <= row.stamp_ns)
        np.testing.assert_array_equal(row.frame["observation.images.side"], picture(index, 48, 32))
