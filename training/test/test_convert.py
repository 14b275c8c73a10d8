"""Bags to datasets, by the whole command: what is in them is what the sampler gave, and what cannot be is said."""

import contextlib
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from converting import Launcher, arguments, config_for
from dit_policy_training import cli
from dit_policy_training.conversion.bag_to_shard import sampled
from dit_policy_training.conversion.options import ConvertConfig, TimeOptions
from dit_policy_training.conversion.recording import Recording, find_bags
from dit_policy_training.conversion.sampling import Row
from dit_policy_training.convert import convert, main
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from rich.console import Console
from toy_robot import START_NS, Recorded, messages, trajectory, with_header_ns, write_bag

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.messages import stamp_ns
from dit_policy_ros.runtime.observations import ObservationBuffer

CAMERA_TOPICS = {"side": "side/image_raw", "hand": "hand/image_raw/compressed"}
COMMANDS = "arm_controller/joint_trajectory"


def rows_of(bag: Path, embodiment: Embodiment) -> list[Row]:
    """As the sampler gives them, whose rows test_sampling holds against the formulas of the toy robot."""
    config = config_for(bag, Path("toy.yaml"), Path("out"))
    return [event for event in sampled(bag, config, embodiment) if isinstance(event, Row)]


def test_tasks_are_numbered_in_order_of_appearance(tmp_path: Path, embodiment_file: Path) -> None:
    tasks = [f"push the {colour} block" for colour in ("red", "violet", "green", "amber", "blue", "white")]

    def change(m: Recorded) -> Iterable[Recorded]:
        if m.topic != "instruction":
            return [m]
        after = [START_NS + 350_000_000 * index for index in range(len(tasks))]
        return [replace(m, receive_ns=ns, msg=replace(m.msg, data=task)) for ns, task in zip(after, tasks, strict=True)]

    write_bag(tmp_path / "bag", messages(3.0, edit=change))
    convert(config_for(tmp_path / "bag", embodiment_file, tmp_path / "out"), Console(quiet=True))
    opened = LeRobotDataset("local/out", root=tmp_path / "out", video_backend="pyav")
    assert opened.meta.tasks.index.tolist() == tasks


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
        rows = rows_of(bag, embodiment)
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
        stamps = [row.stamp_ns for row in rows_of(bag, embodiment)]
        with Recording(bag) as recording:
            pending = iter(list(recording.messages([*CAMERA_TOPICS.values(), "joint_states"])))
        buffer = ObservationBuffer(embodiment, n_obs_steps=2)
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
    "camera_stops": (camera_stops, ["hand", "no message on hand/image_raw/compressed for", "0.3 s"]),
    "clock_jumps": (clock_jumps, ["side/image_raw", "header stamps", "jumped from"]),
    "zero_stamps": (zero_stamps, ["side/image_raw", "header stamp", "is zero"]),
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
    config = config_for(bags, embodiment_file, tmp_path / "out", time=TimeOptions(on_gap="refuse"))
    refusals = convert(config, console)
    reasons = {refusal.bag.name: refusal.reason for refusal in refusals}
    assert set(reasons) == {*FAULTS, "short", "truncated"}
    for name, (_, expected) in FAULTS.items():
        assert all(part in reasons[name] for part in expected), (name, reasons[name])
    assert "damaged or cut short" in reasons["truncated"]
    assert "--recover" in reasons["truncated"]
    shown = console.export_text()
    assert all(name in shown for name in reasons)
    opened = LeRobotDataset("local/out", root=tmp_path / "out", video_backend="pyav")
    good = [row.action for row in rows_of(bags / "good_1", Embodiment.load(embodiment_file))]
    assert opened.num_episodes == 2
    np.testing.assert_array_equal(np.stack(opened.hf_dataset["action"]), np.stack([*good, *good]))
    assert not list((tmp_path / "out").rglob("tmp*")), "left-overs of refused episodes"


def test_command_line_fails_if_a_bag_does_and_leaves_nothing_if_all_do(
    launcher: Launcher, tmp_path: Path, embodiment_file: Path
) -> None:
    options = arguments(tmp_path / "bags", embodiment_file, tmp_path / "out", "--verify=off")
    write_bag(tmp_path / "bags" / "bad", messages(1.0, edit=without("instruction")))
    status, shown = launcher.run(options)
    assert status == 1
    assert f"refused {tmp_path / 'bags' / 'bad'}: " in shown
    assert "of 1 bag none could be converted" in shown
    assert not (tmp_path / "out").exists()

    write_bag(tmp_path / "bags" / "good", messages(1.0))
    status, shown = launcher.run(options)
    assert status == 1
    assert "1 from 1 of 2 bags" in shown
    assert (tmp_path / "out" / "meta" / "info.json").exists()


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("--verify=maybe", "--verify is 'maybe'; expected full or sample or off"),
        ("--executor=slurm", "--executor is 'slurm'; expected local or ray"),
        ("--shard=0/4", "--shard is '0/4'; expected i/n with i from 1 to n"),
        ("--fps=0", "--fps is '0'; expected a whole number of 1 or more"),
        ("--workers=-1", "--workers is '-1'; expected 0 or more"),
        ("--time.on_gap=ignore", "--time.on_gap is 'ignore'; expected split or drop or refuse"),
        (
            "--time.stamps={side/image_raw: sent}",
            "--time.stamps of side/image_raw is 'sent'; expected header or receive",
        ),
        (
            "--time.stamps=receive",
            "--time.stamps is 'receive'; expected a value for each name, as --time.stamps='{NAME: receive}'",
        ),
        ("--time.sampling={left: nearest}", "--time.sampling: there is no 'left', expected of side, hand, state"),
        ("--fps=abc", "--fps is 'abc'; expected a whole number"),
        ("--vectors.action=/arm", "expected a list, as --vectors.action='[{topic: /arm, ...}]'"),
        ("--depth=/range", "as --depth='{NAME: {topic: /range, ...}}'"),
        ("--episodes.by=events", "--episodes.topic is 'empty'; expected the events' topic"),
        ("--episodes.annotations=absent.csv", "--episodes.annotations is 'absent.csv'; expected a file"),
        ("--video.codec=x264", "video.codec is 'x264'; expected auto or one of"),
        ("--bags=absent", "absent: no bag there"),
        ("--embodiment=absent.yaml", "absent.yaml"),
        ("--colour=blue", "colour"),
    ],
)
def test_wrong_options_are_refused_before_the_work(
    bags: Path,
    embodiment_file: Path,
    tmp_path: Path,
    wrong: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["convert", *arguments(bags, embodiment_file, tmp_path / "out"), wrong])
    with contextlib.suppress(SystemExit):
        assert main() == 1
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_texts_are_taken_as_they_are() -> None:
    """What YAML would make a truth value, a date, an alias, a mapping or a comment of."""
    task = "stack: 2 on 1 # now"
    given = [
        "--bags",
        "*.mcap",
        "--embodiment=e.yaml",
        "--output=2026-11-22",
        "--verify=off",
        f"--episodes.task={task}",
    ]
    config = cli.parse(ConvertConfig, [*given, "--workers", "3", "--overwrite=true"])
    assert (config.bags, config.verify, config.episodes.task) == ("*.mcap", "off", task)
    assert (config.output, config.workers, config.overwrite) == (Path("2026-11-22"), 3, True)


def test_a_switch_that_stands_by_itself_is_on() -> None:
    needed = ["--bags=a", "--embodiment=e.yaml", "--output=o"]
    for given in (["--recover", *needed], [*needed, "--recover"], [*needed, "--recover=true"]):
        assert cli.parse(ConvertConfig, given).recover
    assert not cli.parse(ConvertConfig, [*needed, "--recover", "false"]).recover
    assert cli.parse(ConvertConfig, [*needed, "--episodes.trim_idle", "--workers", "2"]).episodes.trim_idle


def test_without_an_argument_it_says_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.parse(ConvertConfig, [])
    assert "Missing required field(s) `bags`, `embodiment`, `output`" in capsys.readouterr().err


def test_help_says_what_must_be_given_and_every_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(ConvertConfig, ["--help"], "dit_policy_training.convert", "examples: none")
    shown = capsys.readouterr().out
    assert "convert --bags=BAGS --embodiment=EMBODIMENT --output=OUTPUT [--OPTION=VALUE ...]" in shown
    assert "examples: none" in shown
    assert "default: None" not in shown
    assert "(default: sample)" in shown
    options = re.findall(r"^  --([\w.]+) ", shown, re.MULTILINE)
    assert len(options) == len(set(options))
    assert {"episodes.task", "video.gop", "fps"} <= set(options)


def test_an_existing_output_is_kept_unless_told(tmp_path: Path, bags: Path, embodiment_file: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").touch()
    config = config_for(bags / "b", embodiment_file, output)
    with pytest.raises(ValueError, match=r"out exists, and convert did not make it .* give --overwrite=true"):
        convert(config, Console(quiet=True))
    assert (output / "precious").exists()
    convert(replace(config, overwrite=True), Console(quiet=True))
    assert not (output / "precious").exists()
    assert (output / "meta" / "info.json").exists()
