"""One stream of stamped messages: a ring of the latest, found again by their header stamps."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np

SLACK = 1.0  # s: a stamp this much older than the newest is late; beyond that the clock went backwards


class ObservationError(RuntimeError):
    """No observation can be made. `code` is the name of a runtime.gate.Verdict."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class StreamStatistics:
    """What a stream has seen, and how it runs now.

    Messages taken; those that came late, twice (dropped), or, after the clocks went backwards, from before that
    (dropped); how often its clock went backwards. `rate` in Hz, of the header stamps of the latest second or more, 0
    once none is kept of that time; `age` of the newest message in s, NaN before the first.
    """

    received: int = 0
    late: int = 0
    duplicates: int = 0
    before_reset: int = 0
    resets: int = 0
    rate: float = 0.0
    age: float = float("nan")


@dataclass
class Sample:
    """A message as it came, and what it decodes to once somebody asked."""

    stamp_ns: int
    message: Any
    value: np.ndarray | None = None


@dataclass
class Stream:
    """The messages of one topic stamped within `keep_ns` before the newest, and one before, in the order of stamps."""

    name: str
    topic: str
    max_age_ns: int
    keep_ns: int
    decode: Callable[[Any], np.ndarray]
    samples: list[Sample] = field(default_factory=list)
    counts: StreamStatistics = field(default_factory=StreamStatistics)

    @property
    def newest_ns(self) -> int | None:
        """The newest stamp kept; None if there is none."""
        return self.samples[-1].stamp_ns if self.samples else None

    def went_back(self, stamp_ns: int) -> bool:
        """Whether a message of this stamp means that the clock went backwards, and not that it is late."""
        return bool(self.samples) and stamp_ns < self.samples[-1].stamp_ns - ns(SLACK)

    def add(self, sample: Sample) -> None:
        """Keep a message at its place; of two with one stamp the first stays: what was once sampled does not change."""
        samples = self.samples
        if not samples or sample.stamp_ns > samples[-1].stamp_ns:
            samples.append(sample)
        else:
            self._insert(sample)
        oldest_ns = samples[-1].stamp_ns - self.keep_ns
        # One older than that stays: after a gap it tells that the stream is stale, and not that it never was.
        if len(samples) > 1 and samples[1].stamp_ns < oldest_ns:
            del samples[: bisect_left(samples, oldest_ns, key=_stamp) - 1]

    def _insert(self, sample: Sample) -> None:
        index = bisect_left(self.samples, sample.stamp_ns, key=_stamp)
        if self.samples[index].stamp_ns == sample.stamp_ns:
            self.counts.duplicates += 1
        else:
            self.counts.late += 1
            self.samples.insert(index, sample)

    def as_of(self, t_ns: int) -> Sample:
        """The newest message stamped not later than t_ns.

        Raises ObservationError, INPUT_MISSING if there is none, INPUT_STALE if it is older than allowed.
        """
        index = bisect_right(self.samples, t_ns, key=_stamp)
        if index == 0:
            raise ObservationError("INPUT_MISSING", self._missing(t_ns))
        sample = self.samples[index - 1]
        if t_ns - sample.stamp_ns > self.max_age_ns:
            raise ObservationError("INPUT_STALE", self._stale(sample, t_ns))
        return sample

    def around(self, t_ns: int) -> tuple[Sample | None, Sample | None]:
        """The newest message stamped not later than t_ns, and the first one later; None where there is none."""
        index = bisect_right(self.samples, t_ns, key=_stamp)
        return (self.samples[index - 1] if index else None, self.samples[index] if index < len(self.samples) else None)

    def forget(self, t_ns: int) -> None:
        """Forget the messages that no instant from t_ns on needs: those before the newest not later than it."""
        del self.samples[: max(0, bisect_right(self.samples, t_ns, key=_stamp) - 1)]

    def after(self, stamp_ns: int | None) -> list[Sample]:
        """The messages stamped later than stamp_ns, earliest first; all of them for None."""
        return self.samples[0 if stamp_ns is None else bisect_right(self.samples, stamp_ns, key=_stamp) :]

    def statistics(self, now_ns: int | None) -> StreamStatistics:
        """The counts, and rate and age as of now_ns (None: of the newest stamp)."""
        if not self.samples:
            return replace(self.counts)
        newest_ns = self.samples[-1].stamp_ns
        now_ns = newest_ns if now_ns is None else now_ns
        counted = self.after(now_ns - self.keep_ns)
        span_ns = counted[-1].stamp_ns - counted[0].stamp_ns if counted else 0
        rate = (len(counted) - 1) / (span_ns / 1e9) if span_ns else 0.0
        return replace(self.counts, rate=rate, age=(now_ns - newest_ns) / 1e9)

    def _missing(self, t_ns: int) -> str:
        where = f"topic '{self.topic}' ({self.name})"
        if not self.samples:
            before = self.counts.before_reset
            if before:
                return f"{where}: no message since the clocks went backwards but {before} with stamps of before that"
            return f"no message yet on {where}: is it published, with matching QoS?"
        ahead = (self.samples[0].stamp_ns - t_ns) / 1e9
        return (
            f"{where} has no message as old as {t_ns / 1e9:.3f} s: the oldest is {ahead:.3f} s younger. It has just "
            "begun, the clocks have jumped, or its clock is ahead of this one"
        )

    def _stale(self, sample: Sample, t_ns: int) -> str:
        age, limit = (t_ns - sample.stamp_ns) / 1e9, self.max_age_ns / 1e9
        cause = "it stopped, is slow, its clock is behind, or this one jumped forward"
        if sample.stamp_ns == 0:
            cause = "its header stamp is zero: the driver does not stamp"
        where = f"topic '{self.topic}' ({self.name})"
        return f"{where}: newest message is {age:.3f} s old, allowed are {limit} s; {cause}"


_stamp = attrgetter("stamp_ns")


def ns(seconds: float) -> int:
    """A duration in whole nanoseconds."""
    return round(seconds * 1e9)
