import shutil
import sqlite3
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bag_kit
import numpy as np
import pytest
import toy_robot
from bag_kit import ALL_TOPICS, key, storage_file, write_bag
from dit_policy_training.conversion.recording import BagError, BagMessage, Recording, TopicInfo, find_bags, fingerprint
from rosbags.rosbag2 import CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from toy_robot import START_NS, STORE, Recorded, messages

MCAP, SQLITE = StoragePlugin.MCAP, StoragePlugin.SQLITE3
MODES = [(storage, mode) for storage in (MCAP, SQLITE) for mode in CompressionMode]
MODES.remove((SQLITE, CompressionMode.STORAGE))  # only mcap compresses chunks


@pytest.fixture(scope="module")
def recorded() -> list[Recorded]:
    return messages(1.5)


def read(bag: Path, topics: tuple[str, ...] = ALL_TOPICS) -> list[tuple[str, int, bytes]]:
    with Recording(bag) as recording:
        return [(m.topic, m.receive_ns, bytes(m.raw)) for m in recording.messages(topics)]


def notes_of(bag: Path) -> list[str]:
    with Recording(bag) as recording:
        list(recording.messages(ALL_TOPICS))
        return recording.notes


@pytest.mark.parametrize(("storage", "mode"), MODES)
def test_every_storage_and_compression_gives_each_message_once_in_receive_order(
    tmp_path: Path, recorded: list[Recorded], storage: StoragePlugin, mode: CompressionMode
) -> None:
    bag = write_bag(tmp_path / "bag", recorded, storage, mode)
    assert read(bag) == key(recorded)
    assert notes_of(bag) == []
    with Recording(bag) as recording:
        assert recording.topics["/joint_states"] == TopicInfo("/joint_states", "sensor_msgs/msg/JointState", 75)
        assert (recording.start_ns, recording.end_ns) == (recorded[0].receive_ns, recorded[-1].receive_ns)
    # The storage file alone, without its metadata.yaml.
    alone = Path(shutil.move(storage_file(bag), tmp_path))
    assert find_bags(str(alone)) == [alone]
    assert read(alone) == key(recorded)


@pytest.mark.parametrize("compression", ["", "lz4", "zstd"])
def test_an_mcap_without_an_index_and_with_compressed_chunks(
    tmp_path: Path, recorded: list[Recorded], compression: str
) -> None:
    bag = write_bag(tmp_path / "bag", recorded)
    bag_kit.changed(bag, lambda data: bag_kit.rechunked(bytes(data), compression))
    assert read(bag) == key(recorded)


def test_an_mcap_without_chunks(tmp_path: Path, recorded: list[Recorded]) -> None:
    """As rosbag2's `fastwrite` preset writes it."""
    bag = write_bag(tmp_path / "bag", recorded)
    bag_kit.changed(bag, lambda data: bag_kit.without_chunks(bytes(data)))
    assert read(bag) == key(recorded)
    assert read(bag, ("instruction",)) == key([m for m in recorded if m.topic == "instruction"])


def test_only_the_topics_asked_for_come_by_the_name_asked_for(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded)
    with Recording(bag) as recording:
        found = list(recording.messages(["/instruction", "joint_states", "absent"]))
    assert {m.topic for m in found} == {"/instruction", "joint_states"}
    assert len(found) == 76


def test_a_pass_over_a_rare_topic_reads_only_the_chunks_that_have_it(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded)
    starts = [start for kind, start, _ in bag_kit.records(storage_file(bag).read_bytes()) if kind == bag_kit.CHUNK]
    bag_kit.changed(bag, lambda data: bag_kit.flipped(data, 8 * (starts[3] + 100)))
    assert read(bag, ("instruction",)) == key([m for m in recorded if m.topic == "instruction"])
    assert read(bag, ("absent",)) == []
    with pytest.raises(BagError, match="its checksum is wrong"):
        read(bag, ("joint_states",))


def test_messages_are_decoded_once_and_only_when_asked(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded)
    with Recording(bag) as recording:
        states = list(recording.messages(["joint_states"]))
    truth = [m for m in recorded if m.topic == "joint_states"]
    assert [m.stamp_ns for m in states] == [m.msg.header.stamp.sec * 10**9 + m.msg.header.stamp.nanosec for m in truth]
    assert all(m._msg is None for m in states)
    np.testing.assert_array_equal(states[3].position, truth[3].msg.position)  # forwarded
    assert states[3].msg is states[3].msg
    with pytest.raises(AttributeError):
        _ = states[3].no_such_field


@pytest.mark.parametrize("little", [True, False])
def test_the_stamp_is_read_from_bytes_of_either_endianness(tmp_path: Path, little: bool) -> None:
    order = "<" if little else ">"
    raw = (
        bytes([0, int(little), 0, 0]) + struct.pack(order + "iIII", 12, 34, 1, 0) + struct.pack(order + "III", 0, 0, 0)
    )
    message = one_message(tmp_path, raw)
    assert message.stamp_ns == 12_000_000_034


def test_a_message_that_is_cut_says_where_it_is(tmp_path: Path) -> None:
    message = one_message(tmp_path, bytes([0, 1, 0, 0, 5, 0, 0]))
    with pytest.raises(BagError, match=r"joint_states: the message received at 1700000000\.123 s is damaged.*7 bytes"):
        _ = message.stamp_ns
    with pytest.raises(
        BagError, match=r"joint_states.*1700000000\.123 s.*cannot be decoded as sensor_msgs/msg/JointState"
    ):
        _ = message.position


def one_message(folder: Path, raw: bytes) -> BagMessage:
    with Writer(folder / "bag", version=9) as writer:
        connection = writer.add_connection("/joint_states", "sensor_msgs/msg/JointState", typestore=STORE)
        writer.write(connection, START_NS, raw)
    with Recording(folder / "bag") as recording:
        (message,) = recording.messages(["joint_states"])
    assert message.receive_ns == START_NS
    return message


def split_by(
    recorded: list[Recorded], folder: Path, first: Callable[[int], bool], second: Callable[[int], bool]
) -> Path:
    """A bag of two files without metadata.yaml, with the messages of whose index the functions are true."""
    folder.mkdir()
    for number, chosen in enumerate((first, second)):
        part = write_bag(folder / f"part{number}", [m for i, m in enumerate(recorded) if chosen(i)])
        shutil.move(storage_file(part), folder / f"{folder.name}_{number}.mcap")
        shutil.rmtree(part)
    return folder


def test_split_files_that_overlap_are_merged_by_time(tmp_path: Path, recorded: list[Recorded]) -> None:
    folder = split_by(recorded, tmp_path / "run", lambda i: i < 60 and i % 3 != 0, lambda i: i >= 60 or i % 3 == 0)
    assert find_bags(str(tmp_path)) == [folder]
    assert read(folder) == key(recorded)
    assert any("run_0.mcap and run_1.mcap overlap in time" in note for note in notes_of(folder))
    assert any("no metadata.yaml" in note for note in notes_of(folder))


def test_files_that_follow_one_another_are_read_one_after_the_other(tmp_path: Path, recorded: list[Recorded]) -> None:
    folder = split_by(recorded, tmp_path / "run", lambda i: i < 60, lambda i: i >= 60)
    assert read(folder) == key(recorded)
    assert not any("overlap" in note for note in notes_of(folder))


def test_messages_in_two_files_are_given_once(tmp_path: Path, recorded: list[Recorded]) -> None:
    folder = split_by(recorded, tmp_path / "run", lambda i: i < 60, lambda i: i >= 40)
    assert read(folder) == key(recorded)
    assert "20 messages stand in two files, and are used once: was one file copied or cut?" in notes_of(folder)


@pytest.mark.parametrize("listed", [True, False])
def test_a_file_copied_into_the_folder_gives_nothing_twice(
    tmp_path: Path, recorded: list[Recorded], listed: bool
) -> None:
    bag = write_bag(tmp_path / "bag", recorded)
    shutil.copy(storage_file(bag), bag / "bag_copy.mcap")
    if not listed:
        (bag / "metadata.yaml").unlink()
    assert read(bag) == key(recorded)
    with Recording(bag) as recording:
        assert recording.topics["/joint_states"].count == 75
        said = [note for note in recording.notes if "left out" in note]
    assert len(said) == 1
    assert "copy" in said[0]


def test_a_folder_of_another_storage_s_copy_gives_nothing_twice(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded)
    other = write_bag(tmp_path / "other", recorded, SQLITE)
    shutil.move(storage_file(other), bag / "bag.db3")
    (bag / "metadata.yaml").unlink()
    assert read(bag) == key(recorded)


def test_a_damaged_or_missing_metadata_file_is_a_note(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded)
    (bag / "metadata.yaml").write_text("rosbag2_bagfile_information: [")
    assert read(bag) == key(recorded)
    assert any("metadata.yaml is damaged" in note for note in notes_of(bag))
    storage_file(bag).unlink()
    with pytest.raises(BagError, match=r"bag: metadata\.yaml is damaged.*but there is none"):
        Recording(bag)


def test_a_listed_file_that_is_missing_is_named(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded)
    storage_file(bag).rename(bag / "renamed.mcap")
    with pytest.raises(BagError, match=r"metadata\.yaml lists bag\.mcap, which is not there; copy it, or remove"):
        Recording(bag)


def test_messages_that_swapped_places_are_put_in_order(tmp_path: Path, recorded: list[Recorded]) -> None:
    swapped = [*recorded]
    for index in range(0, len(swapped) - 25, 25):  # over the borders of chunks
        swapped[index], swapped[index + 24] = swapped[index + 24], swapped[index]
    assert key(swapped) != key(recorded)
    for storage in (MCAP, SQLITE):
        assert read(write_bag(tmp_path / storage.name, swapped, storage)) == key(recorded)


def test_a_bag_written_topic_by_topic_is_put_in_order(tmp_path: Path) -> None:
    recorded = messages(3.0)
    by_topic = sorted(recorded, key=lambda m: m.topic)
    for storage in (MCAP, SQLITE):
        assert read(write_bag(tmp_path / storage.name, by_topic, storage)) == key(recorded)


def custom_store() -> Any:
    store = get_typestore(Stores.ROS2_KILTED)
    store.register(get_types_from_msg("string name\nfloat64[3] values\n", "lab_msgs/msg/Inner"))
    store.register(get_types_from_msg("std_msgs/Header header\nlab_msgs/Inner[] parts\n", "lab_msgs/msg/Outer"))
    return store


@pytest.mark.parametrize("storage", [MCAP, SQLITE])
def test_custom_types_come_from_the_bag(tmp_path: Path, storage: StoragePlugin) -> None:
    store = custom_store()
    inner = store.types["lab_msgs/msg/Inner"]("left", np.array([1.0, 2.0, 3.0]))
    sent = store.types["lab_msgs/msg/Outer"](toy_robot.header(START_NS), [inner])
    with Writer(tmp_path / "bag", version=9, storage_plugin=storage) as writer:
        connection = writer.add_connection("/lab", "lab_msgs/msg/Outer", typestore=store)
        writer.write(connection, START_NS + 5, store.serialize_cdr(sent, "lab_msgs/msg/Outer"))
    with Recording(tmp_path / "bag") as recording:
        (message,) = recording.messages(["lab"])
    assert message.stamp_ns == START_NS
    assert message.parts[0].name == "left"
    np.testing.assert_array_equal(message.parts[0].values, [1.0, 2.0, 3.0])


def old_bag(path: Path, topic: str, msgtype: str, raw: bytes) -> Path:
    """A file as Foxy's recorder makes it: no definitions, no schema version."""
    with sqlite3.connect(path) as database:
        database.executescript(
            "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL, "
            "serialization_format TEXT NOT NULL, offered_qos_profiles TEXT NOT NULL);"
            "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL, timestamp INTEGER NOT NULL, "
            "data BLOB NOT NULL); CREATE INDEX timestamp_idx ON messages (timestamp ASC);"
        )
        database.execute("INSERT INTO topics VALUES (1, ?, ?, 'cdr', '')", (topic, msgtype))
        database.execute("INSERT INTO messages VALUES (1, 1, ?, ?)", (START_NS, raw))
    database.close()
    return path


class Cdr:
    """Little-endian CDR, byte by byte, so that the expected values owe nothing to the reader."""

    def __init__(self) -> None:
        self.data = b""

    def put(self, kind: str, *values: float) -> "Cdr":
        size = struct.calcsize(kind)
        for value in values:
            self.data += b"\0" * (-len(self.data) % size) + struct.pack("<" + kind, value)
        return self

    def text(self, value: str) -> "Cdr":
        self.put("I", len(value) + 1).data += value.encode() + b"\0"
        return self

    def point(self, *positions: float) -> "Cdr":
        """trajectory_msgs/JointTrajectoryPoint with positions only."""
        return self.put("I", len(positions)).put("d", *positions).put("I", 0, 0, 0).put("i", 0).put("I", 0)

    def bytes(self) -> bytes:
        return bytes([0, 1, 0, 0]) + self.data


def test_types_of_old_bags_come_from_their_distribution(tmp_path: Path) -> None:
    raw = Cdr().put("i", 7).put("I", 8).text("").put("I", 1).text("lift").put("I", 1).put("d", 0.25).put("I", 0, 0)
    bag = old_bag(tmp_path / "old.db3", "/joint_states", "sensor_msgs/msg/JointState", raw.bytes())
    with Recording(bag) as recording:
        (message,) = recording.messages(["joint_states"])
    assert message.stamp_ns == 7_000_000_008
    assert (list(message.name), list(message.position)) == (["lift"], [0.25])


def test_the_forms_that_a_controllers_state_has_had_are_told_apart(tmp_path: Path) -> None:
    kind = "control_msgs/msg/JointTrajectoryControllerState"
    head = Cdr().put("i", 7).put("I", 8).text("").put("I", 1).text("lift")
    foxy = Cdr()
    foxy.data = head.data
    foxy.point(1.0).point(2.0).point(-1.0)
    with Recording(old_bag(tmp_path / "foxy.db3", "/state", kind, foxy.bytes())) as recording:
        (message,) = recording.messages(["state"])
    assert list(message.desired.positions) == [1.0]
    assert list(message.actual.positions) == [2.0]
    humble = Cdr()
    humble.data = head.data
    for position in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        humble.point(position)
    humble.put("I", 0)  # no multi-DoF joints
    for _ in range(6):
        humble.put("I", 0, 0, 0).put("i", 0).put("I", 0)
    with Recording(old_bag(tmp_path / "humble.db3", "/state", kind, humble.bytes())) as recording:
        (message,) = recording.messages(["state"])
    assert list(message.reference.positions) == [1.0]
    assert list(message.feedback.positions) == [2.0]
    assert not hasattr(message.msg, "speed_scaling_factor")


def test_gripper_feedback_is_read_without_its_definition(tmp_path: Path) -> None:
    raw = Cdr().put("B", *range(16)).put("d", 0.04, 12.5).put("B", 1, 0)
    kind = "control_msgs/action/GripperCommand_FeedbackMessage"
    with Recording(old_bag(tmp_path / "bag.db3", "/gripper/_action/feedback", kind, raw.bytes())) as recording:
        (message,) = recording.messages(["gripper/_action/feedback"])
    assert message.stamp_ns is None
    assert (message.feedback.position, message.feedback.effort) == (0.04, 12.5)
    assert (message.feedback.stalled, message.feedback.reached_goal) == (True, False)


def test_a_service_call_is_read_without_its_definition(tmp_path: Path) -> None:
    info = Cdr().put("B", 1).put("i", 7).put("I", 8).put("B", *range(16)).put("q", 5)
    raw = info.put("I", 1).text("push the red block").put("I", 0)
    kind = "dit_policy_msgs/srv/SetInstruction_Event"
    with Recording(old_bag(tmp_path / "bag.db3", "/policy/set/_service_event", kind, raw.bytes())) as recording:
        (message,) = recording.messages(["policy/set/_service_event"])
    assert message.info.sequence_number == 5
    assert [request.instruction for request in message.request] == ["push the red block"]
    assert list(message.response) == []


def test_a_type_that_is_defined_nowhere_is_named(tmp_path: Path) -> None:
    bag = old_bag(tmp_path / "old.db3", "/lab", "lab_msgs/msg/Unknown", b"\0\1\0\0")
    with (
        Recording(bag) as recording,
        pytest.raises(BagError, match=r"type lab_msgs/msg/Unknown: the bag does not carry"),
    ):
        list(recording.messages(["lab"]))


def test_what_a_killed_recorder_left_in_sqlites_log_is_read(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded[:100], SQLITE)
    whole = storage_file(write_bag(tmp_path / "whole", recorded, SQLITE))
    live = sqlite3.connect(storage_file(bag))
    live.execute("PRAGMA journal_mode=WAL")
    live.execute("PRAGMA wal_autocheckpoint=0")
    live.execute("ATTACH ? AS whole", (str(whole),))
    live.execute("INSERT INTO messages SELECT * FROM whole.messages WHERE id > 100")
    live.commit()
    killed = tmp_path / "killed"
    killed.mkdir()
    for path in (storage_file_of(bag), storage_file_of(bag).with_name("bag.db3-wal")):
        shutil.copy(path, killed)
    live.close()
    before = fingerprint(killed / "bag.db3")
    assert read(killed / "bag.db3") == key(recorded)
    assert any("bag.db3-wal" in note for note in notes_of(killed / "bag.db3"))
    assert sorted(path.name for path in killed.iterdir()) == ["bag.db3", "bag.db3-wal"]
    assert fingerprint(killed / "bag.db3") == before


def storage_file_of(bag: Path) -> Path:
    return bag / f"{bag.name}.db3"


def test_the_fingerprint_is_of_the_recordings_files(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded)
    first = fingerprint(bag)
    assert len(first) == 64
    (bag / "notes.txt").write_text("not the recording's")
    assert fingerprint(bag) == first
    bag_kit.changed(bag, lambda data: bag_kit.flipped(data, 4000))
    assert fingerprint(bag) != first
    bag_kit.changed(bag, lambda data: bag_kit.flipped(data, 4000))
    assert fingerprint(bag) == first
    storage_file_name = next(bag.glob("*.mcap"))
    storage_file_name.rename(bag / "other.mcap")
    assert fingerprint(bag) != first


def test_memory_does_not_grow_with_the_bag(tmp_path: Path) -> None:
    image = STORE.types["sensor_msgs/msg/Image"]
    pixels = np.zeros(480 * 640 * 3, np.uint8)
    for storage in (MCAP, SQLITE):
        sent = [
            Recorded(
                "side/image_raw",
                START_NS + k * 10**8,
                image(toy_robot.header(START_NS + k * 10**8), 480, 640, "rgb8", 0, 1920, pixels),
            )
            for k in range(40)
        ]
        bag = write_bag(tmp_path / storage.name, sent, storage, chunk_messages=1000)
        tracemalloc.start()
        with Recording(bag) as recording:
            count = sum(1 for _ in recording.messages(ALL_TOPICS))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == 40
        assert peak < 8 * pixels.nbytes, storage


def test_bags_are_found_in_folders_files_and_patterns(tmp_path: Path) -> None:
    for name in ("b", "a", "deeper/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metadata.yaml").touch()
        (tmp_path / name / "x.mcap").touch()
    (tmp_path / "unclosed").mkdir()
    (tmp_path / "unclosed" / "unclosed_0.mcap").touch()
    (tmp_path / "unclosed" / "unclosed_1.mcap").touch()
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "one.mcap").touch()
    (tmp_path / "loose" / "two.db3.zstd").touch()
    (tmp_path / "single.db3").touch()
    (tmp_path / "notes.txt").touch()
    names = ("a", "b", "deeper/c", "loose/one.mcap", "loose/two.db3.zstd", "single.db3", "unclosed")
    everything = [tmp_path / name for name in names]
    assert find_bags(str(tmp_path)) == everything
    assert find_bags(str(tmp_path / "[ab]")) == everything[:2]
    with pytest.raises(ValueError, match=r"nothing_here: no bag there; expected folders with a metadata\.yaml"):
        find_bags(str(tmp_path / "nothing_here"))
