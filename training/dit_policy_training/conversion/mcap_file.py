"""An mcap file, read block by block in the order of receive times, with every checksum that it has.

The format: https://mcap.dev/spec. Blocks are found by walking over the records, not by the file's index, so that a
damaged or missing index loses nothing unnoticed; the index's counts then tell whether everything was there.
"""

import os
import struct
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import lz4.frame  # type: ignore[import-untyped]
import yaml
from backports import zstd

from dit_policy_training.conversion.message import BagError, Raw
from dit_policy_training.conversion.message_types import Definition
from dit_policy_training.conversion.storage import MAX_DISORDER_NS, Channel, set_back

_MAGIC = b"\x89MCAP0\r\n"
_HEADER, _FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK, _MESSAGE_INDEX = range(1, 8)
_ATTACHMENT, _STATISTICS, _METADATA, _DATA_END, _PRIVATE = 0x09, 0x0B, 0x0C, 0x0F, 0x80
_RECORD = struct.Struct("<BQ")
_MESSAGE_HEAD = struct.Struct("<HIQQ")
_INDEX_HEAD = struct.Struct("<HI")
_CHUNK_HEAD = struct.Struct("<QQQII")  # start, end, size, crc, length of the compression's name
_FOOTER_SIZE = _RECORD.size + 20
_BLOCK_BYTES = 1 << 20  # of messages outside of chunks that are read at once
_END_NS = 2**64  # later than any receive time
_VIEWED_SHARE = 4  # a message of at least 1/4 of its block is a view of it; smaller ones must not keep it in memory


_DECOMPRESS: dict[bytes, Callable[[memoryview], bytes | memoryview]] = {
    b"": lambda packed: packed,
    b"lz4": lz4.frame.decompress,
    b"zstd": zstd.decompress,
}


class _Damage(Exception):
    """Something in the file is not as it should be; the message says what and where."""


@dataclass
class _Block:
    """A chunk, or a run of messages outside of chunks: where it is in the file, its receive times."""

    offset: int
    length: int
    start_ns: int
    end_ns: int
    chunk: bool
    checked: bool  # whether it has a checksum
    index: dict[int, tuple[int, int]] = field(default_factory=dict)  # by channel: where the list of its messages is


class _Message(NamedTuple):
    receive_ns: int
    channel: int
    record: int  # where it begins in the block
    start: int  # where its CDR does
    end: int


@dataclass
class _Summary:
    """What the file says of itself behind its messages; `counts` is None if it does not count them."""

    channels: dict[int, Channel] = field(default_factory=dict)
    counts: dict[int, int] | None = None


class _Fields:
    """The fields of one record, read one after the other."""

    def __init__(self, content: bytes, what: str):
        self._content = content
        self._position = 0
        self._what = what

    def take(self, size: int) -> bytes:
        taken = self._content[self._position : self._position + size]
        if len(taken) != size:
            raise _Damage(f"{self._what} is cut short")
        self._position += size
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def block(self) -> bytes:
        return self.take(self.number(4))

    def text(self) -> str:
        try:
            return self.block().decode()
        except UnicodeDecodeError as error:
            raise _Damage(f"{self._what} holds no text where it should: {error}") from None

    def more(self) -> bool:
        return self._position < len(self._content)

    def end(self) -> None:
        if self._position != len(self._content):
            raise _Damage(f"{self._what} has {len(self._content) - self._position} bytes too many")


class McapFile:
    """A `Storage`. With `recover`, what can be read of a damaged file: its messages up to the damage."""

    def __init__(self, path: Path, recover: bool = False):
        """Raises BagError if the file is damaged (without `recover`), or nothing of it can be used."""
        self.path = path
        self.notes: list[str] = []
        self.channels: dict[int, Channel] = {}
        self.counts: dict[int, int] = {}
        self.distro: str | None = None
        self._schemas: dict[int, tuple[str, Definition | None]] = {}
        self._blocks: list[_Block] = []
        self._until_ns = _END_NS  # of a recovered file: messages from then on may be incomplete
        self._data_damage = ""  # the checksum over all messages is wrong
        self._counted = False
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise BagError(f"{path}: cannot be opened: {error.strerror}") from error
        self._size = os.fstat(self._file.fileno()).st_size
        try:
            self._open(recover)
        except _Damage as damage:
            self.close()
            raise self._error(str(damage)) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def start_ns(self) -> int:
        """The first receive time; 0 if there is no message."""
        return min((block.start_ns for block in self._blocks if _has_messages(block)), default=0)

    @property
    def end_ns(self) -> int:
        """The last receive time; 0 if there is no message."""
        return max((block.end_ns for block in self._blocks if _has_messages(block)), default=0)

    def messages(self, wanted: Collection[int]) -> Iterator[tuple[int, int, Raw]]:
        """(receive_ns, channel, CDR) of the wanted channels in receive order.

        Raises BagError where a checksum, a count or a record is wrong.
        """
        counts: Counter[int] = Counter()
        order = _Order()
        pending: list[tuple[int, int, Raw]] = []
        blocks = sorted(self._needed(wanted), key=lambda block: block.start_ns)
        expected = Counter(self.counts)
        if len(blocks) < len(self._blocks):
            expected = Counter({channel: expected[channel] for channel in wanted if channel in expected})
        try:
            for block, following in zip(blocks, [*blocks, None][1:], strict=True):
                if block.start_ns >= self._until_ns:
                    break
                data, found = self._load(block)
                order.add(block, found)
                counts.update(message.channel for message in found if message.channel in expected)
                viewed = len(data) // _VIEWED_SHARE
                for message in found:
                    if message.channel in wanted and message.receive_ns < self._until_ns:
                        raw = data[message.start : message.end]
                        pending.append((message.receive_ns, message.channel, raw if len(raw) > viewed else bytes(raw)))
                pending.sort(key=_receive_ns)
                ready = _count_before(pending, _END_NS if following is None else following.start_ns)
                yield from pending[:ready]
                del pending[:ready]
            self._check_order(order)
            if self._counted and counts != expected:
                raise _Damage(f"{counts.total()} messages were found, the file's index counts {expected.total()}")
        except _Damage as damage:
            raise self._error(str(damage)) from None

    def _needed(self, wanted: Collection[int]) -> list[_Block]:
        """Without the chunks that list no wanted message behind them: a pass over rare topics need not read images.

        A list that is damaged makes messages missing, and the counts tell.
        """
        if not self._counted:
            return self._blocks
        return [block for block in self._blocks if not block.index or any(each in wanted for each in block.index)]

    def _error(self, reason: str) -> BagError:
        return BagError(f"{self.path.name}: {reason}; --recover uses what can be read of it")

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise _Damage(f"the file ends at byte {self._size}, within a record: it was cut short, or never closed")
        return data

    def _open(self, recover: bool) -> None:
        if not self._size:
            raise BagError(f"{self.path.name}: the file is empty: nothing was recorded, or it was not copied")
        if self._read(0, min(self._size, len(_MAGIC))) != _MAGIC[: self._size]:
            raise BagError(
                f"{self.path.name}: is no mcap file: it does not begin as one. Copy it again from where it was "
                "recorded; if it is the same there, it holds something else: leave it out of --bags"
            )
        damages = []
        try:
            footer = self._footer()
            summary = self._summary(footer)
            self._check_data(footer)
        except _Damage as damage:
            damages, footer, summary = [str(damage)], None, _Summary()
        try:
            self._find_blocks(footer, recover)
        except _Damage as damage:
            damages.insert(0, str(damage))
        if self._data_damage:
            damages.append(self._data_damage)
        if damages and not recover:
            raise _Damage(f"{damages[0]}; whole are {self._described()}")
        self._counted = summary.counts is not None and summary.counts.keys() <= summary.channels.keys()
        if self._counted and not recover:
            self._learn_all(summary.channels)
            self.counts = dict(summary.counts or {})
        else:
            self._read_all(recover, damages, summary.counts)

    def _described(self) -> str:
        seconds = (self.end_ns - self.start_ns) / 1e9
        return f"{len(self._blocks)} blocks of messages over {seconds:.3f} s" if self._blocks else "no messages"

    def _footer(self) -> tuple[int, int, int]:
        """(where it begins, where the summary begins or 0, the summary's checksum)."""
        start = self._size - len(_MAGIC) - _FOOTER_SIZE
        if start < len(_MAGIC) or self._read(self._size - len(_MAGIC), len(_MAGIC)) != _MAGIC:
            raise _Damage("it does not end as an mcap file does: the recorder was killed, or the file was cut short")
        content = self._read(start, _FOOTER_SIZE)
        if _RECORD.unpack_from(content) != (_FOOTER, 20):
            raise _Damage("its last record is damaged")
        fields = _Fields(content[_RECORD.size :], "the footer")
        summary, _, checksum = fields.number(8), fields.number(8), fields.number(4)
        if summary and not len(_MAGIC) <= summary <= start:
            raise _Damage("its last record is damaged")
        return start, summary, checksum

    def _summary(self, footer: tuple[int, int, int]) -> _Summary:
        footer_start, start, checksum = footer
        if not start:
            return _Summary()
        # The checksum covers the footer up to itself.
        covered = self._read(start, footer_start + _FOOTER_SIZE - 4 - start)
        if checksum and crc32(covered) != checksum:
            raise _Damage("the checksum of its index is wrong")
        summary = _Summary()
        for opcode, content in _records(covered[: footer_start - start]):
            if opcode == _SCHEMA:
                self._learn_schema(content)
            elif opcode == _CHANNEL:
                summary.channels.update([self._channel(content)])
            elif opcode == _STATISTICS:
                fields = _Fields(content, "the index's count of messages")
                total = fields.number(8)
                fields.take(34)
                counts = list(struct.iter_unpack("<HQ", _whole(fields.block(), 10, "the index's count of messages")))
                summary.counts = {channel: count for channel, count in counts if count}
                if sum(summary.counts.values()) != total:
                    raise _Damage("the index's counts of messages do not add up")
        return summary

    def _check_data(self, footer: tuple[int, int, int]) -> None:
        """Check the checksum over all data, where there is one: few writers make it, those of chunks do as well."""
        footer_start, summary, _ = footer
        end = summary or footer_start
        size = _RECORD.size + 4
        opcode, length, checksum = struct.unpack("<BQI", self._read(end - size, size))
        if (opcode, length) != (_DATA_END, 4):
            raise _Damage(f"the record before byte {end}, which ends the messages, is damaged")
        position, found = 0, 0
        while checksum and position < end - size:
            part = self._read(position, min(_BLOCK_BYTES, end - size - position))
            found = crc32(part, found)
            position += len(part)
        if found != checksum:
            self._data_damage = "the checksum of its messages is wrong"

    def _find_blocks(self, footer: tuple[int, int, int] | None, recover: bool) -> None:
        """Walk over the records up to the end of the data; blocks found before a _Damage is raised are kept."""
        end = self._size if footer is None else footer[1] or footer[0]
        position = len(_MAGIC)
        run: _Block | None = None
        while position < end:
            if position + _RECORD.size > end:
                raise _Damage(f"the file ends at byte {self._size}, within a record: it was cut short, or never closed")
            opcode, length = _RECORD.unpack(self._read(position, _RECORD.size))
            after = position + _RECORD.size + length
            if after > end:
                raise _Damage(f"the record at byte {position} does not end within the data: it is damaged or cut short")
            if opcode == _MESSAGE:
                run = self._add_message(run, position, after)
            else:
                run = None
                if self._is_last(opcode, position, length, recover):
                    if footer is not None and after != end:
                        raise _Damage(f"the record at byte {position} ends the data too early: it is damaged")
                    return
            position = after
        raise _Damage("its messages have no end mark: the recorder was killed, or the file was cut short")

    def _is_last(self, opcode: int, position: int, length: int, recover: bool) -> bool:
        """Take note of a record that is no message; whether it ends the data."""
        content = position + _RECORD.size
        if opcode == _CHUNK:
            self._blocks.append(self._chunk(content, length))
        elif opcode in (_SCHEMA, _CHANNEL):
            self._learn(opcode, self._read(content, length))
        elif opcode == _METADATA:
            self._take_metadata(self._read(content, length))
        elif opcode == _HEADER:
            if position != len(_MAGIC):
                raise _Damage(f"the record at byte {position} is damaged")
        elif opcode == _MESSAGE_INDEX:
            channel, listed = _INDEX_HEAD.unpack(self._read(content, _INDEX_HEAD.size)) if length >= 6 else (0, 0)
            if listed != length - _INDEX_HEAD.size:
                raise _Damage(f"the record at byte {position} is damaged")
            if self._blocks:
                self._blocks[-1].index[channel] = content, length
        elif opcode not in (_ATTACHMENT, _DATA_END) and (opcode < _PRIVATE or recover):
            raise _Damage(f"the record at byte {position} is of no known kind ({opcode:#x}): it is damaged")
        return opcode == _DATA_END

    def _add_message(self, run: _Block | None, position: int, after: int) -> _Block:
        length = after - position
        head = self._read(position, _RECORD.size + _MESSAGE_HEAD.size) if length >= 31 else b""
        if not head:
            raise _Damage(f"the message at byte {position} is too short: it is damaged")
        receive_ns = _MESSAGE_HEAD.unpack_from(head, _RECORD.size)[2]
        if run is None or run.length >= _BLOCK_BYTES:
            run = _Block(position, 0, receive_ns, receive_ns, chunk=False, checked=False)
            self._blocks.append(run)
        run.length += length
        run.start_ns, run.end_ns = min(run.start_ns, receive_ns), max(run.end_ns, receive_ns)
        return run

    def _chunk(self, content: int, length: int) -> _Block:
        if length < _CHUNK_HEAD.size + 8:
            raise _Damage(f"the chunk at byte {content} is too short: it is damaged")
        start_ns, end_ns, _, checksum, _ = _CHUNK_HEAD.unpack(self._read(content, _CHUNK_HEAD.size))
        return _Block(content, length, start_ns, end_ns, chunk=True, checked=bool(checksum))

    def _take_metadata(self, content: bytes) -> None:
        fields = _Fields(content, "the metadata")
        if fields.text() != "rosbag2":
            return
        entries = _text_map(fields.block())
        try:
            distro = yaml.safe_load(entries.get("serialized_metadata", "")).get("ros_distro")
        except (yaml.YAMLError, AttributeError):
            return
        self.distro = distro if isinstance(distro, str) else None

    def _learn(self, opcode: int, content: bytes) -> None:
        if opcode == _SCHEMA:
            self._learn_schema(content)
        else:
            self._learn_all(dict([self._channel(content)]))

    def _learn_schema(self, content: bytes) -> None:
        fields = _Fields(content, "a message definition")
        number, name, encoding, text = fields.number(2), fields.text(), fields.text(), fields.text()
        fields.end()
        # "Schema 0" and empty text stand for none; rosbag2 writes them for types that it could not find.
        known = encoding in ("ros2msg", "ros2idl") and text.strip()
        schema = (name, Definition(encoding, text) if known else None)
        if self._schemas.setdefault(number, schema) != schema:
            raise _Damage(f"type {name} is defined twice and differently: one of both places is damaged")

    def _channel(self, content: bytes) -> tuple[int, Channel]:
        fields = _Fields(content, "a topic's description")
        number, schema, topic, encoding = fields.number(2), fields.number(2), fields.text(), fields.text()
        fields.block()
        fields.end()
        if schema not in self._schemas:
            raise _Damage(f"{topic}: its type is not described")
        if encoding != "cdr":
            raise BagError(f"{self.path.name}: {topic} is encoded as '{encoding}', expected cdr, as ROS 2 records")
        msgtype, definition = self._schemas[schema]
        return number, Channel(topic, msgtype, definition)

    def _learn_all(self, channels: dict[int, Channel]) -> None:
        for number, channel in channels.items():
            if self.channels.setdefault(number, channel) != channel:
                raise _Damage(f"{channel.topic} is described twice and differently: one of both places is damaged")

    def _load(self, block: _Block) -> tuple[memoryview, list[_Message]]:
        """A block's bytes and the messages in it, checked, in file order."""
        where = f"the chunk at byte {block.offset}"
        raw = self._read(block.offset, block.length)
        data = memoryview(_unpacked(raw, where) if block.chunk else raw)
        found = []
        position, size = 0, len(data)
        while position < size:
            if position + _RECORD.size > size:
                raise _Damage(f"{where} is damaged: a record does not end within it")
            opcode, length = _RECORD.unpack_from(data, position)
            record, content = position, position + _RECORD.size
            position = content + length
            if position > size or (opcode == _MESSAGE and length < _MESSAGE_HEAD.size):
                raise _Damage(f"{where} is damaged: a record does not end within it")
            if opcode == _MESSAGE:
                channel, _, receive_ns, _ = _MESSAGE_HEAD.unpack_from(data, content)
                if channel not in self.channels or not block.start_ns <= receive_ns <= block.end_ns:
                    raise _Damage(f"{where} is damaged: it holds a message of channel {channel} at {receive_ns} ns")
                found.append(_Message(receive_ns, channel, record, content + _MESSAGE_HEAD.size, position))
            elif opcode in (_SCHEMA, _CHANNEL):
                self._learn(opcode, bytes(data[content:position]))
            elif opcode < _PRIVATE:
                raise _Damage(f"{where} is damaged: it holds a record of kind {opcode:#x}")
        if not block.checked:
            self._check_index(block, found, where)
        return data, found

    def _check_index(self, block: _Block, found: list[_Message], where: str) -> None:
        """Where there is no checksum: topic, time and place of messages against the list of them behind the chunk."""
        listed: list[tuple[int, int, int]] = []
        for channel, (content, length) in block.index.items():
            entries = _whole(self._read(content, length)[_INDEX_HEAD.size :], 16, where)
            listed += [(receive_ns, channel, record) for receive_ns, record in struct.iter_unpack("<QQ", entries)]
        if listed and sorted(listed) != sorted(message[:3] for message in found):
            raise _Damage(f"{where} is damaged: its messages are not those that are listed behind it")

    def _read_all(self, recover: bool, damages: list[str], expected: dict[int, int] | None) -> None:
        """Read every block once to learn the topics and the counts; when recovering, up to the first damage."""
        counts: Counter[int] = Counter()
        order = _Order()
        newest_ns = disorder_ns = 0
        for whole, block in enumerate(self._blocks):
            try:
                _, found = self._load(block)
                order.add(block, found)
                self._check_order(order)
            except (_Damage, BagError) as damage:
                if not recover:
                    raise
                damages.insert(0, str(damage))
                del self._blocks[whole:]
                break
            counts.update(message.channel for message in found)
            newest_ns, disorder_ns = order.newest_ns, order.disorder_ns
        if self._data_damage and not all(block.checked for block in self._blocks):
            raise BagError(f"{self.path.name}: {self._data_damage}, and where it is damaged cannot be told")
        if expected is not None and not damages and counts != Counter(expected):
            raise BagError(
                f"{self.path.name}: {counts.total()} messages were found, the file's index counts "
                f"{sum(expected.values())}, and where the others were cannot be told"
            )
        if damages and not counts:
            raise BagError(f"{self.path.name}: nothing can be read of it: {damages[0]}")
        if damages and disorder_ns:
            # What is lost may have been received as much earlier as messages are out of order elsewhere.
            self._until_ns = newest_ns - disorder_ns
            loaded = (message for block in self._blocks for message in self._load(block)[1])
            counts = Counter(message.channel for message in loaded if message.receive_ns < self._until_ns)
        self.counts = dict(counts)
        if damages:
            self._counted = False
            self._tell_loss(damages[0], expected)

    def _tell_loss(self, damage: str, expected: dict[int, int] | None) -> None:
        used = sum(self.counts.values())
        lost = "how many are lost is not known"
        if expected is not None:
            lost = f"{sum(expected.values()) - used} of {sum(expected.values())} are lost"
        self.notes.append(
            f"{self.path.name}: damaged, and recovered: {damage}. {used} messages, over "
            f"{(min(self.end_ns, self._until_ns) - self.start_ns) / 1e9:.3f} s, are used; {lost}. Look at the last "
            "episode's end"
        )

    def _check_order(self, order: "_Order") -> None:
        if (back := order.set_back()) is not None:
            channel, before_ns, after_ns = back
            raise set_back(self.path, self.channels[channel].topic, before_ns, after_ns)


class _Order:
    """Whether messages follow one another in time as they do in the file."""

    def __init__(self) -> None:
        self._spans: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # by channel: offset, first, last time
        self._back: tuple[int, int, int] | None = None
        self.disorder_ns = 0
        self.newest_ns = 0

    def add(self, block: _Block, messages: list[_Message]) -> None:
        first: dict[int, int] = {}
        newest: dict[int, int] = {}
        for message in messages:
            before = newest.get(message.channel, message.receive_ns)
            if message.receive_ns < before - MAX_DISORDER_NS:
                self._back = (message.channel, before, message.receive_ns)
            first.setdefault(message.channel, message.receive_ns)
            newest[message.channel] = max(before, message.receive_ns)
            self.disorder_ns = max(self.disorder_ns, self.newest_ns - message.receive_ns)
            self.newest_ns = max(self.newest_ns, message.receive_ns)
        for channel, first_ns in first.items():
            self._spans[channel].append((block.offset, first_ns, newest[channel]))

    def set_back(self) -> tuple[int, int, int] | None:
        """(channel, time before, time after) where a channel's times run backwards by more than is usual."""
        if self._back is not None:
            return self._back
        for channel, spans in self._spans.items():
            spans.sort()
            for (_, _, before_ns), (_, after_ns, _) in pairwise(spans):
                if after_ns < before_ns - MAX_DISORDER_NS:
                    return channel, before_ns, after_ns
        return None


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(data):
        if position + _RECORD.size > len(data):
            raise _Damage("its index is cut short")
        opcode, length = _RECORD.unpack_from(data, position)
        content = position + _RECORD.size
        position = content + length
        if position > len(data):
            raise _Damage("its index is damaged")
        yield opcode, data[content:position]


def _unpacked(raw: bytes, where: str) -> bytes | memoryview:
    """A chunk's records, decompressed, and checked where it has a checksum."""
    _, _, size, checksum, name_length = _CHUNK_HEAD.unpack_from(raw)
    fields = _Fields(raw[_CHUNK_HEAD.size : _CHUNK_HEAD.size + name_length + 8], where)
    name, length = fields.take(name_length), fields.number(8)
    start = _CHUNK_HEAD.size + name_length + 8
    if start + length != len(raw):
        raise _Damage(f"{where} is damaged: its length is {len(raw)}, expected {start + length}")
    if name not in _DECOMPRESS:
        raise _Damage(f"{where} is damaged: it is compressed as {name!r}, expected lz4 or zstd")
    try:
        data = _DECOMPRESS[name](memoryview(raw)[start:])
    except Exception as error:  # a damaged stream makes its library raise anything
        raise _Damage(f"{where} is damaged: it cannot be decompressed: {error}") from None
    if len(data) != size or (checksum and crc32(data) != checksum):
        raise _Damage(f"{where} is damaged: its checksum is wrong")
    return data


def _text_map(content: bytes) -> dict[str, str]:
    fields = _Fields(content, "the metadata")
    entries = {}
    while fields.more():
        key = fields.text()
        entries[key] = fields.text()
    return entries


def _whole(content: bytes, size: int, what: str) -> bytes:
    if len(content) % size:
        raise _Damage(f"{what} is damaged: a part of it has {len(content)} bytes, expected a multiple of {size}")
    return content


def _receive_ns(message: tuple[int, int, Raw]) -> int:
    return message[0]


def _count_before(pending: list[tuple[int, int, Raw]], until_ns: int) -> int:
    """How many of the sorted messages were received before until_ns."""
    return bisect_left(pending, until_ns, key=_receive_ns)


def _has_messages(block: _Block) -> bool:
    # Writers give chunks without messages the times 0 and 0, or the latest possible and 0.
    return block.end_ns > 0
