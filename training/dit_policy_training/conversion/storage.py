"""What a recording's storage files have in common, whether mcap or sqlite3."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dit_policy_training.conversion.message import BagError, Raw
from dit_policy_training.conversion.message_types import Definition

# Within a topic a recorder's threads may swap messages; further back means that its clock was set back.
MAX_DISORDER_NS = 1_000_000_000


@dataclass(frozen=True)
class Channel:
    """One topic of a file. `digest` is the type's RIHS01 hash, or empty where the file does not tell."""

    topic: str
    msgtype: str
    definition: Definition | None
    digest: str = ""


class Storage(Protocol):
    """A storage file open for reading. Its constructor and `messages` raise BagError for damage.

    `counts` has the messages of each channel; `start_ns`, `end_ns` are the first and last receive times (0, 0 if there
    is no message); `distro` is the ROS distribution that wrote it, None if it does not tell.
    """

    path: Path
    channels: dict[int, Channel]
    counts: dict[int, int]
    distro: str | None
    notes: list[str]

    @property
    def start_ns(self) -> int:
        """Of the first message."""
        ...

    @property
    def end_ns(self) -> int:
        """Of the last message."""
        ...

    def messages(self, wanted: Collection[int]) -> Iterator[tuple[int, int, Raw]]:
        """(receive_ns, channel, CDR) of the wanted channels in receive order."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def set_back(path: Path, topic: str, before_ns: int, after_ns: int) -> BagError:
    """The error for receive times that run backwards."""
    return BagError(
        f"{path.name}: the receive times on {topic} run backwards, from {before_ns / 1e9:.3f} s to "
        f"{after_ns / 1e9:.3f} s: the recording computer's clock was set back, and what came when cannot be told any "
        "more; cut the recording there (`ros2 bag convert` with start and end times), and let NTP set the clock before "
        "recording, not during it"
    )
