"""Damage of every kind: each bag gives the intact bag's data, a part of it that is reported, or a refusal in words."""

import io
import json
import random
import shutil
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bag_kit
import numpy as np
import pytest
from bag_kit import ALL_TOPICS, key, storage_file, write_bag
from converting import config_for
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.recording import BagError, Recording
from dit_policy_training.conversion.reloaded import Reloaded
from dit_policy_training.conversion.sampling import EpisodeEnd, Row, Sampler
from dit_policy_training.convert import convert
from rich.console import Console
from rosbags.rosbag2 import StoragePlugin
from toy_robot import START_NS, STORE, Recorded, messages, with_header_ns

from dit_policy_ros.embodiment import Embodiment

MCAP, SQLITE = StoragePlugin.MCAP, StoragePlugin.SQLITE3
TIMES = 50
SECONDS = 1.5
CAMERA = "side/image_raw"
COMMANDS = "arm_controller/joint_trajectory"

Read = list[tuple[str, int, bytes]]
Damage = Callable[[bytearray, random.Random], bytes]


def cut(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def flip(data: bytearray, rng: random.Random) -> bytes:
    return bag_kit.flipped(data, rng.randrange(8 * len(data)))


@pytest.fixture(scope="module")
def recorded() -> list[Recorded]:
    return messages(SECONDS)


@pytest.fixture(scope="module")
def truth(recorded: list[Recorded]) -> Read:
    return key(recorded)


@pytest.fixture(scope="module")
def bags(recorded: list[Recorded], tmp_path_factory: pytest.TempPathFactory) -> dict[StoragePlugin, Path]:
    folder = tmp_path_factory.mktemp("damaged")
    return {storage: write_bag(folder / storage.name, recorded, storage) for storage in (MCAP, SQLITE)}


@pytest.fixture
def config(embodiment_file: Path, tmp_path: Path) -> ConvertConfig:
    return ConvertConfig("unused", embodiment_file, tmp_path / "unused")


def damaged(bag: Path, damage: Damage) -> Iterator[Path]:
    """The bag damaged in TIMES ways, one after the other; whole again at the end."""
    whole = storage_file(bag).read_bytes()
    try:
        for seed in range(TIMES):
            storage_file(bag).write_bytes(damage(bytearray(whole), random.Random(seed)))
            yield bag
    finally:
        storage_file(bag).write_bytes(whole)


def read(bag: Path, recover: bool = False) -> tuple[Read, list[str]]:
    with Recording(bag, recover) as recording:
        found = [(m.topic, m.receive_ns, bytes(m.raw)) for m in recording.messages(ALL_TOPICS)]
        return found, recording.notes


def bits_apart(found: Read, truth: Read) -> int | None:
    """How many bits of the messages' bytes differ; None if topics, times or lengths do."""
    if [(topic, ns, len(raw)) for topic, ns, raw in found] != [(topic, ns, len(raw)) for topic, ns, raw in truth]:
        return None
    pairs = zip((raw for *_, raw in found), (raw for *_, raw in truth), strict=True)
    return sum((int.from_bytes(a) ^ int.from_bytes(b)).bit_count() for a, b in pairs if a != b)


@pytest.mark.parametrize("storage", [MCAP, SQLITE])
def test_a_file_that_is_cut_short_is_refused_by_name(bags: dict[StoragePlugin, Path], storage: StoragePlugin) -> None:
    name = storage_file(bags[storage]).name
    for bag in damaged(bags[storage], cut):
        with pytest.raises(BagError, match=name):
            read(bag)


def test_a_turned_bit_in_an_mcap_is_found_wherever_it_matters(bags: dict[StoragePlugin, Path], truth: Read) -> None:
    refused = 0
    for bag in damaged(bags[MCAP], flip):
        try:
            assert read(bag)[0] == truth
        except BagError:
            refused += 1
    assert refused > TIMES * 0.8


def test_a_turned_bit_in_sqlite_changes_nothing_but_a_message_s_own_bytes(
    bags: dict[StoragePlugin, Path], truth: Read
) -> None:
    """sqlite has no checksums: of a bit inside a message nobody can know."""
    seen: Counter[str] = Counter()
    for bag in damaged(bags[SQLITE], flip):
        try:
            apart = bits_apart(read(bag)[0], truth)
            assert apart in (0, 1)
            seen[f"{apart} bits"] += 1
        except BagError:
            seen["refused"] += 1
    assert seen["0 bits"]


@pytest.mark.parametrize("damage", [cut, flip])
def test_recovering_an_mcap_gives_its_beginning_and_says_so(
    bags: dict[StoragePlugin, Path], truth: Read, damage: Damage
) -> None:
    lengths = []
    for bag in damaged(bags[MCAP], damage):
        try:
            found, notes = read(bag, recover=True)
        except BagError as error:
            assert "nothing can be read of it" in str(error)  # noqa: PT017 (either is right)
            continue
        assert found == truth[: len(found)]
        lengths.append(len(found))
        assert len(found) == len(truth) or any("damaged, and recovered" in note for note in notes)
    assert len(set(lengths)) > 3


def test_recovering_leaves_out_what_may_be_incomplete(tmp_path: Path, recorded: list[Recorded]) -> None:
    """Where messages are not in order within the file, the last ones of the readable part have lost neighbours."""
    swapped = [*recorded]
    for index in range(0, len(swapped) - 25, 25):
        swapped[index], swapped[index + 24] = swapped[index + 24], swapped[index]
    bag = write_bag(tmp_path / "bag", swapped)
    truth = key(recorded)
    lengths = set()
    for _ in damaged(bag, cut):
        try:
            found, _notes = read(bag, recover=True)
        except BagError:
            continue
        assert found == truth[: len(found)]
        lengths.add(len(found))
    assert len(lengths) > 3


def test_how_much_is_lost_is_told_where_the_index_is_whole(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded)
    third = chunk_starts(bag)[2]
    bag_kit.changed(bag, lambda data: bag_kit.flipped(data, 8 * (third + 100)))
    with pytest.raises(
        BagError, match=r"bag\.mcap: the chunk at byte \d+ is damaged: its checksum is wrong; --recover"
    ):
        read(bag)
    found, notes = read(bag, recover=True)
    assert len(found) == 40  # two chunks of 20
    assert any(
        "40 messages, over" in note and f"{len(recorded) - 40} of {len(recorded)} are lost" in note for note in notes
    )


def chunk_starts(bag: Path) -> list[int]:
    """Where the content of each chunk begins."""
    return [start for kind, start, _ in bag_kit.records(storage_file(bag).read_bytes()) if kind == bag_kit.CHUNK]


def test_a_turned_bit_in_the_index_is_found(bags: dict[StoragePlugin, Path], truth: Read) -> None:
    whole = storage_file(bags[MCAP]).read_bytes()
    (ends,) = [start for kind, start, _ in bag_kit.records(whole) if kind == bag_kit.FOOTER]
    (summary,) = struct.unpack_from("<Q", whole, ends)

    def in_index(data: bytearray, rng: random.Random) -> bytes:
        return bag_kit.flipped(data, rng.randrange(8 * summary, 8 * (ends - 9)))

    for bag in damaged(bags[MCAP], in_index):
        with pytest.raises(BagError, match="the checksum of its index is wrong"):
            read(bag)
        found, notes = read(bag, recover=True)
        assert found == truth
        assert any("recovered" in note for note in notes)


def test_a_chunk_that_no_longer_looks_like_one_is_missed(tmp_path: Path, recorded: list[Recorded]) -> None:
    """Its kind is turned into a private one, which readers pass over."""
    bag = write_bag(tmp_path / "bag", recorded)
    third = chunk_starts(bag)[2]
    bag_kit.changed(bag, lambda data: bag_kit.flipped(data, 8 * (third - 9) + 7))
    with pytest.raises(BagError, match=r"bag\.mcap: \d+ messages were found, the file's index counts \d+"):
        read(bag)
    assert read(bag, recover=True)[0] == key(recorded)[:40]


@pytest.mark.parametrize("byte", [9, 9 + 6])  # of a message's record: its channel, and its receive time
def test_without_checksums_a_message_of_another_topic_or_time_is_found(
    tmp_path: Path, recorded: list[Recorded], byte: int
) -> None:
    bag = write_bag(tmp_path / "bag", recorded, checksums=False)
    second = chunk_starts(bag)[1] + 40  # its first message
    bag_kit.changed(bag, lambda data: bag_kit.flipped(data, 8 * (second + byte)))
    with pytest.raises(BagError, match=r"the chunk at byte \d+ is damaged"):
        read(bag)
    assert read(bag, recover=True)[0] == key(recorded)[:20]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_checksum_over_all_messages_is_looked_at(tmp_path: Path, recorded: list[Recorded], indexed: bool) -> None:
    bag = write_bag(tmp_path / "bag", recorded, checksums=False)
    if indexed:
        bag_kit.changed(bag, bag_kit.with_data_checksum)
    else:
        bag_kit.changed(bag, lambda data: bag_kit.without_chunks(bytes(data), checksum=True))
    assert read(bag)[0] == key(recorded)
    whole = storage_file(bag).read_bytes()
    picture = whole.rindex(STORE.serialize_cdr(last_picture(recorded), "sensor_msgs/msg/Image")) + 2000
    bag_kit.changed(bag, lambda data: bag_kit.flipped(data, 8 * picture))
    with pytest.raises(BagError, match="the checksum of its messages is wrong"):
        read(bag)
    with pytest.raises(BagError, match="where it is damaged cannot be told"):
        read(bag, recover=True)


def last_picture(recorded: list[Recorded]) -> Any:
    return [m.msg for m in recorded if m.topic == CAMERA][-1]


def test_a_definition_that_does_not_fit_its_hash_is_found(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded, SQLITE)
    with sqlite3.connect(storage_file(bag)) as database:
        database.execute(
            "UPDATE message_definitions SET encoded_message_definition = "
            "replace(encoded_message_definition, 'float64[] position', 'float64[] positiom')"
        )
    database.close()
    with pytest.raises(
        BagError, match=r"type sensor_msgs/msg/JointState: its definition in the bag is damaged: its hash"
    ):
        read(bag)


def test_a_damaged_file_among_several_is_named(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "run", recorded[:60])
    other = write_bag(tmp_path / "other", recorded[60:])
    shutil.move(storage_file(other), bag / "run_1.mcap")
    (bag / "metadata.yaml").unlink()
    (bag / "run.mcap").rename(bag / "run_0.mcap")
    (bag / "run_1.mcap").write_bytes((bag / "run_1.mcap").read_bytes()[:-200])
    with pytest.raises(BagError, match=r"^run_1\.mcap: "):
        read(bag)


@pytest.mark.parametrize("name", ["bag.mcap", "bag.db3"])
@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"\x89MCAP0\r\n", b"SQLite format 3\0" + b"\0" * 4080])
def test_files_that_hold_nothing_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for recover in (False, True):
        with pytest.raises(BagError, match=name):
            read(tmp_path / name, recover)


@pytest.mark.parametrize("storage", [MCAP, SQLITE])
def test_a_recording_without_a_message_is_refused_with_what_it_lacks(
    tmp_path: Path, storage: StoragePlugin, embodiment: Embodiment, config: ConvertConfig
) -> None:
    bag = write_bag(tmp_path / "bag", [], storage)
    assert read(bag) == ([], ["there is no message in it: nothing was published, or the QoS did not match"])
    with pytest.raises(ValueError, match=r"joint_states"):
        rows(bag, embodiment, config)


@pytest.mark.parametrize("storage", [MCAP, SQLITE])
def test_a_clock_set_back_is_refused(tmp_path: Path, storage: StoragePlugin) -> None:
    def back(m: Recorded) -> Recorded:
        late = m.receive_ns > START_NS + 2_000_000_000
        return replace(m, receive_ns=m.receive_ns - 1_500_000_000) if late else m

    bag = write_bag(tmp_path / "bag", [back(m) for m in messages(3.0)], storage)
    with pytest.raises(BagError, match=r"the receive times on /\S+ run backwards.*clock was set back"):
        read(bag)
    if storage is MCAP:
        found, notes = read(bag, recover=True)
        assert all("run backwards" not in note or "recovered" in note for note in notes)
        assert found == key(messages(3.0))[: len(found)]


def test_a_message_given_to_another_topic_is_found_by_metadata(tmp_path: Path, recorded: list[Recorded]) -> None:
    bag = write_bag(tmp_path / "bag", recorded, SQLITE)
    with sqlite3.connect(storage_file(bag)) as database:
        database.execute("UPDATE messages SET topic_id = 1 WHERE id = 50 AND topic_id != 1")
        assert database.total_changes == 1
    database.close()
    with pytest.raises(BagError, match=r"metadata\.yaml counts other messages on /\S+, /\S+ than are there"):
        read(bag)


def rows(bag: Path, embodiment: Embodiment, config: ConvertConfig, recover: bool = False) -> dict[int, Row]:
    """The kept rows by their instant."""
    with Recording(bag, recover) as recording:
        return dict(kept(Sampler(recording, config, embodiment)))


def kept(sampler: Sampler) -> Iterator[tuple[int, Row]]:
    episode: list[Row] = []
    for event in sampler.events():
        if isinstance(event, EpisodeEnd):
            yield from ((row.stamp_ns, row) for row in episode if event.reason is None)
            episode = []
        else:
            episode.append(event)


def assert_same(found: dict[int, Row], truth: dict[int, Row]) -> None:
    """Every row is the intact bag's row of that instant, bit for bit."""
    assert found.keys() <= truth.keys()
    for stamp_ns, row in found.items():
        other = truth[stamp_ns]
        assert row.task == other.task
        assert row.action.tobytes() == other.action.tobytes()
        assert row.frame.keys() == other.frame.keys()
        for name, value in row.frame.items():
            assert value.tobytes() == other.frame[name].tobytes(), name


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("damage", [cut, flip])
def test_rows_of_a_damaged_mcap_are_those_of_the_intact_one(
    bags: dict[StoragePlugin, Path], embodiment: Embodiment, config: ConvertConfig, damage: Damage, recover: bool
) -> None:
    truth = rows(bags[MCAP], embodiment, config)
    lengths = []
    for bag in damaged(bags[MCAP], damage):
        try:
            found = rows(bag, embodiment, config, recover)
        except ValueError as error:
            assert str(error)  # noqa: PT017 (either is right)
            continue
        assert_same(found, truth)
        lengths.append(len(found))
    assert (len(set(lengths)) > 2) == recover


@pytest.mark.parametrize("damage", [cut, flip])
def test_rows_of_a_damaged_sqlite_file_are_those_of_the_intact_one(
    bags: dict[StoragePlugin, Path], truth: Read, embodiment: Embodiment, config: ConvertConfig, damage: Damage
) -> None:
    intact = rows(bags[SQLITE], embodiment, config)
    for bag in damaged(bags[SQLITE], damage):
        try:
            found = rows(bag, embodiment, config)
        except ValueError as error:
            assert str(error)  # noqa: PT017 (either is right)
            continue
        if bits_apart(read(bag)[0], truth) == 0:
            assert found.keys() == intact.keys()
            assert_same(found, intact)


def reversed_joints(m: Recorded) -> Iterable[Recorded]:
    if m.receive_ns > START_NS + 700_000_000 and m.topic == "joint_states":
        values = {name: getattr(m.msg, name)[::-1].copy() for name in ("position", "velocity")}
        m = replace(m, msg=replace(m.msg, name=m.msg.name[::-1], **values))
    if m.receive_ns > START_NS + 700_000_000 and m.topic == COMMANDS:
        points = [
            replace(point, positions=point.positions[::-1].copy(), velocities=point.velocities[::-1].copy())
            for point in m.msg.points
        ]
        m = replace(m, msg=replace(m.msg, joint_names=m.msg.joint_names[::-1], points=points))
    yield m


def test_joints_reordered_midway_change_no_row(
    tmp_path: Path, bags: dict[StoragePlugin, Path], embodiment: Embodiment, config: ConvertConfig
) -> None:
    found = rows(write_bag(tmp_path / "bag", messages(SECONDS, edit=reversed_joints)), embodiment, config)
    truth = rows(bags[MCAP], embodiment, config)
    assert found.keys() == truth.keys()
    assert_same(found, truth)


@pytest.mark.parametrize("on_gap", ["split", "drop", "refuse"])
def test_a_camera_missing_for_three_seconds_leaves_out_rows_and_invents_none(
    tmp_path: Path, embodiment: Embodiment, config: ConvertConfig, on_gap: str
) -> None:
    def missing(m: Recorded) -> Iterable[Recorded]:
        return [] if m.topic == CAMERA and 2.0 < (m.receive_ns - START_NS) / 1e9 < 5.0 else [m]

    truth = rows(write_bag(tmp_path / "whole", messages(7.0)), embodiment, config)
    bag = write_bag(tmp_path / "bag", messages(7.0, edit=missing))
    config.time.on_gap = on_gap
    if on_gap != "split":  # the bag is one episode
        with pytest.raises(ValueError, match=r"side at \d+\.\d+ s: no message on side/image_raw"):
            rows(bag, embodiment, config)
        return
    with Recording(bag) as recording:
        sampler = Sampler(recording, config, embodiment)
        found = dict(kept(sampler))
    assert_same(found, truth)
    into = np.array(sorted(found)) - START_NS
    assert not ((into > 2_400_000_000) & (into < 4_900_000_000)).any()
    assert len(sampler.account.gaps) == 1
    assert sampler.account.gaps[0].stream == "side"
    assert (into < 2_000_000_000).any()
    assert (into > 5_200_000_000).any()


def test_header_stamps_of_zero_are_refused_with_what_to_do(
    tmp_path: Path, embodiment: Embodiment, config: ConvertConfig
) -> None:
    def zero(m: Recorded) -> Iterable[Recorded]:
        yield replace(m, msg=with_header_ns(m.msg, 0)) if m.topic == CAMERA else m

    bag = write_bag(tmp_path / "bag", messages(SECONDS, edit=zero))
    with pytest.raises(ValueError, match=r"side/image_raw: the header stamp.*is zero.*--time\.stamps"):
        rows(bag, embodiment, config)


@pytest.mark.parametrize("overlap", [0, 20])
def test_splits_and_copies_change_no_row(
    tmp_path: Path,
    recorded: list[Recorded],
    bags: dict[StoragePlugin, Path],
    embodiment: Embodiment,
    config: ConvertConfig,
    overlap: int,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for number, part in enumerate((recorded[: 60 + overlap], recorded[60:])):
        shutil.move(storage_file(write_bag(tmp_path / f"part{number}", part)), run / f"run_{number}.mcap")
    shutil.copy(run / "run_0.mcap", run / "run_2.mcap")
    found = rows(run, embodiment, config)
    truth = rows(bags[MCAP], embodiment, config)
    assert found.keys() == truth.keys()
    assert_same(found, truth)


def test_a_file_that_is_no_mcap_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "notes.mcap").write_bytes(b"written down by hand" * 100)
    with pytest.raises(BagError, match=r"notes\.mcap: is no mcap file.*Copy it again.*leave it out of --bags"):
        Recording(tmp_path / "notes.mcap").__enter__()


def test_a_conversion_uses_what_is_sound_and_says_what_is_not(tmp_path: Path, embodiment_file: Path) -> None:
    """A whole bag, one cut short and recovered, one that is empty: the first two in the dataset, the third refused."""
    recorded = messages(2.0)
    bags = tmp_path / "bags"
    write_bag(bags / "a", recorded)
    short = write_bag(bags / "b", recorded)
    bag_kit.changed(short, lambda data: bytes(data[: round(0.7 * len(data))]))
    (bags / "c.mcap").touch()
    config = config_for(bags, embodiment_file, tmp_path / "out", recover=True)
    console = Console(record=True, width=300, file=io.StringIO())
    refused = {refusal.bag.name: refusal.reason for refusal in convert(config, console)}
    assert refused.keys() == {"c.mcap"}
    assert "the file is empty" in refused["c.mcap"]
    dataset = Reloaded.open(tmp_path / "out")
    first, second = (dataset.rows(episode) for episode in (0, 1))
    count = second.stop - second.start
    assert len(dataset.episodes) == 2
    assert 5 < count < first.stop - first.start
    for vector in ("observation.state", "action"):
        written = dataset.vector(vector)
        assert written[second].tobytes() == written[first][:count].tobytes()
    account = json.loads((tmp_path / "out" / "conversion.json").read_text())["bags"][1]["account"]
    assert any("b.mcap: damaged, and recovered" in note for note in account["notes"])
