"""The account of one bag: what its streams were like, which episodes came of it, what was left out and why.

Only JSON's types, so that it can be kept beside the data and read back; times in s, counted from the bag's first
message (`start_ns`) where they are instants. Series stand in the dataset itself.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Self

STREAM_KINDS = ("camera", "depth", "state", "action", "task")
GAP_KINDS = ("stale", "skew", "damaged", "clock")


@dataclass
class StreamAccount:
    """One stream: its messages, and how old those were that the rows were made of.

    `age_*` is the distance from a row's instant to the message used, skew the header stamp less the receive time (p95
    and max of its size). Rate in Hz, over the whole bag; `longest_pause` between two messages. `late`: came after one
    stamped later; `too_late`: of these, the ones that came when a row was already made that they would have changed, or
    could have. `astray`: not used, since stamped too far from the receive time after a jump of the clock. `repeated`:
    share of the rows that have the same message as the row before. `max_age` is None where a value holds until the next
    one comes.
    """

    name: str
    topic: str
    kind: str  # one of STREAM_KINDS
    stamp: str  # header or receive
    sampling: str  # as_of, nearest, interpolate, trajectory
    max_age: float | None
    count: int = 0
    rate: float = 0.0
    longest_pause: float = 0.0
    age_p50: float = 0.0
    age_p95: float = 0.0
    age_max: float = 0.0
    skew_median: float = 0.0
    skew_p95: float = 0.0
    skew_max: float = 0.0
    late: int = 0
    too_late: int = 0
    duplicates: int = 0
    clock_jumps: int = 0
    astray: int = 0
    repeated: float = 0.0


@dataclass
class GapAccount:
    """A time of which no rows were made, from `start` to `end`, because of `stream`.

    kind: stale (no message for longer than allowed), skew (cameras' stamps too far apart), damaged (a picture that
    cannot be decoded), clock (header stamps that jumped).
    """

    start: float
    end: float
    stream: str
    kind: str
    reason: str


@dataclass
class EpisodeAccount:
    """An episode: `frames` rows from `start` on, or why it was left out.

    tasks: [first frame, task] in order. `idle_*`: share of idle frames, and s of them at the beginning and the end
    (see conversion.idle); peak_speed in rad/s (m/s) by joint; ages {stream: [p50, p95, max]}.
    """

    start: float
    seconds: float
    frames: int
    tasks: list[tuple[int, str]]
    idle_share: float
    idle_start: float
    idle_end: float
    peak_speed: dict[str, float]
    ages: dict[str, list[float]]
    left_out: str | None


@dataclass
class BagAccount:
    """One bag: `seconds` from its first message to its last, of which the first `warm_up` came before every stream was
    there (the last of them was `warm_up_stream`), and the last `trimmed` after one had ended (`trimmed_stream`).
    """

    bag: str
    fps: int
    start_ns: int = 0
    seconds: float = 0.0
    warm_up: float = 0.0
    warm_up_stream: str = ""
    trimmed: float = 0.0
    trimmed_stream: str = ""
    idle_trimmed: float = 0.0  # left out at episodes' ends because nothing moved, where that was asked for
    streams: list[StreamAccount] = field(default_factory=list)
    gaps: list[GapAccount] = field(default_factory=list)
    episodes: list[EpisodeAccount] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The same in JSON's types; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """What `as_json` gave. Raises TypeError or KeyError for what another version wrote."""
        parts = {
            "streams": [StreamAccount(**stream) for stream in document["streams"]],
            "gaps": [GapAccount(**gap) for gap in document["gaps"]],
            "episodes": [
                EpisodeAccount(**{**episode, "tasks": [(int(first), task) for first, task in episode["tasks"]]})
                for episode in document["episodes"]
            ],
        }
        return cls(**{**document, **parts})


class Spread:
    """The distribution of durations, to a tenth of a millisecond, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._largest: float | None = None

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[round(seconds * 1e4)] += 1
        if self._largest is None or abs(seconds) > abs(self._largest):
            self._largest = seconds

    def quantile(self, share: float) -> float:
        """The value that a share (0 to 1) of all are not above; 0 of none."""
        left = share * self._counts.total()
        for value in sorted(self._counts):
            left -= self._counts[value]
            if left <= 0:
                return value / 1e4
        return 0.0

    @property
    def largest(self) -> float:
        """The one farthest from zero, with its sign; 0 of none."""
        return self._largest or 0.0

    def summary(self) -> list[float]:
        """[p50, p95, the one farthest from zero]."""
        return [self.quantile(0.5), self.quantile(0.95), self.largest]
