"""One message of a recording: its time stamps read from the raw bytes, its fields decoded once somebody asks."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_HEADER_STAMP = {0: struct.Struct(">iI").unpack_from, 1: struct.Struct("<iI").unpack_from}  # by CDR's endianness flag


type Raw = bytes | memoryview


class BagError(ValueError):
    """A recording that cannot be read, or not further, or a message of it that cannot; says what, where, what to do."""


@dataclass(frozen=True)
class MessageKind:
    """A message type: its name, whether it begins with a std_msgs/Header, and what decodes CDR bytes of it."""

    msgtype: str
    stamped: bool
    decode: Callable[[Raw], Any]


class BagMessage:
    """One message, under the topic's name as the caller asked for it: its CDR in `raw`, and when it was received.

    A field that this class lacks (header, encoding, data, ...) is the message's own, so that it serves as the message
    to whatever takes ROS messages by duck typing. The first such access decodes it.
    """

    __slots__ = ("_kind", "_msg", "raw", "receive_ns", "topic")

    def __init__(self, topic: str, receive_ns: int, kind: MessageKind, raw: Raw):
        self.topic = topic
        self.receive_ns = receive_ns
        self.raw = raw
        self._kind = kind
        self._msg: Any = None

    @property
    def msgtype(self) -> str:
        """Such as sensor_msgs/msg/Image."""
        return self._kind.msgtype

    @property
    def stamp_ns(self) -> int | None:
        """The header's stamp, read from bytes 4 to 12 without decoding; None if the type does not begin with a header.

        Raises BagError if the bytes end before it.
        """
        if not self._kind.stamped:
            return None
        if len(self.raw) < 12:
            raise self._error(f"its {len(self.raw)} bytes are too few for a header stamp")
        seconds, nanoseconds = _HEADER_STAMP[self.raw[1] & 1](self.raw, 4)
        return int(seconds) * 1_000_000_000 + int(nanoseconds)

    @property
    def msg(self) -> Any:
        """The decoded message. Raises BagError if it cannot be decoded as its type says."""
        if self._msg is None:
            try:
                self._msg = self._kind.decode(self.raw)
            except Exception as error:  # the generated decoders raise anything on damaged bytes
                reason = f"it cannot be decoded as {self.msgtype}, {type(error).__name__}: {error}"
                raise self._error(reason) from error
        return self._msg

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for is not the message's
            raise AttributeError(name)
        return getattr(self.msg, name)

    def __repr__(self) -> str:
        return f"BagMessage({self.topic!r}, {self.receive_ns}, {self.msgtype!r}, {len(self.raw)} bytes)"

    def _error(self, reason: str) -> BagError:
        return BagError(
            f"{self.topic}: the message received at {self.receive_ns / 1e9:.3f} s is damaged, or its type is defined "
            f"otherwise than where it was sent: {reason}"
        )
