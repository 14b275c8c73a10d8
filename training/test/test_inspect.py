import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bag_kit
import numpy as np
import pytest
from bag_kit import storage_file
from dit_policy_training.conversion.guessing import GuessError, guess
from dit_policy_training.conversion.inspection import look_at
from dit_policy_training.conversion.lacking import lacks
from dit_policy_training.conversion.message_types import definition_to_write, types_to_write
from dit_policy_training.inspect import InspectConfig, inspect, main
from rich.console import Console
from rosbags.rosbag2 import StoragePlugin, Writer
from toy_robot import START_NS, STORE, Recorded, header, messages, position, with_header_ns, write_bag

from dit_policy_ros.embodiment import Embodiment

CAMERA = "side/image_raw"


def shown(config: InspectConfig, width: int = 120) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    inspect(config, console)
    return console.export_text()


def test_a_look_tells_rates_gaps_clocks_pictures_joints_and_texts(tmp_path: Path) -> None:
    def edit(m: Recorded) -> Iterable[Recorded]:
        if m.topic == CAMERA and 1.0 < (m.receive_ns - START_NS) / 1e9 < 1.5:
            return []
        if m.topic == "joint_states":  # received 0.25 s after the stamp
            return [replace(m, receive_ns=m.receive_ns + 250_000_000)]
        return [m]

    sent = messages(3.0, edit=edit)
    look = look_at(write_bag(tmp_path / "bag", sent))
    assert look.damage is None
    joints = look.topics["/joint_states"]
    assert joints.rate == pytest.approx(50, rel=0.01)
    assert 0.25 < joints.lags.quantile(0.5) < 0.255
    assert set(joints.joints.names) == {"lift", "turn", "reach", "gripper"}
    assert joints.joints.fields == ("position", "velocity")
    assert look.topics["/" + CAMERA].largest_gap == pytest.approx(0.5, abs=0.1)
    assert dict(look.topics["/" + CAMERA].pictures.kinds) == {(48, 32, "rgb8"): sum(m.topic == CAMERA for m in sent)}
    assert dict(look.topics["/hand/image_raw/compressed"].pictures.kinds) == {(32, 32, "jpeg"): 45}
    assert dict(look.topics["/instruction"].texts) == {"push the red block": 1}
    assert look.topics["/arm_controller/joint_trajectory"].joints.names == ("lift", "turn")


@pytest.mark.parametrize("width", [80, 160])
def test_what_is_printed(tmp_path: Path, width: int) -> None:
    write_bag(tmp_path / "bags" / "a", messages(2.0))
    write_bag(tmp_path / "bags" / "b", messages(2.0, "push [it]"), StoragePlugin.SQLITE3)
    bag_kit.changed(bag_kit.write_bag(tmp_path / "bags" / "c", messages(2.0)), lambda data: bytes(data[:90_000]))
    text = shown(InspectConfig(str(tmp_path / "bags")), width)
    for said in ("/joint_states", "sensor_msgs/JointState", "4 joints: gripper, lift", "48x32 rgb8", "'push [it]' (1)"):
        assert said in text
    assert "damaged: c.mcap: " in text
    assert "3, damaged: c" in text
    assert "in 2 bags, missing in 1" in text
    assert "1 bags" not in text
    assert max(len(line) for line in text.splitlines() if "/bags/" not in line and "note" not in line) <= width


def test_the_damaged_part_of_a_bag_is_looked_at_with_recover(tmp_path: Path) -> None:
    bag = bag_kit.write_bag(tmp_path / "bag", messages(2.0))
    bag_kit.changed(bag, lambda data: bytes(data[: len(data) // 2]))
    assert look_at(bag).topics == {}
    look = look_at(bag, recover=True)
    assert look.damage is None
    assert 20 < look.topics["/joint_states"].info.count < 60
    assert any("recovered" in note for note in look.notes)


def test_the_first_embodiment_loads_and_says_what_was_recorded(
    tmp_path: Path, bags: Path, embodiment: Embodiment
) -> None:
    output = tmp_path / "robot_7.yaml"
    shown(InspectConfig(str(bags), output=output))
    guessed = Embodiment.load(output)
    assert guessed.name == "robot_7"
    assert guessed.fps == 15
    assert guessed.instruction_topic == "instruction"
    seen = {camera.name: (camera.topic, camera.transport, camera.width, camera.height) for camera in guessed.cameras}
    assert seen == {
        camera.name: (camera.topic, camera.transport, camera.width, camera.height) for camera in embodiment.cameras
    }
    assert guessed.state.joints == ("lift", "turn", "gripper", "reach")
    (group,) = guessed.action_groups
    assert (group.name, group.topic, group.interface) == ("arm", "arm_controller/joint_trajectory", "trajectory")
    times = np.linspace(0, 3, 1000)
    for joint, limits in guessed.limits.items():
        moved = [position(joint, t) for t in times]
        assert limits.lower < min(moved) < max(moved) < limits.upper
        fastest = {"lift": 0.5, "turn": 1.0}[joint] * 1.3
        assert fastest < limits.velocity < 2 * max(fastest, 0.5)
    assert output.read_text().count("GUESS") > 8
    # What was guessed from the bags, the bags have.
    for bag in bags.iterdir():
        assert lacks(look_at(bag), guessed) == []


def test_an_existing_embodiment_file_is_kept_unless_told(tmp_path: Path, bags: Path) -> None:
    output = tmp_path / "precious.yaml"
    output.write_text("precious")
    with pytest.raises(FileExistsError, match=r"precious\.yaml exists; give --overwrite=true"):
        inspect(InspectConfig(str(bags), output=output), Console(quiet=True))
    assert output.read_text() == "precious"
    inspect(InspectConfig(str(bags), output=output, overwrite=True), Console(quiet=True))
    Embodiment.load(output)


def recorded_as(folder: Path, sent: list[tuple[str, int, str, Any]]) -> Path:
    """A bag of (topic, receive time, type, message)."""
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections: dict[str, Any] = {}
        for topic, ns, kind, message in sorted(sent, key=lambda each: each[1]):
            if topic not in connections:
                text, digest = definition_to_write(kind)
                connections[topic] = writer.add_connection(topic, kind, msgdef=text, rihs01=digest)
            writer.write(connections[topic], ns, types_to_write(kind).serialize_cdr(message, kind))
    return folder


def camera_and_joints(names: list[str]) -> list[tuple[str, int, str, Any]]:
    types = STORE.types
    sent: list[tuple[str, int, str, Any]] = []
    for k in range(60):
        ns = START_NS + k * 33_333_333
        kind = "sensor_msgs/msg/Image"
        colour = types[kind](header(ns), 4, 6, "rgb8", 0, 18, np.zeros(4 * 6 * 3, np.uint8))
        depth = types[kind](header(ns), 4, 6, "16UC1", 0, 12, np.zeros(4 * 6 * 2, np.uint8))
        sent.append(("/camera/wrist_camera/color/image_raw", ns, kind, colour))
        sent.append(("/camera/wrist_camera/depth/image", ns, kind, depth))
        kind = "sensor_msgs/msg/JointState"
        values = np.full(len(names), 0.01 * k)
        none = np.array([])
        sent.append(("/joint_states", ns, kind, types[kind](header(ns), names, values, none, none)))
    return sent


def test_a_group_is_guessed_of_a_position_controllers_array(tmp_path: Path) -> None:
    kind = "std_msgs/msg/Float64MultiArray"
    layout = STORE.types["std_msgs/msg/MultiArrayLayout"]([], 0)
    commands = [
        ("/position_controller/commands", START_NS + k * 10**8, kind, STORE.types[kind](layout, np.zeros(2)))
        for k in range(10)
    ]
    bag = recorded_as(tmp_path / "bag", [*camera_and_joints(["a10", "a2"]), *commands])
    text = guess([look_at(bag)], "arm")
    guessed = Embodiment.from_yaml(text, "test")
    assert [camera.name for camera in guessed.cameras] == ["wrist"]
    assert guessed.fps == 30
    (group,) = guessed.action_groups
    assert (group.topic, group.interface, len(group.joints)) == ("position_controller/commands", "position", 2)
    assert "/camera/wrist_camera/depth/image is a depth stream" in text
    assert "no bag has a std_msgs/String topic" in text


def test_a_group_is_guessed_of_an_actions_feedback(tmp_path: Path) -> None:
    from dit_policy_training.conversion.replay import Numbers, Replay
    from dit_policy_training.conversion.times import Ticks

    robot = Embodiment.from_yaml(FOLLOWING, "test")
    numbers = Numbers(("a", "b"), np.zeros((3, 2), np.float32), ("a", "b"), np.ones((3, 2), np.float32), ["go"] * 3)
    replay = Replay(robot, numbers, Ticks(START_NS, 30))
    sent = [out for frame in (1, 2) for out in replay.at(frame, {"wrist": np.zeros((4, 6, 3), np.uint8)})]
    feedback = [(f"/{m.topic}", m.receive_ns, m.msgtype, m.message) for m in sent if "feedback" in m.topic]
    assert len(feedback) == 2
    bag = recorded_as(tmp_path / "bag", [*camera_and_joints(["b", "a"]), *feedback])
    other = Embodiment.from_yaml(FOLLOWING.replace("a: {", "elbow: {"), "test")
    assert any("/_action/feedback has no elbow, only a, b" in line for line in lacks(look_at(bag), other))
    (group,) = Embodiment.from_yaml(guess([look_at(bag)], "arm"), "test").action_groups
    assert group.topic == "arm_controller/follow_joint_trajectory"
    assert (group.interface, tuple(group.joints)) == ("follow_joint_trajectory", ("a", "b"))


FOLLOWING = """
name: arm
fps: 30
instruction: {topic: instruction}
cameras: {wrist: {topic: wrist, transport: raw, width: 6, height: 4, max_age: 0.1}}
max_camera_skew: 0.1
state: {topic: joint_states, joints: [a, b], max_age: 0.1}
action_groups:
  arm:
    topic: arm_controller/follow_joint_trajectory
    interface: follow_joint_trajectory
    joints:
      a: {position: [-1, 1], velocity: 1.0, acceleration: 1.0}
      b: {position: [-1, 1], velocity: 1.0, acceleration: 1.0}
"""


def test_without_commands_the_joints_are_the_action(tmp_path: Path) -> None:
    bag = recorded_as(tmp_path / "bag", camera_and_joints(["a10", "a2"]))
    text = guess([look_at(bag)], "arm")
    assert "--vectors.action_from=next_state" in text
    assert Embodiment.from_yaml(text, "test").action_joints == ("a10", "a2")


def test_without_a_camera_or_joints_there_is_no_embodiment(tmp_path: Path) -> None:
    sent = camera_and_joints(["a"])
    joints = recorded_as(tmp_path / "joints", [each for each in sent if each[0] == "/joint_states"])
    with pytest.raises(GuessError, match="no bag has a colour image topic"):
        guess([look_at(joints)], "arm")
    camera = recorded_as(tmp_path / "camera", [each for each in sent if each[0] != "/joint_states"])
    with pytest.raises(GuessError, match=r"no bag has a sensor_msgs/JointState topic"):
        guess([look_at(camera)], "arm")


def test_what_bags_lack_of_an_embodiment_is_told(tmp_path: Path, embodiment: Embodiment) -> None:
    def edit(m: Recorded) -> Iterable[Recorded]:
        if m.topic == "instruction" or (m.topic == CAMERA and 1.0 < (m.receive_ns - START_NS) / 1e9 < 1.5):
            return []
        if m.topic == "joint_states":
            m = replace(m, msg=replace(m.msg, name=[{"turn": "swing"}.get(name, name) for name in m.msg.name]))
        return [m]

    found = lacks(look_at(write_bag(tmp_path / "bag", messages(2.0, edit=edit))), embodiment)
    assert len(found) == 3
    assert "no message on instruction (std_msgs/msg/String)" in found
    assert any("/joint_states has no turn, only " in line and "swing" in line for line in found)
    assert any("/side/image_raw has a gap of 0.5" in line and "allowed are 0.3 s" in line for line in found)
    smaller = replace(embodiment, cameras=(replace(embodiment.cameras[0], width=64), embodiment.cameras[1]))
    said = lacks(look_at(write_bag(tmp_path / "whole", messages(2.0))), smaller)
    assert said == ["side/image_raw has 30 pictures of 48x32 (rgb8), expected 64x32"]


def test_missing_stamps_are_told(tmp_path: Path) -> None:
    def zero(m: Recorded) -> Iterable[Recorded]:
        yield replace(m, msg=with_header_ns(m.msg, 0)) if m.topic == CAMERA else m

    look = look_at(write_bag(tmp_path / "bag", messages(1.0, edit=zero)))
    assert look.topics["/" + CAMERA].unstamped == 15
    assert "not stamped" in shown(InspectConfig(str(tmp_path)))


def test_the_exit_status_tells_damage_and_lack(
    tmp_path: Path, embodiment_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: str) -> int:
        monkeypatch.setattr("sys.argv", ["inspect", *args])
        return main()

    bag = write_bag(tmp_path / "bag", messages(1.0))
    assert run(f"--bags={bag}", f"--embodiment={embodiment_file}") == 0
    without = write_bag(tmp_path / "without", [m for m in messages(1.0) if m.topic != "instruction"])
    assert run(f"--bags={without}") == 0
    assert run(f"--bags={without}", f"--embodiment={embodiment_file}") == 1
    storage_file(bag).write_bytes(b"")
    assert run(f"--bags={bag}") == 1
    assert run(f"--bags={tmp_path / 'nothing'}") == 1
    assert "no bag there" in capsys.readouterr().err


def test_many_bags_alike_are_one_table_and_the_odd_one_is_named(tmp_path: Path) -> None:
    def gap(m: Recorded) -> Iterable[Recorded]:
        return [] if m.topic == CAMERA and 0.5 < (m.receive_ns - START_NS) / 1e9 < 1.0 else [m]

    for name in "abcd":
        write_bag(tmp_path / name, messages(1.5, f"task {name}", edit=gap if name == "c" else None))
    write_bag(tmp_path / "e", [m for m in messages(1.5) if m.topic != "instruction"])
    text = shown(InspectConfig(str(tmp_path)), 200)
    assert "4 bags alike, " in text
    assert sum("/joint_states " in line for line in text.splitlines()) == 3  # two tables and the totals
    (note,) = [line for line in text.splitlines() if "has a gap of" in line]
    assert note.startswith("note c: /side/image_raw has a gap of 0.5")
    assert "'task a' (1)" in text
