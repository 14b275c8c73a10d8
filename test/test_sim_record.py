import itertools
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.interfaces import QosDurability

from dit_policy_ros.sim import record, scene, topics
from dit_policy_ros.sim.simulation import Simulation
from dit_policy_ros.sim.trajectory_controller import TrajectoryController

IMAGE, JPEG, JOINTS, ARM, TEXT = (
    "/workspace_camera/image_raw",
    "/wrist_camera/image_raw/compressed",
    "/joint_states",
    "/arm_controller/joint_trajectory",
    "/instruction",
)


def stamp_ns(message) -> int:
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def followed(commands: list, times_ns: list[int], measured: np.ndarray) -> np.ndarray:
    """Where a controller that gets the recorded commands tells the joints to be, (N, 7); NaN before the first one."""
    controller = TrajectoryController(scene.ARM_JOINTS, interpolate_from_desired_state=True)
    waiting = list(commands)
    rows = []
    for t_ns, position in zip(times_ns, measured, strict=True):
        while waiting and waiting[0][0] <= t_ns:
            received_ns, message = waiting.pop(0)
            assert controller.receive(message, received_ns) is None
        target, _, _ = controller.update(t_ns, position, np.zeros(7))
        rows.append(target if len(waiting) < len(commands) else np.full(7, np.nan))
    return np.array(rows)


def read(bag: Path) -> tuple[dict[str, list], dict[str, object]]:
    """(receive time, message) pairs by topic, and the connections, checking that receive times never go back."""
    found: dict[str, list] = {}
    with AnyReader([bag]) as reader:
        last = 0
        for connection, received, data in reader.messages():
            assert received >= last
            last = received
            found.setdefault(connection.topic, []).append((received, reader.deserialize(data, connection.msgtype)))
        return found, {c.topic: c for c in reader.connections}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("record") / "bags"
    arguments = [f"--output={output}", "--episodes=3", "--seed=40", "--workers=2", "--disturbance=0"]
    assert record.main(arguments) == 0
    return output


@pytest.fixture(scope="module")
def bags(folder) -> list[tuple[dict, dict]]:
    return [read(path) for path in sorted(folder.iterdir())]


def test_one_bag_an_episode_and_no_instruction_in_a_name(folder):
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert {"episode_000/episode_000.mcap", "episode_002/metadata.yaml"} <= set(names)
    assert sum(name.endswith(".mcap") for name in names) == 3
    assert not [name for name in names if any(c in name for c in (*scene.COLOURS, "push"))]


def test_instructions_take_turns_and_each_is_said_once_and_kept_for_latecomers(bags):
    said = [[message.data for _, message in found[TEXT]] for found, _ in bags]
    assert said == [[f"push the {colour} block over the line"] for colour in ("red", "green", "blue")]
    for found, connections in bags:
        assert connections[TEXT].ext.offered_qos_profiles[0].durability == QosDurability.TRANSIENT_LOCAL
        others = [received for topic, messages in found.items() if topic != TEXT for received, _ in messages]
        assert found[TEXT][0][0] < min(others) + 20_000_000


def test_topics_types_and_rates(bags):
    expected = {
        IMAGE: ("sensor_msgs/msg/Image", 15),
        JPEG: ("sensor_msgs/msg/CompressedImage", 15),
        JOINTS: ("sensor_msgs/msg/JointState", 100),
        ARM: ("trajectory_msgs/msg/JointTrajectory", 10),
    }
    for found, connections in bags:
        assert set(found) == {*expected, TEXT}
        for topic, (kind, rate) in expected.items():
            assert connections[topic].msgtype == kind
            stamps = [stamp_ns(message) for _, message in found[topic]]
            gaps = np.diff(stamps) * 1e-9
            assert len(stamps) >= 3.5 * rate
            assert gaps.mean() == pytest.approx(1 / rate, rel=0.01)
            assert np.abs(gaps - 1 / rate).max() < 0.0021  # one step of the physics


def test_messages_come_late_by_a_few_jittering_milliseconds(bags):
    for topic, slowest in ((IMAGE, 0.04), (JPEG, 0.04), (JOINTS, 0.012), (ARM, 0.012)):
        delays = np.array([received - stamp_ns(m) for found, _ in bags for received, m in found[topic]]) * 1e-9
        assert delays.min() > 0
        assert delays.max() < slowest
        assert delays.std() > 0.0003
        # Exponential: its mean lies above its median.
        assert delays.mean() > np.median(delays)


def test_joint_states_name_all_joints_in_another_order_each_episode(bags):
    orders = []
    for found, _ in bags:
        names = {tuple(message.name) for _, message in found[JOINTS]}
        assert len(names) == 1
        orders.append(names.pop())
        assert sorted(orders[-1]) == sorted(scene.JOINTS)
        assert orders[-1] != scene.JOINTS
    assert len(set(orders)) == 3
    for order, (found, _) in zip(orders, bags, strict=True):
        _, first = found[JOINTS][0]
        home = dict(zip(scene.JOINTS, [*scene.HOME, 0.0], strict=True))
        np.testing.assert_allclose(first.position, [home[name] for name in order], atol=0.021)
        positions = np.array([message.position for _, message in found[JOINTS]])
        velocities = np.array([message.velocity for _, message in found[JOINTS]])
        np.testing.assert_allclose(np.gradient(positions, 0.01, axis=0)[5:-5], velocities[5:-5], atol=0.12)
        assert all(len(message.effort) == 0 for _, message in found[JOINTS])


def test_images_decode_to_what_the_cameras_saw(bags):
    for found, _ in bags:
        for _, message in found[IMAGE]:
            assert (message.encoding, message.height, message.width, message.step) == ("rgb8", 128, 128, 384)
            assert np.std(message.data) > 20
        for _, message in found[JPEG]:
            assert message.format == "rgb8; jpeg compressed bgr8"
            assert cv2.imdecode(message.data, cv2.IMREAD_COLOR).shape == (128, 128, 3)
        first = found[IMAGE][0][1].data.reshape(128, 128, 3).astype(int)
        last = found[IMAGE][-1][1].data.reshape(128, 128, 3).astype(int)
        assert np.abs(first - last).max() > 100  # the block and the arm moved
    # The red block is red in the JPEG, its channels in the right order: the first episode pushes it.
    wrist = [cv2.imdecode(m.data, cv2.IMREAD_COLOR)[..., ::-1].astype(int) for _, m in bags[0][0][JPEG]]
    assert max((p[..., 0] - p[..., 1:].max(axis=-1) > 80).sum() for p in wrist) > 1000


def test_commands_come_only_while_the_arm_moves_and_are_what_moved_it(bags):
    for found, _ in bags:
        sent = [stamp_ns(message) for _, message in found[ARM]]
        states = [stamp_ns(message) for _, message in found[JOINTS]]
        assert sent[0] - states[0] == 300_000_000
        assert states[-1] - sent[-1] == pytest.approx(390_000_000, abs=1)

        measured = {stamp_ns(m): dict(zip(m.name, m.position, strict=True)) for _, m in found[JOINTS]}
        joints = np.array([[measured[t][name] for name in scene.ARM_JOINTS] for t in states])

        reference = followed(found[ARM], states, joints)
        moving = ~np.isnan(reference[:, 0])
        assert moving.sum() == len(states) - 31
        lag = np.abs(reference[moving] - joints[moving]).max()
        assert lag < 0.05
        # The reference leads: the arm is nearer to where it was told to be 20 ms ago than to where it is told now.
        late = np.abs(reference[moving][:-2] - joints[moving][2:]).mean()
        assert late < 0.5 * np.abs(reference[moving] - joints[moving]).mean()


def test_an_episode_is_the_same_again_and_each_seed_another():
    with Simulation() as simulation:

        def messages(seed: int) -> list[record.Recorded]:
            recorder = record.Recorder(np.random.default_rng(seed))
            assert record.record_episode(simulation, "red", seed, 0.008, recorder) is None
            return recorder.messages

        first, again = messages(50), messages(50)
        assert first == again
        assert first != messages(51)


def test_a_failed_episode_leaves_no_bag(tmp_path, monkeypatch):
    monkeypatch.setattr(record.task, "TIME_LIMIT", 0.5)
    outcome = record._attempt(tmp_path, 0, 60, 0.0)
    assert outcome.failure == "not done after 0 s"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_only_overwritten_when_told(tmp_path, monkeypatch):
    old, other = tmp_path / "episode_007", tmp_path / "notes.txt"
    old.mkdir()
    other.write_text("mine")
    with pytest.raises(SystemExit, match=r"is not empty .it has episode_007, 2 in all.; .*--overwrite"):
        record.main([f"--output={tmp_path}"])
    with pytest.raises(SystemExit, match=r"notes.txt is a file"):
        record.main([f"--output={other}"])
    failing = SimpleNamespace(failure="no", index=0, colour="red", duration=1.0)
    monkeypatch.setattr(record, "record", lambda *_: itertools.repeat(failing, 1))
    assert record.main([f"--output={tmp_path}", "--overwrite"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_shuffled_order_is_never_the_given_one():
    rng = np.random.default_rng(0)
    assert all(topics.shuffled_joints(rng, ["a", "b"]) == ["b", "a"] for _ in range(20))
    with pytest.raises(ValueError, match="one joint has one order"):
        topics.shuffled_joints(rng, ["a"])
