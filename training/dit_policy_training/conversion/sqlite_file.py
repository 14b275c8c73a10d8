"""A sqlite3 storage file of rosbag2, of any version of its schema.

sqlite keeps no checksums: a changed byte inside a message cannot be found. What can be is checked when the file is
opened: its pages, its tables and its index.
"""

import shutil
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import numpy as np

from dit_policy_training.conversion.message import BagError, Raw
from dit_policy_training.conversion.message_types import Definition
from dit_policy_training.conversion.storage import MAX_DISORDER_NS, Channel, set_back


class SqliteFile:
    """A `Storage`. It has no prefix to recover: what a damaged table still yields has holes."""

    def __init__(self, path: Path, recover: bool = False):
        """Raises BagError if the file is damaged."""
        self.path = path
        self.notes: list[str] = []
        self.distro: str | None = None
        if not path.exists() or not path.stat().st_size:
            raise BagError(f"{path.name}: the file is empty or not there: nothing was recorded, or it was not copied")
        # What a killed recorder had not moved into the file yet. sqlite does so when it reads, hence in a copy.
        log = path.with_name(path.name + "-wal")
        self._logged = log.exists() and log.stat().st_size > 0
        self._copies = TemporaryDirectory(prefix="bag-") if self._logged else None
        try:
            if self._copies:
                path = Path(shutil.copy(path, Path(self._copies.name) / path.name))
                shutil.copy(log, Path(self._copies.name) / log.name)
            how = "mode=rw" if self._copies else "mode=ro&immutable=1"
            self._database = sqlite3.connect(f"file:{quote(str(path.resolve()))}?{how}", uri=True)
        except (sqlite3.Error, OSError) as error:
            raise BagError(f"{path.name}: cannot be opened: {error}") from error
        try:
            self._open()
        except (sqlite3.Error, UnicodeDecodeError, ValueError, TypeError) as error:
            self.close()
            raise self._error(error) from error

    def close(self) -> None:
        """Close the file."""
        self._database.close()
        if self._copies:
            self._copies.cleanup()

    def messages(self, wanted: Collection[int]) -> Iterator[tuple[int, int, Raw]]:
        """(receive_ns, channel, CDR) of the wanted channels in receive order. Raises BagError for damage."""
        places = ",".join("?" * len(wanted))
        query = (
            "SELECT timestamp, topic_id, data FROM messages "
            f"WHERE topic_id IN ({places}) ORDER BY timestamp, id"  # the id for messages of one instant
        )
        found = 0
        try:
            for row in self._database.execute(query, tuple(wanted)):
                if not isinstance(row[2], bytes):
                    raise ValueError(f"a message at {row[0]} ns is {type(row[2]).__name__}, expected bytes")
                yield row
                found += 1
        except (sqlite3.Error, ValueError, OverflowError) as error:
            raise self._error(error) from error
        if found != (expected := sum(self.counts.get(channel, 0) for channel in wanted)):
            raise self._error(f"{found} messages were found, the table counts {expected}")

    def _open(self) -> None:
        tables = {name for (name,) in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if missing := {"messages", "topics"} - tables:
            raise ValueError(f"it has no table '{', '.join(sorted(missing))}'; is it a recording?")
        (pages,) = self._database.execute("PRAGMA page_count").fetchone()
        (page_size,) = self._database.execute("PRAGMA page_size").fetchone()
        size = self.path.stat().st_size
        if not self._logged and size != pages * page_size:  # sqlite fills a last page that is cut short with zeros
            raise ValueError(f"it has {size} bytes, expected {pages} pages of {page_size}: it was cut short")
        (verdict,) = self._database.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise ValueError(" ".join(str(verdict).split()))
        if self._logged:
            self.notes.append(
                f"{self.path.name}: the recorder was killed: the messages in {self.path.name}-wal, which it had not "
                "moved into the file, are read as well; keep both together"
            )
        if "schema" in tables and (row := self._database.execute("SELECT * FROM schema").fetchone()) and len(row) > 1:
            self.distro = str(row[1])
        self.channels = self._read_channels("message_definitions" in tables)
        self._count()

    def _read_channels(self, defined: bool) -> dict[int, Channel]:
        definitions: dict[str, tuple[Definition | None, str]] = {}
        if defined:
            rows = self._database.execute(
                "SELECT topic_type, encoding, encoded_message_definition, type_description_hash "
                "FROM message_definitions"
            )
            for msgtype, encoding, text, digest in rows:
                known = encoding in ("ros2msg", "ros2idl") and text.strip()
                definitions[msgtype] = (Definition(encoding, text), digest or "") if known else (None, "")
        channels = {}
        for number, topic, msgtype, encoding in self._database.execute(
            "SELECT id, name, type, serialization_format FROM topics"
        ):
            if encoding != "cdr":
                raise ValueError(f"{topic} is encoded as '{encoding}', expected cdr")
            channels[int(number)] = Channel(str(topic), str(msgtype), *definitions.get(msgtype, (None, "")))
        return channels

    def _count(self) -> None:
        rows = self._database.execute("SELECT topic_id, timestamp FROM messages ORDER BY id").fetchall()
        table = np.array(rows, np.int64).reshape(-1, 2)
        topics, times = table[:, 0], table[:, 1]
        self.counts = dict(Counter(topics.tolist()))
        if unknown := self.counts.keys() - self.channels.keys():
            raise ValueError(f"it has messages of topic {sorted(unknown)[0]}, which is not in its table of topics")
        self.start_ns, self.end_ns = (int(times.min()), int(times.max())) if len(times) else (0, 0)
        for channel in self.counts:
            own = times[topics == channel]
            newest = np.maximum.accumulate(own)
            late = int(np.argmax(newest - own))
            if newest[late] - own[late] > MAX_DISORDER_NS:
                raise set_back(self.path, self.channels[channel].topic, int(newest[late]), int(own[late]))

    def _error(self, reason: object) -> BagError:
        if isinstance(reason, BagError):
            return reason
        return BagError(
            f"{self.path.name}: damaged, or not a sqlite3 recording: {reason}; copy it again from where it was "
            "recorded, or try sqlite's `.recover` on a copy and look at what comes out"
        )
