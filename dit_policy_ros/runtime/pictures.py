"""What a compressed picture says of itself, read without decoding a pixel, so that a cut or strange one is found in
microseconds.

Sources: ITU-T T.81 (JPEG) annex B, W3C PNG specification sections 5 and 11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_TAIL = 64  # bytes at the end searched first; some drivers pad a picture with zeros
# Start of frame: 0xC0 to 0xCF but for the tables of that range (DHT, JPG, DAC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_ALONE = frozenset([0x01, *range(0xD0, 0xD8)])  # markers without a length
_JPEG_SCAN, _JPEG_END = 0xDA, b"\xff\xd9"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type


class PictureError(ValueError):
    """The bytes are not a whole JPEG or PNG; the message says what is wrong with them."""


@dataclass(frozen=True)
class PictureHeader:
    """Size in pixels, channels as stored (1: grey) and bits a channel."""

    width: int
    height: int
    channels: int
    bits: int


def read_header(data: Any) -> PictureHeader:
    """The header of a JPEG or PNG in any buffer of bytes; whether its pixels are sound only decoding can tell.

    Raises PictureError for other bytes, a header that is cut or makes no sense, and a missing end.
    """
    view = memoryview(data).cast("B")
    start = bytes(view[:8])
    if start.startswith(_JPEG_MAGIC):
        return _read_jpeg(view)
    if start == _PNG_MAGIC:
        return _read_png(view)
    raise PictureError(f"begins with {start.hex(' ')}, neither JPEG nor PNG" if start else "empty")


def _read_jpeg(view: memoryview) -> PictureHeader:
    place = 2
    while place + 4 <= len(view):
        if view[place] != 0xFF:
            raise PictureError(f"JPEG without a marker at byte {place}")
        marker = view[place + 1]
        if marker == 0xFF:  # fill
            place += 1
        elif marker in _JPEG_ALONE:
            place += 2
        elif marker in _JPEG_FRAMES:
            return _read_jpeg_frame(view, place)
        elif marker in (_JPEG_SCAN, _JPEG_END[1]):
            raise PictureError("JPEG without a frame header")
        else:
            place += 2 + int.from_bytes(view[place + 2 : place + 4])
    raise PictureError("JPEG cut in its header")


def _read_jpeg_frame(view: memoryview, place: int) -> PictureHeader:
    frame = view[place + 4 : place + 10]
    if len(frame) < 6:
        raise PictureError("JPEG cut in its header")
    # Pixels' data never holds an end marker, a thumbnail before the frame header may.
    if bytes(view[max(place, len(view) - _TAIL) :]).rfind(_JPEG_END) < 0 and bytes(view[place:]).rfind(_JPEG_END) < 0:
        raise PictureError("JPEG without its end")
    return PictureHeader(
        width=int.from_bytes(frame[3:5]), height=int.from_bytes(frame[1:3]), channels=frame[5], bits=frame[0]
    )


def _read_png(view: memoryview) -> PictureHeader:
    header = bytes(view[8:26])
    if len(header) < 18 or header[4:8] != b"IHDR" or header[17] not in _PNG_CHANNELS:
        raise PictureError("PNG cut or damaged in its header")
    if b"IEND" not in bytes(view[max(26, len(view) - _TAIL) :]):
        raise PictureError("PNG without its end")
    return PictureHeader(
        width=int.from_bytes(header[8:12]),
        height=int.from_bytes(header[12:16]),
        channels=_PNG_CHANNELS[header[17]],
        bits=header[16],
    )
