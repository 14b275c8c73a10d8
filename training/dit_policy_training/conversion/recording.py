"""Reading recordings: a bag's topics, and its messages in the order they were received. No ROS needed.

sqlite3 and mcap, plain or compressed (whole files, messages, chunks), split, without metadata.yaml, Dashing to Kilted.
Everything that a file can be checked by is checked; what is wrong is a BagError, what is odd a note.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import merge
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from backports import zstd

from dit_policy_training.conversion.bag_files import (
    BagFiles,
    bag_files,
    content_files,
    decompressed,
    find_bags,
    fingerprint,
    storage_kind,
)
from dit_policy_training.conversion.mcap_file import McapFile
from dit_policy_training.conversion.message import BagError, BagMessage, MessageKind
from dit_policy_training.conversion.message_types import message_kind
from dit_policy_training.conversion.sqlite_file import SqliteFile
from dit_policy_training.conversion.storage import Storage

__all__ = ["BagError", "BagMessage", "Recording", "TopicInfo", "content_files", "find_bags", "fingerprint"]

_ZSTD = b"\x28\xb5\x2f\xfd"  # how compressed messages begin; CDR begins with a zero
_STORAGES: dict[str, Callable[[Path, bool], Storage]] = {".mcap": McapFile, ".db3": SqliteFile}


@dataclass(frozen=True)
class TopicInfo:
    """A topic as it stands in the recording, with its type and how many messages there are."""

    name: str
    msgtype: str
    count: int


class Recording:
    """A bag, open for reading; a context manager.

    `topics` has every topic with messages by name; `notes` says in sentences what is odd about the recording (complete
    once `messages` is through). `start_ns`, `end_ns`: the first and last receive times, 0 if there is no message.
    """

    def __init__(self, bag: Path, recover: bool = False):
        """With `recover`, a damaged mcap file is read up to its damage. Raises BagError if the bag cannot be read."""
        self.bag = bag
        self.notes: list[str] = []
        self._storages: list[Storage] = []
        self._opened = ExitStack()
        try:
            files = bag_files(bag)
            self.notes += files.notes
            for path in files.paths:
                self._storages.append(self._storage(path, recover))
            for storage in self._storages:
                self.notes += storage.notes
            self._distro = files.distro or next((s.distro for s in self._storages if s.distro), None)
            self.topics = self._list_topics()
            self._check_counts(files)
        except BagError:
            self.close()
            raise
        except Exception as error:  # a damaged file makes its libraries raise anything
            self.close()
            raise BagError(f"{bag.name}: damaged: {type(error).__name__}: {error}") from error
        with_messages = [storage for storage in self._storages if storage.counts]
        self.start_ns = min((storage.start_ns for storage in with_messages), default=0)
        self.end_ns = max((storage.end_ns for storage in with_messages), default=0)
        self._groups = _overlapping(with_messages)
        for group in self._groups:
            if len(group) > 1:
                names = " and ".join(sorted(storage.path.name for storage in group))
                self.notes.append(f"{names} overlap in time: their messages are merged by receive time")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the bag's files."""
        self._opened.close()

    def messages(self, topics: Iterable[str]) -> Iterator[BagMessage]:
        """Yield the messages on `topics` in receive order, in one pass over the bag.

        Topics are compared without their leading slash, so that an embodiment's relative names find a recorder's
        absolute ones; absent ones are passed over. Raises BagError where the bag is damaged.
        """
        wanted = {topic.lstrip("/"): topic for topic in topics}
        read = 0
        try:
            for message in chain.from_iterable(self._merged(group, wanted) for group in self._groups):
                yield message
                read += 1
        except BagError as error:
            raise BagError(f"{error} (found after {read} messages)") from error
        except Exception as error:  # a damaged file makes its libraries raise anything
            raise BagError(
                f"{self.bag.name}: damaged after {read} messages: {type(error).__name__}: {error}"
            ) from error

    def _storage(self, path: Path, recover: bool) -> Storage:
        kind = storage_kind(path)
        if kind is None:
            raise BagError(f"{path.name}: expected an .mcap or .db3 file, as it is or compressed (.zstd)")
        folder = self._opened.enter_context(TemporaryDirectory(prefix="bag-")) if path.suffix != kind else ""
        storage: Storage = _STORAGES[kind](decompressed(path, Path(folder)), recover)
        self._opened.callback(storage.close)
        return storage

    def _list_topics(self) -> dict[str, TopicInfo]:
        topics: dict[str, TopicInfo] = {}
        for storage in self._storages:
            for number, channel in storage.channels.items():
                if not (count := storage.counts.get(number, 0)):
                    continue
                known = topics.get(channel.topic, TopicInfo(channel.topic, channel.msgtype, 0))
                if known.msgtype != channel.msgtype:
                    self.notes.append(f"{channel.topic} has messages of two types, {known.msgtype}, {channel.msgtype}")
                topics[channel.topic] = TopicInfo(channel.topic, known.msgtype, known.count + count)
        if not topics:
            self.notes.append("there is no message in it: nothing was published, or the QoS did not match")
        return topics

    def _check_counts(self, files: BagFiles) -> None:
        """Compare with what metadata.yaml counts: a changed byte may have given a message to another topic."""
        there = {name: info.count for name, info in self.topics.items()}
        listed = {name: count for name, count in (files.counts or {}).items() if count}
        if files.counts is None or there == listed or any(storage.notes for storage in self._storages):
            return
        counted, expected = sum(there.values()), sum(listed.values())
        differ = sorted(name for name in there.keys() | listed.keys() if there.get(name) != listed.get(name))
        if counted == expected:
            raise BagError(
                f"{self.bag.name}: metadata.yaml counts other messages on {', '.join(differ)} than are there, and as "
                "many in all: a file is damaged, or metadata.yaml is another bag's (`ros2 bag reindex` makes it anew)"
            )
        self.notes.append(
            f"metadata.yaml counts {expected} messages, the files hold {counted} (different on {', '.join(differ)}): "
            "the recorder lost some, or the metadata.yaml is another bag's"
        )

    def _merged(self, group: list[Storage], wanted: dict[str, str]) -> Iterator[BagMessage]:
        streams = [self._stream(storage, wanted) for storage in group]
        if len(streams) == 1:
            return streams[0]
        return self._without_twins(merge(*streams, key=lambda message: message.receive_ns))

    def _without_twins(self, messages: Iterator[BagMessage]) -> Iterator[BagMessage]:
        """Each message once, where overlapping files both have it."""
        twins = 0
        now_ns = -1
        seen: set[tuple[str, bytes]] = set()
        for message in messages:
            if message.receive_ns != now_ns:
                now_ns = message.receive_ns
                seen.clear()
            key = (message.topic, bytes(message.raw))
            if key in seen:
                twins += 1
                continue
            seen.add(key)
            yield message
        if twins:
            self.notes.append(f"{twins} messages stand in two files, and are used once: was one file copied or cut?")

    def _stream(self, storage: Storage, wanted: dict[str, str]) -> Iterator[BagMessage]:
        chosen: dict[int, tuple[str, MessageKind]] = {}
        for number, channel in storage.channels.items():
            name = wanted.get(channel.topic.lstrip("/"))
            if name is not None and storage.counts.get(number):
                kind = message_kind(channel.msgtype, channel.definition, channel.digest, self._distro)
                chosen[number] = (name, kind)
        return _read(storage, chosen)


def _read(storage: Storage, chosen: dict[int, tuple[str, MessageKind]]) -> Iterator[BagMessage]:
    for receive_ns, number, raw in storage.messages(chosen.keys()):
        name, kind = chosen[number]
        if raw[:4] == _ZSTD:
            raw = zstd.decompress(raw)
        yield BagMessage(name, receive_ns, kind, raw)


def _overlapping(storages: Collection[Storage]) -> list[list[Storage]]:
    """The files in the order of time, those together that overlap."""
    groups: list[list[Storage]] = []
    end_ns = -1
    for storage in sorted(storages, key=lambda storage: storage.start_ns):
        if groups and storage.start_ns <= end_ns:
            groups[-1].append(storage)
        else:
            groups.append([storage])
        end_ns = max(end_ns, storage.end_ns)
    return groups
