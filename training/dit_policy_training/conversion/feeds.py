"""Where each message of a bag goes: from a topic to the streams that are made of it, with the time of each."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from dit_policy_training.conversion.account import BagAccount, StreamAccount
from dit_policy_training.conversion.message import BagMessage
from dit_policy_training.conversion.options import OptionError, TimeOptions
from dit_policy_training.conversion.times import EVERY_TOPIC, Silence, StreamClock, stamp_choice

Sink = Callable[[int, BagMessage], None]


class Memory(Protocol):
    """What keeps messages: a view, a track, a followed trajectory."""

    def forget(self, t_ns: int) -> None:
        """Forget what no instant from t_ns on needs."""
        ...

    def clear(self) -> None:
        """Forget every message."""
        ...


@dataclass(frozen=True)
class Feed:
    """One stream: the clock that says when a message was, and what takes it.

    measured: its stamps tell of a measurement, so a jump of its clock parts what came before from what comes after.
    lead_ns: the first tick may be so much before its first message. wanted: which messages count.
    """

    clock: StreamClock
    sinks: tuple[Sink, ...]
    measured: bool
    lead_ns: int
    wanted: Callable[[], bool]


class Feeds:
    """The streams of a bag by topic. Topics are compared without their leading slash."""

    def __init__(self, types: Mapping[str, str], options: TimeOptions, account: BagAccount):
        """types: of each topic with messages."""
        self._types = {name.lstrip("/"): kind for name, kind in types.items()}
        self._options, self._account = options, account
        self._feeds: dict[str, list[Feed]] = {}
        self._memories: list[tuple[Memory, bool]] = []
        self.unused: dict[str, int] = {}  # messages by topic that came before they could be used

    def msgtype(self, topic: str) -> str | None:
        """The topic's type in the bag; None if there is no message on it."""
        return self._types.get(topic.lstrip("/"))

    def clock(
        self, name: str, topic: str, kind: str, sampling: str, max_age: float | None, stamp: str = ""
    ) -> StreamClock:
        """A stream's clock, with its place in the account. Raises OptionError for a stamp that it has not."""
        choice = stamp or stamp_choice(self._options, topic)
        if stamp == "receive" and sampling == "as_of" and stamp_choice(self._options, topic) == "header":
            raise OptionError(f"--time.stamps: {topic} is known by its receive time only; leave it out")
        account = StreamAccount(name, topic, kind, choice, sampling, max_age)
        self._account.streams.append(account)
        return StreamClock(account, self._options.max_skew)

    def connect(
        self,
        clock: StreamClock,
        *sinks: Sink,
        measured: bool = True,
        lead_ns: int = 0,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Send a stream's messages to these."""
        feed = Feed(clock, sinks, measured, lead_ns, wanted)
        self._feeds.setdefault(clock.account.topic.lstrip("/"), []).append(feed)

    def remember(self, memory: Memory, measured: bool = True) -> None:
        """Let what keeps messages forget with the rest; `measured`: also when a clock jumps."""
        self._memories.append((memory, measured))

    @property
    def topics(self) -> list[str]:
        """Every topic to read."""
        return [feeds[0].clock.account.topic for feeds in self._feeds.values()]

    def check_stamps(self) -> None:
        """Raises OptionError if --time.stamps names a topic that is not read."""
        known = {topic.lstrip("/") for topic in self.topics}
        for name in self._options.stamps:
            if name != EVERY_TOPIC and name.lstrip("/") not in known:
                raise OptionError(f"--time.stamps: '{name}' is not read, only {', '.join(sorted(known))}")

    @property
    def missing(self) -> list[str]:
        """Those of them without a message in the bag."""
        return [topic for topic in self.topics if self.msgtype(topic) is None]

    def take(self, message: BagMessage) -> Silence | None:
        """Give a message to its streams; a Silence if the clock of one of them jumped, and all were begun afresh.

        Raises TimeError for a stamp that makes no sense, and what the sinks raise.
        """
        jump = None
        for feed in self._feeds[message.topic.lstrip("/")]:
            clock = feed.clock
            if not feed.wanted():
                self.unused[message.topic] = self.unused.get(message.topic, 0) + 1
                continue
            stamp_ns = clock.stamp(message)
            if stamp_ns is None:
                continue
            if feed.measured and clock.jumped(stamp_ns, message.receive_ns):
                jump = self._start_afresh(clock, message)
            if clock.add(stamp_ns, message.receive_ns):
                for sink in feed.sinks:
                    sink(stamp_ns, message)
        return jump

    def _start_afresh(self, clock: StreamClock, message: BagMessage) -> Silence:
        clock.account.clock_jumps += 1
        newest_ns = clock.newest_ns or message.receive_ns
        reason = (
            f"the header stamps of {clock.account.topic} jumped from {_seconds(newest_ns)} to "
            f"{_seconds(message.stamp_ns or 0)} at {_seconds(message.receive_ns)}"
        )
        for memory, measured in self._memories:
            if measured:
                memory.clear()
        for feed in self._all():
            if feed.measured:
                feed.clock.start_afresh()
        return Silence(newest_ns, newest_ns, clock.account.name, "clock", reason)

    def first_tick(self) -> tuple[int, StreamClock] | None:
        """The first instant at which every stream is there, and the last of them to come; None before."""
        begins = []
        for feed in self._all():
            if feed.clock.first_ns is None:
                return None
            begins.append((feed.clock.first_ns - feed.lead_ns, feed.clock))
        return max(begins, key=lambda begin: begin[0])

    @property
    def awaited(self) -> list[StreamAccount]:
        """The streams of which no message could be used yet."""
        return [feed.clock.account for feed in self._all() if feed.clock.first_ns is None]

    def forget(self, t_ns: int) -> None:
        """Forget what no instant from t_ns on needs."""
        for memory, _ in self._memories:
            memory.forget(t_ns)
        for feed in self._all():
            feed.clock.forget(t_ns)

    def finish(self) -> None:
        """Fill the account of each stream."""
        for feed in self._all():
            feed.clock.finish()

    def _all(self) -> Iterator[Feed]:
        for feeds in self._feeds.values():
            yield from feeds


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"
