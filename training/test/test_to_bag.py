"""An episode given back as a bag, and that bag converted again: what comes out is what went in."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converting import config_for
from dit_policy_training.conversion.bag_to_shard import sampled
from dit_policy_training.conversion.inspection import look_at
from dit_policy_training.conversion.lacking import lacks
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.recording import Recording
from dit_policy_training.conversion.reloaded import Reel, Reloaded
from dit_policy_training.conversion.replay import Numbers, Outgoing, Replay, ReplayError
from dit_policy_training.conversion.sampling import EpisodeEnd, Row
from dit_policy_training.conversion.times import Ticks
from dit_policy_training.to_bag import ToBagConfig, main, to_bag, write_bag
from toy_robot import EMBODIMENT, picture

from dit_policy_ros.embodiment import Embodiment

START_S = 1_700_000_000
CAMERAS = ("side", "hand")


def rows_of(bag: Path, config: ConvertConfig, embodiment: Embodiment) -> list[Row]:
    """The rows of the bag's one episode."""
    events = list(sampled(bag, config, embodiment))
    assert [event for event in events if isinstance(event, EpisodeEnd)] == [EpisodeEnd(None)]
    return [event for event in events if isinstance(event, Row)]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a.astype(float) - b.astype(float)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


@pytest.mark.parametrize("episode", [0, 1, 2])
def test_converting_the_bag_again_gives_the_same_rows(
    tmp_path: Path, png_dataset: Path, embodiment_file: Path, embodiment: Embodiment, episode: int
) -> None:
    """States and actions bit for bit, raw pictures too; JPEG pictures within the codec's error."""
    assert to_bag(ToBagConfig(png_dataset, episode, tmp_path / "back")) == []
    rows = rows_of(tmp_path / "back", config_for("unused", embodiment_file, tmp_path / "unused"), embodiment)
    dataset = Reloaded.open(png_dataset)
    where, reel = dataset.rows(episode), Reel(dataset, episode)
    assert len(rows) == len(reel)
    states, actions = dataset.vector("observation.state")[where], dataset.vector("action")[where]
    tasks = [dataset.tasks[index] for index in dataset.table["task_index"].iloc[where]]
    for frame, row in enumerate(rows):
        assert row.stamp_ns == START_S * 10**9 + frame * 100_000_000
        assert row.frame["observation.state"].tobytes() == states[frame].tobytes()
        assert row.action.tobytes() == actions[frame].tobytes()
        assert row.task == tasks[frame]
        side, hand = (reel.picture(f"observation.images.{camera}", frame) for camera in CAMERAS)
        np.testing.assert_array_equal(row.frame["observation.images.side"], side)
        assert psnr(row.frame["observation.images.hand"], hand) > 32


def test_pictures_of_videos_come_back_as_they_were_decoded(
    tmp_path: Path, dataset: Path, embodiment_file: Path, embodiment: Embodiment
) -> None:
    to_bag(ToBagConfig(dataset, 0, tmp_path / "back"))
    rows = rows_of(tmp_path / "back", config_for("unused", embodiment_file, tmp_path / "unused"), embodiment)
    reel = Reel(Reloaded.open(dataset), 0)
    for frame in range(0, len(rows), 5):
        decoded = reel.picture("observation.images.side", frame)
        np.testing.assert_array_equal(rows[frame].frame["observation.images.side"], decoded)


def test_the_bag_is_whole_and_has_what_the_embodiment_asks_for(
    tmp_path: Path, png_dataset: Path, embodiment: Embodiment
) -> None:
    to_bag(ToBagConfig(png_dataset, 1, tmp_path / "back", start=42))
    look = look_at(tmp_path / "back")
    assert (look.damage, look.notes) == (None, [])
    assert lacks(look, embodiment) == []
    assert look.start_ns == 42 * 10**9
    with Recording(tmp_path / "back") as recording:
        (command,) = recording.messages(["arm_controller/joint_trajectory"])
        states = list(recording.messages(["joint_states"]))
    assert list(command.joint_names) == ["turn", "lift"]
    assert command.stamp_ns == 0  # begin when received
    assert len(command.points) == len(states)
    # Velocities are those of the positions: over two frames, central differences.
    positions = np.stack([state.position for state in states])
    np.testing.assert_allclose(states[3].velocity, (positions[4] - positions[2]) / 0.2, rtol=1e-9)


def test_a_player_offers_the_instruction_as_the_node_asks_for_it(tmp_path: Path, png_dataset: Path) -> None:
    """Transient local and reliable, or a node that subscribes so would never hear it."""
    from rosbags.interfaces import QosDurability, QosReliability
    from rosbags.rosbag2 import Reader

    to_bag(ToBagConfig(png_dataset, 0, tmp_path / "back"))
    with Reader(tmp_path / "back") as reader:
        (instruction,) = [c for c in reader.connections if c.topic == "/instruction"]
    (qos,) = instruction.ext.offered_qos_profiles
    assert (qos.durability, qos.reliability) == (QosDurability.TRANSIENT_LOCAL, QosReliability.RELIABLE)


def other_robot(interface: str) -> Embodiment:
    topic = {"position": "arm_controller/commands", "follow_joint_trajectory": "arm_controller/follow_joint_trajectory"}
    text = EMBODIMENT.replace("interface: trajectory", f"interface: {interface}")
    return Embodiment.from_yaml(text.replace("arm_controller/joint_trajectory", topic[interface]), "test")


def numbers(seconds: float = 2.0, **changes: Any) -> Numbers:
    rng = np.random.default_rng(3)
    count = round(seconds * 10)
    return replace(
        Numbers(
            state_names=("lift", "turn", "reach"),
            states=rng.normal(size=(count, 3)).astype(np.float32),
            action_names=("turn", "lift"),
            actions=rng.normal(size=(count, 2)).astype(np.float32),
            tasks=["push the red block"] * (count // 2) + ["push the blue block"] * (count - count // 2),
        ),
        **changes,
    )


def replayed(replay: Replay) -> list[Outgoing]:
    made = list(replay.before())
    for frame in range(len(replay.numbers.states)):
        sizes = {camera.name: (camera.width, camera.height) for camera in replay.embodiment.cameras}
        made += replay.at(frame, {name: picture(frame, *size) for name, size in sizes.items()})
    return made + list(replay.after())


@pytest.mark.parametrize("interface", ["position", "follow_joint_trajectory"])
def test_the_other_interfaces_come_back_bit_for_bit(tmp_path: Path, embodiment_file: Path, interface: str) -> None:
    robot, sent = other_robot(interface), numbers()
    replay = Replay(robot, sent, Ticks(START_S * 10**9, 10))
    write_bag(tmp_path / "bag", replay, iter(replayed(replay)))
    rows = rows_of(tmp_path / "bag", config_for("unused", embodiment_file, tmp_path / "unused"), robot)
    assert np.stack([row.action for row in rows]).tobytes() == sent.actions.tobytes()
    assert np.stack([row.frame["observation.state"] for row in rows]).tobytes() == sent.states.tobytes()
    assert [row.task for row in rows] == list(sent.tasks)


def test_relative_actions_are_made_absolute(embodiment: Embodiment) -> None:
    sent = numbers(relative=True)
    (message,) = [out.message for out in Replay(embodiment, sent, Ticks(START_S, 10)).before() if "traj" in out.topic]
    expected = sent.actions.astype(np.float64) + sent.states[:, [1, 0]]  # turn, lift
    np.testing.assert_array_equal(np.stack([point.positions for point in message.points]), expected)


def test_velocities_and_efforts_of_the_state_are_given_back(embodiment: Embodiment) -> None:
    joints = ("lift", "turn", "reach")
    names = (*joints, *(f"{joint}.effort" for joint in joints), "tool.position.x")
    states = np.arange(10 * 7, dtype=np.float32).reshape(10, 7)
    replay = Replay(embodiment, numbers(1.0, state_names=names, states=states), Ticks(START_S, 10))
    messages = [out.message for out in replayed(replay) if out.topic == "joint_states"]
    np.testing.assert_array_equal(messages[4].effort, states[4, 3:6])
    assert replay.notes == ["left out of the state, as no topic of the embodiment has them: tool.position.x"]


def test_what_cannot_be_given_back_is_told(embodiment: Embodiment) -> None:
    replay = Replay(embodiment, numbers(action_names=("turn", "gripper")), Ticks(START_S, 10))
    assert replay.notes == ["no commands of 'arm': the dataset's action is turn, gripper"]
    assert "arm_controller/joint_trajectory" not in replay.types()
    assert not [out for out in replayed(replay) if "trajectory" in out.topic]
    with pytest.raises(ReplayError, match=r"observation\.state has lift, turn, elbow; expected all of lift, turn, r"):
        Replay(embodiment, numbers(state_names=("lift", "turn", "elbow")), Ticks(START_S, 10))


def refusals(folder: Path) -> list[tuple[Callable[[ToBagConfig], ToBagConfig], str]]:
    return [
        (lambda config: replace(config, episode=3), r"--episode=3: the dataset has episodes 0 to 2"),
        (lambda config: replace(config, episode=-1), r"--episode=-1: the dataset has episodes 0 to 2"),
        (lambda config: replace(config, jpeg_quality=0), r"--jpeg_quality=0: expected 1 to 100"),
        (lambda config: replace(config, start=0), r"--start=0: expected 1 or more"),
        (lambda config: replace(config, dataset=folder / "nothing"), r"embodiment .*nothing.* cannot be read"),
        (lambda config: replace(config, output=folder), r"exists; give --overwrite=true"),
        (lambda config: replace(config, output=folder, overwrite=True), r"is no bag, and is not replaced"),
    ]


def test_options_that_make_no_sense_are_refused_and_leave_nothing(tmp_path: Path, png_dataset: Path) -> None:
    (tmp_path / "precious").touch()
    for change, words in refusals(tmp_path):
        with pytest.raises((ValueError, OSError), match=words):
            to_bag(change(ToBagConfig(png_dataset, 0, tmp_path / "back")))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_bag_is_replaced_when_told_and_an_error_on_the_way_leaves_the_old_one(
    tmp_path: Path, png_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ToBagConfig(png_dataset, 0, tmp_path / "back")
    to_bag(config)
    first = look_at(tmp_path / "back").seconds
    with monkeypatch.context() as broken:
        broken.setattr(Replay, "after", lambda self: iter([None]))
        with pytest.raises(AttributeError):
            to_bag(replace(config, episode=1, overwrite=True))
    assert look_at(tmp_path / "back").seconds == first
    to_bag(replace(config, episode=1, overwrite=True))
    assert look_at(tmp_path / "back").seconds < first
    assert [path.name for path in tmp_path.iterdir()] == ["back"]


def test_a_dataset_that_convert_did_not_make_is_refused(tmp_path: Path, png_dataset: Path) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(png_dataset, copy)
    (copy / "conversion.json").unlink()
    with pytest.raises(ReplayError, match=r"has no conversion\.json, so convert did not make it"):
        to_bag(ToBagConfig(copy, 0, tmp_path / "back"))


def test_the_command_line_tells_what_it_wrote(
    tmp_path: Path, png_dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [f"--dataset={png_dataset}", "--episode=0", f"--output={tmp_path / 'back'}"]
    monkeypatch.setattr("sys.argv", ["to_bag", *args])
    assert main() == 0
    assert "back" in capsys.readouterr().out
    assert main() == 1
    assert "give --overwrite=true" in capsys.readouterr().err
