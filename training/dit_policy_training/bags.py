"""Reading recordings: which bags a path means, and a bag's messages in the order they were received.

rosbags reads sqlite3 and mcap, plain or compressed, with the message types that the bag itself carries; no
ROS needed.
"""

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

STORAGE_SUFFIXES = (".mcap", ".db3")


class BagError(ValueError):
    """A recording that cannot be read, or lacks what is needed from it."""


@dataclass(frozen=True)
class BagMessage:
    """One message, its payload undecoded, under the topic's name in the embodiment."""

    topic: str
    receive_ns: int
    msg: Any


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


def read_messages(bag: Path, topics: Iterable[str]) -> Iterator[BagMessage]:
    """Yield the bag's messages on `topics` in receive order, in one pass.

    Topics are compared without their leading slash, so that an embodiment's relative names find a recorder's
    absolute ones. Raises BagError naming every absent topic with those that are there, or how far a damaged
    bag could be read.
    """
    wanted = {topic.lstrip("/"): topic for topic in topics}
    read = 0
    try:
        with AnyReader([bag], default_typestore=get_typestore(Stores.ROS2_KILTED)) as reader:
            connections = [c for c in reader.connections if c.topic.lstrip("/") in wanted]
            if missing := wanted.keys() - {c.topic.lstrip("/") for c in connections if c.msgcount}:
                there = ", ".join(sorted(c.topic for c in reader.connections if c.msgcount)) or "none at all"
                raise BagError(f"no message on {', '.join(sorted(missing))}; topics with messages: {there}")
            for connection, receive_ns, raw in reader.messages(connections):
                msg = reader.deserialize(raw, connection.msgtype)
                yield BagMessage(wanted[connection.topic.lstrip("/")], receive_ns, msg)
                read += 1
    except BagError:
        raise
    except Exception as error:  # a damaged file makes its libraries raise anything
        raise BagError(f"unreadable after {read} messages: {type(error).__name__}: {error}") from error
