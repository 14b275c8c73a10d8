"""When messages were: each stream's clock, checked against the recorder's, and the times in which it is silent.

A message is known by its header's stamp, the instant of the measurement, or, where a type has none or it is not to be
believed, by its receive time. Both are of one clock, or nearly: a stamp may differ from the receive time by `max_skew`
at most. So, once the recorder's time is that much past an instant, nothing stamped before that instant can still come.

Bags recorded with simulated time hold together only if `ros2 bag record --use-sim-time` was given; else stamps and
receive times are years apart, which is an error here, and all streams must be taken by receive time.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass

from dit_policy_ros.runtime.streams import SLACK
from dit_policy_training.conversion.account import Spread, StreamAccount
from dit_policy_training.conversion.message import BagMessage
from dit_policy_training.conversion.options import STAMPS, OptionError, TimeOptions

EVERY_TOPIC = "*"  # in --time.stamps


class TimeError(ValueError):
    """Times in a recording that make no sense; the message says which topic, what was found and what to do."""


def stamp_choice(options: TimeOptions, topic: str) -> str:
    """What --time.stamps says of a topic: header, receive, or "" if it says nothing. Raises OptionError.

    A header for every topic is the same as nothing said: it is for those whose messages have one.
    """
    for name, choice in options.stamps.items():
        if choice not in STAMPS:
            raise OptionError(f"--time.stamps: {name} is '{choice}', expected {' or '.join(STAMPS)}")
    named = {name.lstrip("/"): choice for name, choice in options.stamps.items()}
    of_all = named.get(EVERY_TOPIC, "")
    return named.get(topic.lstrip("/"), "" if of_all == "header" else of_all)


@dataclass(frozen=True)
class Silence:
    """Why there is no row at an instant: from `start_ns` on, to `end_ns` for certain, but it may last longer."""

    start_ns: int
    end_ns: int
    stream: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Ticks:
    """The instants of rows: t0 + round(k * 1e9 / fps)."""

    t0_ns: int
    fps: int

    def at(self, k: int) -> int:
        """The k-th instant, ns."""
        return self.t0_ns + round(k * 1_000_000_000 / self.fps)

    def first_from(self, t_ns: int) -> int:
        """The number of the first instant not before t_ns; it may be negative."""
        k = (t_ns - self.t0_ns) * self.fps // 1_000_000_000 - 1
        while self.at(k) < t_ns:
            k += 1
        return k


class StreamClock:
    """The stamps of one stream, as far back as a tick may still need them, and what is to say of them.

    `account` is filled as messages come. Its `stamp` may be empty: header if the messages have one, which the first one
    tells.
    """

    def __init__(self, account: StreamAccount, max_skew: float):
        self.account = account
        self.first_ns: int | None = None
        self._max_skew_ns = round(max_skew * 1e9)
        self._max_age_ns = None if account.max_age is None else round(account.max_age * 1e9)
        self._stamps: list[int] = []
        self._span: tuple[int, int] | None = None  # first and last stamp of all
        self._last: tuple[int, int] | None = None  # stamp and receive time of the message before
        self._skews, self._skew_sizes, self._ages = Spread(), Spread(), Spread()
        self._astray: str | None = None  # what the latest message said, if it was out of all bounds
        self._used: int | None = None
        self._reach_ns = -1  # a message stamped up to here would have changed a row that is made
        self._rows = self._repeats = 0

    @property
    def newest_ns(self) -> int | None:
        """The newest stamp; None before the first, or since the clock jumped."""
        return self._stamps[-1] if self._stamps else None

    @property
    def last_ns(self) -> int | None:
        """The latest stamp ever; None before the first."""
        return None if self._span is None else self._span[1]

    @property
    def by_header(self) -> bool:
        """Whether messages are known by their headers' stamps."""
        return self.account.stamp != "receive"

    @property
    def _is_told(self) -> bool:
        """Whether of two messages at one instant, as simulated clocks make them, the second replaces the first."""
        return self.account.kind in ("action", "task") and not self.by_header

    @property
    def _allowance_ns(self) -> int:
        """So much later than an instant no message stamped before it can come."""
        return self._max_skew_ns if self.by_header else 0

    def stamp(self, message: BagMessage) -> int | None:
        """The instant of a message (ns); None if its header's stamp has jumped out of all bounds: it is not used.

        Raises TimeError for a stamp of zero, or one that is off from the stream's first message on.
        """
        self.account.count += 1
        if not self.by_header:
            return message.receive_ns
        topic, header_ns, receive_ns = self.account.topic, message.stamp_ns, message.receive_ns
        if not self.account.stamp:
            self.account.stamp = "receive" if header_ns is None else "header"
            if header_ns is None:
                return receive_ns
        if header_ns is None:
            raise TimeError(f"{topic}: its messages have no header; say --time.stamps='{{{topic}: receive}}'")
        if header_ns == 0 and receive_ns > self._max_skew_ns:  # a simulation's time begins at zero
            raise TimeError(
                f"{topic}: the header stamp of the message received at {_seconds(receive_ns)} is zero: the driver does "
                f"not stamp. Mend it, or take the receive time: --time.stamps='{{{topic}: receive}}'"
            )
        skew_ns = header_ns - receive_ns
        if abs(skew_ns) <= self._max_skew_ns:
            self._skews.add(skew_ns / 1e9)
            self._skew_sizes.add(abs(skew_ns) / 1e9)
            return header_ns
        if self._span is None:
            raise TimeError(self._skew_error(header_ns, receive_ns))
        self.account.clock_jumps += self._astray is None
        self.account.astray += 1
        self._astray = f"{topic}: stamped {_seconds(header_ns)}, received {_seconds(receive_ns)}: its clock has jumped"
        return None

    def _skew_error(self, header_ns: int, receive_ns: int) -> str:
        topic = self.account.topic
        simulated = (
            "The stamps are of a simulated clock: record with `ros2 bag record --use-sim-time`, or take all streams by "
            f"receive time: --time.stamps='{{\"{EVERY_TOPIC}\": receive}}'"
        )
        astray = (
            "Synchronise the clocks of the machines (chrony, PTP), allow more with --time.max_skew, or take the "
            f"receive time: --time.stamps='{{{topic}: receive}}'"
        )
        advice = simulated if header_ns < receive_ns / 2 else astray
        return (
            f"{topic}: stamped {_seconds(header_ns)}, received {_seconds(receive_ns)}; allowed are "
            f"{self._max_skew_ns / 1e9} s between the two, since commands and instructions are known by receive time. "
            + advice
        )

    def jumped(self, stamp_ns: int, receive_ns: int) -> bool:
        """Whether the stream's clock jumped between the message before and this one.

        It did if it went backwards for the node's buffer too, or if the distance of stamp and receive time changed by
        more than max_skew, and not because a message was late: then the receive time leaps ahead, the stamp goes on.
        """
        if self._last is None or not self.by_header:
            return False
        stamp_step, receive_step = stamp_ns - self._last[0], receive_ns - self._last[1]
        late = 0 <= stamp_step <= receive_step
        back = self.newest_ns is not None and stamp_ns < self.newest_ns - round(SLACK * 1e9)
        return back or (abs(stamp_step - receive_step) > self._max_skew_ns and not late)

    def add(self, stamp_ns: int, receive_ns: int) -> bool:
        """Note a message; False if another of that stamp is there already and stays."""
        before, self._last, self._astray = self._last, (stamp_ns, receive_ns), None
        newest_ns = self.newest_ns
        if newest_ns is not None and stamp_ns <= newest_ns:
            place = bisect_left(self._stamps, stamp_ns)
            if place < len(self._stamps) and self._stamps[place] == stamp_ns:
                if self._is_told:
                    return True
                self.account.duplicates += 1
                return False
            self.account.late += 1
            self.account.too_late += stamp_ns <= self._reach_ns
            insort(self._stamps, stamp_ns)
        else:
            if before is not None and newest_ns is not None:
                pause = (stamp_ns - newest_ns) / 1e9
                self.account.longest_pause = max(self.account.longest_pause, pause)
            self._stamps.append(stamp_ns)
        self.first_ns = stamp_ns if self.first_ns is None else self.first_ns
        first, last = self._span or (stamp_ns, stamp_ns)
        self._span = min(first, stamp_ns), max(last, stamp_ns)
        return True

    def start_afresh(self) -> None:
        """Forget the stamps: a clock has jumped."""
        self.first_ns = None
        self._stamps.clear()
        self._last = None

    def forget(self, t_ns: int) -> None:
        """Forget what no instant from t_ns on needs: all before the newest stamp not later than it."""
        del self._stamps[: max(0, bisect_right(self._stamps, t_ns) - 1)]

    def judge(self, t_ns: int, now_ns: int, ticks: Ticks) -> Silence | bool:
        """Whether the stream is known at t_ns: True; not yet: False; or the silence that t_ns is in.

        A time between two messages is a silence if a tick in it has no message near enough by the stream's rule. No
        row is then made of any of its ticks, so that an episode ends with the last message before it. `now_ns` is the
        recorder's time.
        """
        place = bisect_right(self._stamps, t_ns)
        before = self._stamps[place - 1] if place else None
        after = self._stamps[place] if place < len(self._stamps) else None
        if before == t_ns:
            return True
        over = now_ns > t_ns + self._allowance_ns
        if before is None:
            if after is None and not over:
                return False
            return Silence(t_ns, self._certain(after, now_ns), self.account.name, "clock", self._afresh())
        if self._max_age_ns is None:
            return after is not None or over
        lonely_ns = ticks.at(ticks.first_from(before + self._max_age_ns + 1))
        if self._is_silence(before, after, lonely_ns, now_ns, ticks):
            kind = "stale" if self._astray is None else "clock"
            until_ns = self._certain(after, now_ns)
            if until_ns <= t_ns:
                return False  # the message that ends the silence may still come, stamped before t_ns
            return Silence(before, until_ns, self.account.name, kind, self._astray or self._stale())
        return after is not None

    def _is_silence(self, before: int, after: int | None, lonely_ns: int, now_ns: int, ticks: Ticks) -> bool:
        """`lonely_ns`: the first tick too long after the message before."""
        assert self._max_age_ns is not None
        sampling = self.account.sampling
        reach_ns = self._max_age_ns if sampling == "nearest" else 0
        if after is None:
            return now_ns > lonely_ns + reach_ns + self._allowance_ns
        if sampling == "interpolate":
            first_between_ns = ticks.at(ticks.first_from(before + 1))
            return lonely_ns < after or first_between_ns < after - self._max_age_ns
        return lonely_ns < after - reach_ns

    def chosen(self, t_ns: int) -> int:
        """The stamp of the message that a row at t_ns is made of; of two on which it lies between, the nearer one."""
        place = bisect_right(self._stamps, t_ns)
        around = self._stamps[max(0, place - 1) : place + 1]
        if self.account.sampling in ("nearest", "interpolate"):
            return min(around, key=lambda stamp_ns: abs(t_ns - stamp_ns))
        return around[0]

    def use(self, t_ns: int) -> float:
        """Note that a row is made of what is known at t_ns; how far from it the message was, s."""
        self.look(t_ns)
        stamp_ns = self.chosen(t_ns)
        age = abs(t_ns - stamp_ns) / 1e9
        self._ages.add(age)
        self._rows += 1
        self._repeats += stamp_ns == self._used
        self._used = stamp_ns
        return age

    def look(self, t_ns: int) -> None:
        """Note that a row has the stream's value at t_ns, so that messages that come too late for it are counted.

        Its value may depend on messages after t_ns: on the nearer one, or on the later one of two.
        """
        reach_ns = t_ns
        if self.account.sampling in ("nearest", "interpolate"):
            place = bisect_right(self._stamps, t_ns)
            before = self._stamps[place - 1] if place else None
            after = self._stamps[place] if place < len(self._stamps) else None
            if after is not None and before != t_ns:
                reach_ns = after - 1
                if self.account.sampling == "nearest" and before is not None:
                    reach_ns = min(reach_ns, 2 * t_ns - before - 1)
        self._reach_ns = max(self._reach_ns, reach_ns)

    def finish(self) -> None:
        """Fill the account."""
        account = self.account
        if self._span is not None and self._span[1] > self._span[0]:
            different = account.count - account.duplicates
            account.rate = (different - 1) / ((self._span[1] - self._span[0]) / 1e9)
        account.age_p50, account.age_p95, account.age_max = self._ages.summary()
        account.skew_median = self._skews.quantile(0.5)
        _, account.skew_p95, account.skew_max = self._skew_sizes.summary()
        account.repeated = self._repeats / self._rows if self._rows else 0.0

    def _afresh(self) -> str:
        return f"no message on {self.account.topic} yet since the clocks jumped"

    def _certain(self, after: int | None, now_ns: int) -> int:
        return after if after is not None else now_ns - self._allowance_ns

    def _stale(self) -> str:
        return f"no message on {self.account.topic} for longer than {self.account.max_age} s"


def judge_all(verdicts: Iterable[Silence | bool]) -> Silence | bool:
    """The verdicts of several streams as one: a silence, if one has any; else whether all are known."""
    known = True
    for verdict in verdicts:
        if isinstance(verdict, Silence):
            return verdict
        known = known and verdict
    return known


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"
