"""Reading recordings: which bags a path means, and a bag's messages in the order they were received."""

import glob
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

from dit_policy_training.conversion.message import BagError, BagMessage

__all__ = ["BagError", "BagMessage", "Recording", "TopicInfo", "find_bags", "fingerprint"]

STORAGE_SUFFIXES = (".mcap", ".db3")


@dataclass(frozen=True)
class TopicInfo:
    """A topic as it stands in the recording, with its type and how many messages there are."""

    name: str
    msgtype: str
    count: int


def find_bags(pattern: str) -> list[Path]:
    """The bags that a folder, a file or a glob pattern means, sorted by path.

    A folder with a metadata.yaml is one bag, an .mcap or .db3 file outside such a folder another; other
    folders are searched. Raises BagError if there is none.
    """
    paths = [Path(found) for found in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (Path.glob needs a root)
    bags = sorted({bag for path in paths for bag in _bags_under(path)})
    if not bags:
        raise BagError(f"{pattern}: no bag there; expected folders with a metadata.yaml, or .mcap or .db3 files")
    return bags


def _bags_under(path: Path) -> Iterator[Path]:
    if path.suffix in STORAGE_SUFFIXES or (path / "metadata.yaml").exists():
        yield path
    elif path.is_dir():
        for child in path.iterdir():
            yield from _bags_under(child)


def fingerprint(bag: Path) -> str:
    """sha256 (64 hex digits) over the names and bytes of a bag's files."""
    digest = hashlib.sha256()
    files = sorted(path for path in bag.iterdir() if path.is_file()) if bag.is_dir() else [bag]
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class Recording:
    """A bag, open for reading; a context manager.

    `topics` has every topic with messages by name; `notes` says in sentences what is odd about the recording (complete
    once `messages` is through).
    """

    def __init__(self, bag: Path, recover: bool = False):
        """Raises BagError if the bag cannot be opened."""
        self.bag = bag
        self.notes: list[str] = []
        self._reader = AnyReader([bag], default_typestore=get_typestore(Stores.ROS2_KILTED))
        try:
            self._reader.open()
        except Exception as error:
            raise BagError(f"{bag}: cannot be opened: {type(error).__name__}: {error}") from error
        self.topics = {
            c.topic: TopicInfo(c.topic, c.msgtype, c.msgcount) for c in self._reader.connections if c.msgcount
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the bag's files."""
        self._reader.close()

    def messages(self, topics: Iterable[str]) -> Iterator[BagMessage]:
        """Yield the messages on `topics` in receive order, in one pass over the bag.

        Topics are compared without their leading slash, so that an embodiment's relative names find a recorder's
        absolute ones; absent ones are passed over. Raises BagError where the bag is damaged.
        """
        wanted = {topic.lstrip("/"): topic for topic in topics}
        connections = [c for c in self._reader.connections if c.topic.lstrip("/") in wanted]
        if not connections:
            return
        decode = self._reader.deserialize
        stamped = {c.msgtype: self._is_stamped(c.msgtype) for c in connections}
        for connection, receive_ns, raw in self._reader.messages(connections):
            kind = connection.msgtype
            yield BagMessage(wanted[connection.topic.lstrip("/")], receive_ns, kind, raw, stamped[kind], decode)

    def _is_stamped(self, msgtype: str) -> bool:
        fields = self._reader.typestore.fielddefs[msgtype][1]
        return bool(fields) and fields[0][1][1] == "std_msgs/msg/Header"
