"""Bags to datasets: what each row holds is computed here again, from the formulas that made the bag."""

import io
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from dit_policy_training.bags import BagMessage, find_bags, read_messages
from dit_policy_training.commands import CommandError, ControllerOptions
from dit_policy_training.convert import ConvertConfig, convert, main
from dit_policy_training.episodes import Row, sample_rows, topics_of
from dit_policy_training.video import VideoEncoder, VideoOptions, _CameraVideo, frames_in
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from rich.console import Console
from scipy.interpolate import CubicHermiteSpline
from toy_robot import (
    JOINTS,
    START_NS,
    Recorded,
    messages,
    picture,
    position,
    trajectory,
    velocity,
    with_header_ns,
    write_bag,
)

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.messages import stamp_ns
from dit_policy_ros.runtime.observations import ObservationBuffer

CAMERA_TOPICS = {"side": "side/image_raw", "hand": "hand/image_raw/compressed"}
COMMANDS = "arm_controller/joint_trajectory"
PERIOD_NS = 100_000_000


def rows_of(
    recorded: Iterable[Recorded], embodiment: Embodiment, controller: ControllerOptions | None = None
) -> list[Row]:
    given = [BagMessage(m.topic, m.receive_ns, m.msg) for m in recorded]
    return list(sample_rows(given, embodiment, controller or ControllerOptions()))


def seconds(ns: int) -> float:
    return (ns - START_NS) / 1e9


@pytest.mark.parametrize("interface", ["follow_joint_trajectory", "position"])
def test_what_no_controller_of_trajectories_was_told_is_refused(embodiment: Embodiment, interface: str) -> None:
    (arm,) = embodiment.action_groups
    robot = replace(embodiment, action_groups=(replace(arm, interface=interface),))
    with pytest.raises(CommandError, match=f"arm_controller.*'arm' is commanded by '{interface}'.*'trajectory'"):
        rows_of(messages(0.5), robot)


def test_ticks_are_an_integer_grid_from_the_last_streams_start_to_the_end(embodiment: Embodiment) -> None:
    recorded = messages(3.0)
    rows = rows_of(recorded, embodiment)
    first_command_ns = next(m.receive_ns for m in recorded if m.topic == COMMANDS)
    assert [row.stamp_ns for row in rows] == [first_command_ns + (k - 1) * PERIOD_NS for k in range(len(rows))]
    # The last tick is the last one that all streams reach, and whose action lies within the recording.
    newest_ns = min(max(stamp_ns(m.msg) for m in recorded if m.topic == t) for t in CAMERA_TOPICS.values())
    end_ns = max(m.receive_ns for m in recorded)
    last_ns = rows[-1].stamp_ns
    assert last_ns <= newest_ns
    assert last_ns + PERIOD_NS <= end_ns
    assert last_ns + PERIOD_NS > newest_ns or last_ns + 2 * PERIOD_NS > end_ns


@pytest.mark.parametrize("delay_ns", [0, 180_000_000])
def test_a_tick_sees_the_newest_image_and_joints_stamped_before_it(embodiment: Embodiment, delay_ns: int) -> None:
    """Also where a camera's images arrive later than the tick after them."""

    def late(m: Recorded) -> Iterable[Recorded]:
        yield replace(m, receive_ns=m.receive_ns + delay_ns) if m.topic == CAMERA_TOPICS["side"] else m

    recorded = messages(3.0, edit=late)
    rows = rows_of(recorded, embodiment)
    assert len(rows) > 20
    for row in rows:
        stamps = [stamp_ns(m.msg) for m in recorded if m.topic == CAMERA_TOPICS["side"]]
        index = max(i for i, stamp in enumerate(sorted(stamps)) if stamp <= row.stamp_ns)
        np.testing.assert_array_equal(row.frame["observation.images.side"], picture(index, 48, 32))
        measured_at = np.floor(seconds(row.stamp_ns) * 50 + 1e-6) / 50
        expected = np.float32([position(joint, measured_at) for joint in JOINTS])
        np.testing.assert_array_equal(row.frame["observation.state"], expected)


@pytest.mark.parametrize("from_desired", [False, True])
def test_action_is_the_reference_of_the_controller_one_period_later(embodiment: Embodiment, from_desired: bool) -> None:
    recorded = messages(3.0)
    rows = rows_of(recorded, embodiment, ControllerOptions(interpolate_from_desired_state=from_desired))
    commands = [m for m in recorded if m.topic == COMMANDS]

    def reference(joint: str, ns: int) -> float:
        number = max(i for i, m in enumerate(commands) if m.receive_ns <= ns)
        return float(spline(commands[number], joint, reference_start(number, joint))(seconds(ns)))

    @cache
    def reference_start(number: int, joint: str) -> tuple[float, float]:
        """Position and velocity that a command set out from, by scipy's cubics."""
        began = seconds(commands[number].receive_ns)
        if number == 0 or not from_desired:
            return measured(joint, began)
        curve = spline(commands[number - 1], joint, reference_start(number - 1, joint))
        return float(curve(began)), float(curve(began, 1))

    def measured(joint: str, t: float) -> tuple[float, float]:
        state = max(
            (m for m in recorded if m.topic == "joint_states" and seconds(m.receive_ns) <= t),
            key=lambda m: m.receive_ns,
        )
        at = seconds(stamp_ns(state.msg))
        return float(np.float32(position(joint, at))), velocity(joint, at)

    def spline(command: Recorded, joint: str, start: tuple[float, float]) -> CubicHermiteSpline:
        began, column = seconds(command.receive_ns), command.msg.joint_names.index(joint)
        points = command.msg.points
        return CubicHermiteSpline(
            [began, began + 0.1, began + 0.2, began + 9.0],
            [start[0], *(p.positions[column] for p in points), points[-1].positions[column]],
            [start[1], *(p.velocities[column] for p in points), 0.0],
        )

    assert len(rows) > 20
    for row in rows:
        expected = [reference(joint, row.stamp_ns + PERIOD_NS) for joint in ("turn", "lift")]
        np.testing.assert_allclose(row.action, expected, atol=2e-6)


def test_task_follows_the_instruction_topic(embodiment: Embodiment) -> None:
    def change(m: Recorded) -> Iterable[Recorded]:
        yield m
        if m.topic == "instruction":
            yield replace(m, receive_ns=START_NS + 1_500_000_000, msg=replace(m.msg, data="push the green block"))

    rows = rows_of(messages(3.0, edit=change), embodiment)
    for row in rows:
        late = row.stamp_ns >= START_NS + 1_500_000_000
        assert row.task == ("push the green block" if late else "push the red block")
    assert {row.task for row in rows} == {"push the green block", "push the red block"}


def test_tasks_are_numbered_in_order_of_appearance(tmp_path: Path, embodiment_file: Path) -> None:
    tasks = [f"push the {colour} block" for colour in ("red", "violet", "green", "amber", "blue", "white")]

    def change(m: Recorded) -> Iterable[Recorded]:
        if m.topic != "instruction":
            return [m]
        after = [START_NS + 350_000_000 * index for index in range(len(tasks))]
        return [replace(m, receive_ns=ns, msg=replace(m.msg, data=task)) for ns, task in zip(after, tasks, strict=True)]

    write_bag(tmp_path / "bag", messages(3.0, edit=change))
    convert(ConvertConfig(str(tmp_path / "bag"), embodiment_file, tmp_path / "out"), Console(quiet=True))
    opened = LeRobotDataset("local/out", root=tmp_path / "out", video_backend="pyav")
    assert opened.meta.tasks.index.tolist() == tasks


def test_a_command_before_the_first_joint_state_does_not_start_an_episode(embodiment: Embodiment) -> None:
    early, late = START_NS + 337_000_000, START_NS + 1_337_000_000

    def edit(m: Recorded) -> Iterable[Recorded]:
        kept = m.receive_ns in (early, late) if m.topic == COMMANDS else True
        return [m] if kept and (m.topic != "joint_states" or m.receive_ns > START_NS + 700_000_000) else []

    assert rows_of(messages(3.0, edit=edit), embodiment)[0].stamp_ns == late - PERIOD_NS


def test_dataset_opens_with_lerobot_and_holds_the_rows(
    dataset: Path, bags: Path, embodiment: Embodiment, no_network: None
) -> None:
    opened = LeRobotDataset("local/toy", root=dataset, video_backend="pyav", return_uint8=True)
    assert opened.meta.robot_type == "toy"
    assert opened.fps == 10
    assert opened.features["action"]["names"] == ["turn", "lift"]
    assert opened.features["observation.state"]["names"] == ["lift", "turn", "reach"]
    assert opened.meta.tasks.index.tolist() == ["push the red block", "push the blue block"]
    assert Embodiment.load(dataset / "embodiment.yaml") == embodiment
    number = 0
    for index, bag in enumerate(find_bags(str(bags))):
        rows = list(sample_rows(read_messages(bag, topics_of(embodiment)), embodiment, ControllerOptions()))
        assert opened.meta.episodes[index]["length"] == len(rows)
        for k, row in enumerate(rows):
            item = opened[number]
            assert item["task"] == row.task
            assert item["timestamp"].item() == pytest.approx(k / 10)
            np.testing.assert_array_equal(item["action"], row.action)
            np.testing.assert_array_equal(item["observation.state"], row.frame["observation.state"])
            for camera in CAMERA_TOPICS:
                key = f"observation.images.{camera}"
                seen = item[key].permute(1, 2, 0).numpy().astype(float)
                assert psnr(seen, row.frame[key].astype(float)) > 35
            number += 1
    assert number == len(opened)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a - b) ** 2)))


def test_videos_keep_the_colour_of_small_things(tmp_path: Path) -> None:
    pictures = [picture(index, 48, 32) for index in range(12)]

    def error(options: VideoOptions) -> float:
        """Mean error over the 8 x 8 pixels of the coloured square, 0 to 255."""
        encoder = VideoEncoder(10, options.encoder_config())
        encoder.start_episode(["camera"], tmp_path, [])
        for rgb in pictures:
            encoder.feed_frame("camera", rgb)
        path, _ = encoder.finish_episode()["camera"]
        with av.open(str(path)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        squares = [
            np.abs(a[8:16, i : i + 8].astype(float) - b[8:16, i : i + 8])
            for i, (a, b) in enumerate(zip(decoded, pictures, strict=True))
        ]
        return float(np.mean(squares))

    assert error(VideoOptions()) < 4
    assert error(VideoOptions(pix_fmt="yuv420p")) > 8


def test_the_node_sees_bit_for_bit_what_the_converter_wrote(
    png_dataset: Path, bags: Path, embodiment: Embodiment
) -> None:
    """Each bag replayed into the node's buffer, its windows against the rows that LeRobotDataset reads back."""
    opened = LeRobotDataset(
        "local/toy",
        root=png_dataset,
        delta_timestamps={
            key: [-0.1, 0.0] for key in ("observation.images.side", "observation.images.hand", "observation.state")
        },
    )
    compared = 0
    for index, bag in enumerate(find_bags(str(bags))):
        replayed = list(read_messages(bag, topics_of(embodiment)))
        stamps = [row.stamp_ns for row in sample_rows(replayed, embodiment, ControllerOptions())]
        buffer = ObservationBuffer(embodiment, n_obs_steps=2)
        pending = iter(m for m in replayed if m.topic in (*CAMERA_TOPICS.values(), "joint_states"))
        first = opened.meta.episodes[index]["dataset_from_index"]
        for k, stamp in list(enumerate(stamps))[1:]:
            while (buffer.newest_common_ns() or 0) < stamp:
                message = next(pending)
                buffer.add(message.topic, stamp_ns(message.msg), message.msg)
            window = buffer.window(stamp).tensors()
            item = opened[first + k]
            for camera in CAMERA_TOPICS:
                written = (item[f"observation.images.{camera}"] * 255).round().to(torch.uint8).numpy()
                np.testing.assert_array_equal(window[f"observation.images.{camera}"], written)
            state = item["observation.state"].numpy()
            assert window["observation.state"].dtype == state.dtype == np.float32
            assert window["observation.state"].tobytes() == state.tobytes()
            compared += 1
    assert compared == len(opened) - 3


def without(topic: str) -> Callable[[Recorded], Iterable[Recorded]]:
    return lambda m: [] if m.topic == topic else [m]


def renamed(m: Recorded) -> Iterable[Recorded]:
    if m.topic == "joint_states":
        m = replace(m, msg=replace(m.msg, name=["wrong" if name == "turn" else name for name in m.msg.name]))
    yield m


def nan_joint(m: Recorded) -> Iterable[Recorded]:
    if m.topic == "joint_states" and m.receive_ns > START_NS + 1_000_000_000:
        m = replace(m, msg=replace(m.msg, position=np.full(4, np.nan)))
    yield m


def nan_command(m: Recorded) -> Iterable[Recorded]:
    if m.topic == COMMANDS and m.receive_ns > START_NS + 1_000_000_000:
        m = replace(m, msg=trajectory(["lift", "turn"], [(0.1, [np.nan, 0.0], [])]))
    yield m


def other_joint_commanded(m: Recorded) -> Iterable[Recorded]:
    if m.topic == COMMANDS:
        m = replace(m, msg=trajectory(["lift", "elbow"], [(0.1, [0.0, 0.0], [])]))
    yield m


def empty_instruction(m: Recorded) -> Iterable[Recorded]:
    yield replace(m, msg=replace(m.msg, data="  ")) if m.topic == "instruction" else m


def camera_stops(m: Recorded) -> Iterable[Recorded]:
    into = (m.receive_ns - START_NS) / 1e9
    return [] if m.topic == CAMERA_TOPICS["hand"] and 1.0 < into < 2.0 else [m]


def zero_stamps(m: Recorded) -> Iterable[Recorded]:
    yield replace(m, msg=with_header_ns(m.msg, 0)) if m.topic == CAMERA_TOPICS["side"] else m


def clock_jumps(m: Recorded) -> Iterable[Recorded]:
    if m.topic == CAMERA_TOPICS["side"]:
        off = 800_000_000 if m.receive_ns < START_NS + 1_300_000_000 else -800_000_000
        m = replace(m, msg=with_header_ns(m.msg, stamp_ns(m.msg) + off))
    yield m


def received_twice(m: Recorded) -> Iterable[Recorded]:
    yield m
    if m.topic == "joint_states" and m.receive_ns > START_NS + 2_500_000_000:
        yield m


FAULTS: dict[str, tuple[Callable[[Recorded], Iterable[Recorded]], list[str]]] = {
    "no_instruction": (without("instruction"), ["no message on instruction", "/joint_states"]),
    "empty_instruction": (empty_instruction, ["instruction", "is empty"]),
    "no_camera": (without(CAMERA_TOPICS["hand"]), ["no message on hand/image_raw/compressed"]),
    "joint_missing": (renamed, ["joint_states", "no turn"]),
    "joint_nan": (nan_joint, ["joint_states", "is nan"]),
    "command_nan": (nan_command, ["arm_controller/joint_trajectory", "lift", "nan"]),
    "command_other_joint": (other_joint_commanded, ["arm_controller/joint_trajectory", "elbow"]),
    "camera_stops": (camera_stops, ["hand", "old, allowed are 0.3 s"]),
    "clock_jumps": (clock_jumps, ["side", "went backwards 1 times"]),
    "zero_stamps": (zero_stamps, ["side/image_raw", "stamped 0.000 s"]),
}


def test_bad_bags_are_refused_by_name_and_reason_and_the_rest_is_written(tmp_path: Path, embodiment_file: Path) -> None:
    bags = tmp_path / "bags"
    bags.mkdir()
    for name, (edit, _) in FAULTS.items():
        write_bag(bags / name, messages(2.6, edit=edit))
    write_bag(bags / "good_1", messages(2.6))
    write_bag(bags / "good_2", messages(2.6, edit=received_twice))
    short = messages(0.4)
    write_bag(bags / "short", short)
    cut = write_bag(bags / "truncated", messages(2.6))
    whole = next(cut.glob("*.mcap")).read_bytes()
    next(cut.glob("*.mcap")).write_bytes(whole[: len(whole) // 2])

    console = Console(record=True, width=300, file=io.StringIO())
    refusals = convert(ConvertConfig(str(bags), embodiment_file, tmp_path / "out"), console)
    reasons = {refusal.bag.name: refusal.reason for refusal in refusals}
    assert set(reasons) == {*FAULTS, "short", "truncated"}
    for name, (_, expected) in FAULTS.items():
        assert all(part in reasons[name] for part in expected), (name, reasons[name])
    assert "unreadable" in reasons["truncated"]
    shown = console.export_text()
    assert all(name in shown for name in reasons)
    opened = LeRobotDataset("local/out", root=tmp_path / "out", video_backend="pyav")
    good = [row.action for row in rows_of(messages(2.6), Embodiment.load(embodiment_file))]
    assert opened.num_episodes == 2
    np.testing.assert_array_equal(np.stack(opened.hf_dataset["action"]), np.stack([*good, *good]))
    assert not list((tmp_path / "out").rglob("tmp*")), "left-overs of refused episodes"


def test_command_line_fails_if_a_bag_does_and_leaves_nothing_if_all_do(
    tmp_path: Path, embodiment_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(bags: Path) -> tuple[int, str, str]:
        args = [f"--bags={bags}", f"--embodiment={embodiment_file}", f"--output={tmp_path / 'out'}"]
        monkeypatch.setattr("sys.argv", ["convert", *args])
        status = main()
        return status, *capsys.readouterr()

    write_bag(tmp_path / "bags" / "bad", messages(1.0, edit=without("instruction")))
    status, shown, error = run(tmp_path / "bags")
    assert status == 1
    assert "bad" in shown
    assert "none of 1 bags could be converted" in error
    assert [path.name for path in tmp_path.iterdir()] == ["bags"]

    write_bag(tmp_path / "bags" / "good", messages(1.0))
    assert run(tmp_path / "bags")[0] == 1
    assert (tmp_path / "out" / "meta" / "info.json").exists()
    status, _, error = run(tmp_path / "bags" / "good")
    assert status == 1
    assert "give --overwrite=true" in error


def test_an_existing_output_is_kept_unless_told(tmp_path: Path, bags: Path, embodiment_file: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").touch()
    config = ConvertConfig(str(bags / "b"), embodiment_file, output)
    with pytest.raises(ValueError, match=r"out exists; give --overwrite=true"):
        convert(config, Console(quiet=True))
    assert (output / "precious").exists()
    convert(replace(config, overwrite=True), Console(quiet=True))
    assert not (output / "precious").exists()
    assert (output / "meta" / "info.json").exists()


def test_finds_bags_in_folders_files_and_patterns(tmp_path: Path) -> None:
    for name in ("b", "a", "deeper/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metadata.yaml").touch()
        (tmp_path / name / "x.mcap").touch()
    (tmp_path / "single.db3").touch()
    (tmp_path / "notes.txt").touch()
    everything = [tmp_path / name for name in ("a", "b", "deeper/c", "single.db3")]
    assert find_bags(str(tmp_path)) == everything
    assert find_bags(str(tmp_path / "[ab]")) == everything[:2]
    assert find_bags(str(tmp_path / "a")) == everything[:1]
    with pytest.raises(ValueError, match=r"nothing_here: no bag there; expected folders with a metadata\.yaml"):
        find_bags(str(tmp_path / "nothing_here"))


def test_a_slow_encoder_loses_no_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_policy_training.video.WAITING_FRAMES", 2)
    encode = _CameraVideo._encode
    monkeypatch.setattr(_CameraVideo, "_encode", lambda *args: (time.sleep(0.15), encode(*args))[1])
    encoder = VideoEncoder(10, VideoOptions().encoder_config())
    encoder.start_episode(["camera"], tmp_path, [])
    for index in range(12):
        encoder.feed_frame("camera", picture(index, 48, 32))
    path, stats = encoder.finish_episode()["camera"]
    assert frames_in(path) == 12
    sampled = np.stack([picture(index, 48, 32) for index in (0, 4, 8)]).reshape(-1, 3).astype(float)
    np.testing.assert_allclose(stats["mean"], sampled.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["std"], sampled.std(0), rtol=1e-3)


def test_a_lost_frame_is_noticed(tmp_path: Path, embodiment_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = _CameraVideo._encode
    numbers = iter(range(1000))
    monkeypatch.setattr(_CameraVideo, "_encode", lambda *args: None if next(numbers) == 5 else encode(*args))
    write_bag(tmp_path / "bag", messages(1.5))
    with pytest.raises(ValueError, match=r"\.mp4: \d+ frames encoded for \d+ rows; convert again"):
        convert(ConvertConfig(str(tmp_path / "bag"), embodiment_file, tmp_path / "out"), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_an_encoders_failure_reaches_the_caller(tmp_path: Path) -> None:
    encoder = VideoEncoder(10, VideoOptions().encoder_config())
    encoder.start_episode(["camera"], tmp_path, [])
    encoder.feed_frame("camera", picture(0, 48, 32))
    encoder.feed_frame("camera", np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match=r"array"):
        encoder.finish_episode()
    encoder.cancel_episode()
    assert list(tmp_path.iterdir()) == []
