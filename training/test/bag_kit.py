"""Bags as recorders and accidents make them: checksums, compression, splits, files cut short or changed."""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from zlib import crc32

import lz4.frame
import toy_robot
from backports import zstd
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from toy_robot import STORE, TYPES, Recorded

CHUNK, DATA_END, FOOTER = 0x06, 0x0F, 0x02


def write_bag(
    folder: Path,
    recorded: Iterable[Recorded],
    storage: StoragePlugin = StoragePlugin.MCAP,
    compression: CompressionMode = CompressionMode.NONE,
    chunk_messages: int = 20,
    checksums: bool = True,
) -> Path:
    """Like toy_robot.write_bag; an mcap in chunks of a few messages with the checksums that rosbag2's own has."""
    writer = Writer(folder, version=9, storage_plugin=storage)
    if compression is not CompressionMode.NONE:
        writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        connections = {
            topic: writer.add_connection("/" + topic, kind, typestore=STORE) for topic, kind in TYPES.items()
        }
        for index, message in enumerate(recorded, 1):
            data = STORE.serialize_cdr(message.msg, TYPES[message.topic])
            writer.write(connections[message.topic], message.receive_ns, data)
            if storage is StoragePlugin.MCAP and index % chunk_messages == 0:
                writer.storage.close_chunk()
    if storage is StoragePlugin.MCAP and checksums and compression is not CompressionMode.FILE:
        add_checksums(storage_file(folder))
    return folder


def storage_file(bag: Path) -> Path:
    """The bag's one storage file."""
    (path,) = (path for path in bag.iterdir() if path.suffix in (".mcap", ".db3", ".zstd"))
    return path


def records(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, where its content begins, where it ends) of an mcap file's records."""
    position = 8
    while position < len(data) - 8:
        kind, length = struct.unpack_from("<BQ", data, position)
        yield kind, position + 9, position + 9 + length
        position += 9 + length


def record(kind: int, content: bytes) -> bytes:
    """An mcap record."""
    return struct.pack("<BQ", kind, len(content)) + content


def chunks(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, records) of the uncompressed chunks of an mcap file."""
    for kind, start, end in records(data):
        if kind == CHUNK:
            times = struct.unpack_from("<QQ", data, start)
            yield *times, data[start + 40 : end]


def rechunked(data: bytes, compression: str) -> bytes:
    """The chunks compressed anew, with checksums, and no index behind them."""
    packed = b""
    compress = {"": bytes, "lz4": lz4.frame.compress, "zstd": zstd.compress}[compression]
    for start_ns, end_ns, inner in chunks(data):
        head = (
            struct.pack("<QQQII", start_ns, end_ns, len(inner), crc32(inner), len(compression)) + compression.encode()
        )
        small = compress(inner)
        packed += record(CHUNK, head + struct.pack("<Q", len(small)) + small)
    return _closed(data, packed)


def without_chunks(data: bytes, checksum: bool = False) -> bytes:
    """What is in the chunks, without them, and no index behind it; `checksum`: one over all of it."""
    return _closed(data, b"".join(inner for _, _, inner in chunks(data)), checksum)


def _closed(data: bytes, content: bytes, checksum: bool = False) -> bytes:
    _, _, header_end = next(records(data))
    section = data[:header_end] + content
    ends = record(DATA_END, struct.pack("<I", crc32(section) if checksum else 0)) + record(FOOTER, bytes(20))
    return section + ends + data[:8]


def add_checksums(path: Path) -> None:
    """Fill in the checksums that rosbags leaves out: of every chunk (as it is, uncompressed) and of the index."""
    data = bytearray(path.read_bytes())
    for kind, start, end in records(bytes(data)):
        if kind == CHUNK:
            (name_length,) = struct.unpack_from("<I", data, start + 28)
            if name_length == 0:
                struct.pack_into("<I", data, start + 24, crc32(data[start + 40 : end]))
        elif kind == FOOTER:
            (summary,) = struct.unpack_from("<Q", data, start)
            struct.pack_into("<I", data, start + 16, crc32(data[summary : start + 16]))
    path.write_bytes(data)


def with_data_checksum(data: bytearray) -> bytes:
    """The checksum over all messages filled in, as some writers have it."""
    for kind, start, _ in records(bytes(data)):
        if kind == DATA_END:
            struct.pack_into("<I", data, start, crc32(data[: start - 9]))
    return bytes(data)


def changed(bag: Path, change: Callable[[bytearray], bytes]) -> Path:
    """The bag, its storage file changed."""
    path = storage_file(bag)
    path.write_bytes(change(bytearray(path.read_bytes())))
    return bag


def flipped(data: bytearray, bit: int) -> bytes:
    """One bit turned over."""
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def key(recorded: Sequence[Recorded]) -> list[tuple[str, int, bytes]]:
    """Topic, receive time and bytes of each message: what a recording must give back."""
    return [(m.topic, m.receive_ns, bytes(STORE.serialize_cdr(m.msg, TYPES[m.topic]))) for m in recorded]


ALL_TOPICS = tuple(toy_robot.TYPES)
