"""One message of a recording: its time stamps read from the raw bytes, its fields decoded once somebody asks."""

import struct
from collections.abc import Callable
from typing import Any

_HEADER_STAMP = {0: struct.Struct(">iI").unpack_from, 1: struct.Struct("<iI").unpack_from}  # by CDR's endianness flag


class BagError(ValueError):
    """A recording that cannot be read, or not further, or a message of it that cannot; says what, where, what to do."""


class BagMessage:
    """One message under the topic's name as the caller asked for it; `raw` is its CDR, `receive_ns` the recorder's time.

    A field that this class lacks (header, encoding, data, ...) is the message's own, so that it serves as the message
    to whatever takes ROS messages by duck typing. The first such access decodes it.
    """

    __slots__ = ("_decode", "_msg", "_stamped", "msgtype", "raw", "receive_ns", "topic")

    def __init__(
        self,
        topic: str,
        receive_ns: int,
        msgtype: str,
        raw: bytes | memoryview,
        stamped: bool,
        decode: Callable[[bytes | memoryview, str], Any],
    ):
        """`stamped`: whether the type begins with a std_msgs/Header."""
        self.topic = topic
        self.receive_ns = receive_ns
        self.msgtype = msgtype
        self.raw = raw
        self._stamped = stamped
        self._decode = decode
        self._msg: Any = None

    @property
    def stamp_ns(self) -> int | None:
        """The header's stamp, read from bytes 4 to 12 without decoding; None if the type does not begin with a header.

        Raises BagError if the bytes end before it.
        """
        if not self._stamped:
            return None
        if len(self.raw) < 12:
            raise self._error(f"{len(self.raw)} bytes are too few for a header stamp")
        seconds, nanoseconds = _HEADER_STAMP[self.raw[1] & 1](self.raw, 4)
        return int(seconds) * 1_000_000_000 + int(nanoseconds)

    @property
    def msg(self) -> Any:
        """The decoded message. Raises BagError if it cannot be decoded as its type says."""
        if self._msg is None:
            try:
                self._msg = self._decode(self.raw, self.msgtype)
            except Exception as error:  # the generated decoders raise anything on damaged bytes
                raise self._error(f"cannot be decoded as {self.msgtype}: {type(error).__name__}: {error}") from error
        return self._msg

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for is not the message's
            raise AttributeError(name)
        return getattr(self.msg, name)

    def __repr__(self) -> str:
        return f"BagMessage({self.topic!r}, {self.receive_ns}, {self.msgtype!r}, {len(self.raw)} bytes)"

    def _error(self, reason: str) -> BagError:
        return BagError(
            f"{self.topic}: the message received at {self.receive_ns / 1e9:.3f} s: {reason}; the recording is damaged, or "
            "its type was defined otherwise"
        )
