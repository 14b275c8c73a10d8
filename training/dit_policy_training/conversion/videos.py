"""One camera's mp4, written frame by frame; what is in an mp4; and mp4s joined into one without encoding again."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from dit_policy_training.conversion.encoders import Encoder, VideoError, open_stream


class VideoFile:
    """An mp4 whose k-th frame stands at exactly k / fps."""

    def __init__(self, path: Path, encoder: Encoder, fps: int, height: int, width: int):
        self._path, self._fps, self.pix_fmt = path, fps, encoder.pix_fmt
        self._container = av.open(str(path), "w")
        self._stream = open_stream(self._container, encoder, fps, height, width)
        self._given = self._written = 0

    def add(self, frame: av.VideoFrame) -> None:
        """Encode the next frame; its memory is free again afterwards."""
        frame.pts, frame.time_base = self._given, Fraction(1, self._fps)
        self._given += 1
        self._mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file. Raises VideoError if not every frame given is in it."""
        self._mux(self._stream.encode())
        self._container.close()
        check_count(self._path, self._written, self._given)

    def abandon(self) -> None:
        """Close what is open; what the file holds is worth nothing."""
        with suppress(av.FFmpegError, OSError, ValueError):  # the reason it is abandoned for, once more
            self._container.close()

    def _mux(self, packets: Sequence[Any]) -> None:
        for packet in packets:
            self._container.mux(packet)
            self._written += 1


def check_count(path: Path, frames: int, rows: int) -> None:
    """Raises VideoError if a video does not hold as many frames as the table has rows for it."""
    if frames != rows:
        raise VideoError(f"{path}: {frames} frames encoded for {rows} rows; convert again, and report it if it stays")


@contextmanager
def _opened(video: Path) -> Iterator[Any]:
    """The mp4 for reading; what libav says of it becomes a VideoError, but OSErrors stay what they are."""
    try:
        with av.open(str(video)) as container:
            yield container
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise VideoError(f"{video} cannot be read: {error.strerror}; convert again") from error


def frames_in(video: Path) -> int:
    """How many frames an mp4 holds, counted packet by packet."""
    with _opened(video) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


def payloads_in(video: Path) -> np.ndarray:
    """(frames,) uint64 in the order of their times: the beginning of each encoded frame's sha256."""
    with _opened(video) as container:
        packets = [
            (packet.pts, hashlib.sha256(memoryview(packet)).digest()[:8])
            for packet in container.demux(video=0)
            if packet.size
        ]
    packets.sort(key=lambda packet: packet[0])
    return np.frombuffer(b"".join(digest for _, digest in packets), np.uint64)


def properties(video: Path) -> dict[str, Any]:
    """What LeRobot's info.json says of a video, read from its first file."""
    with _opened(video) as container:
        stream = container.streams.video[0]
        return {
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": stream.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt,
            "video.fps": int(stream.base_rate),
            "video.channels": len(av.VideoFormat(stream.pix_fmt).components),
            "has_audio": False,
        }


def signature(video: Path) -> tuple[Any, ...]:
    """What two mp4s must have in common to be joined."""
    with _opened(video) as container:
        stream = container.streams.video[0]
        extra = bytes(stream.codec_context.extradata or b"")
        return stream.codec.canonical_name, stream.pix_fmt, stream.height, stream.width, stream.time_base, extra


def join_videos(sources: Sequence[Path], target: Path, fps: int) -> list[int]:
    """Copy the frames of several mp4s of one signature into one, and return how many each brought.

    The k-th frame of all stands at exactly k / fps: times are counted, not added up from the files' durations, whose
    rounding makes late episodes drift (LeRobot's issue 3177). Raises VideoError if a source's own times are not that.
    """
    counts: list[int] = []
    with av.open(str(target), "w") as joined:
        stream: Any = None
        for source in sources:
            with _opened(source) as container:
                template = container.streams.video[0]
                if stream is None:
                    stream = joined.add_stream_from_template(template, opaque=True)
                    stream.time_base = template.time_base
                ticks = 1 / (fps * template.time_base)
                counts.append(_copy(container, joined, stream, ticks, sum(counts), source))
    check_count(target, frames_in(target), sum(counts))
    return counts


def _copy(container: Any, joined: Any, stream: Any, ticks: Fraction, before: int, source: Path) -> int:
    if ticks.denominator != 1:
        raise VideoError(f"{source}: its clock of {1 / ticks} ticks a frame cannot say whole frames; convert again")
    times = set()
    for packet in container.demux(video=0):
        if not packet.size:
            continue  # the demuxer's last word, no picture
        times.add(packet.pts)
        packet.stream = stream
        packet.pts += before * ticks.numerator
        packet.dts += before * ticks.numerator
        joined.mux(packet)
    if times != {k * ticks.numerator for k in range(len(times))}:
        raise VideoError(f"{source}: its frames do not stand at multiples of 1/fps; convert again")
    return len(times)
