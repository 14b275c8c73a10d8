"""Rows to episodes: where one ends, the holes between rows, and what is to say of both."""

from collections.abc import Callable, Iterator

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training.conversion.account import BagAccount, EpisodeAccount, GapAccount, Spread
from dit_policy_training.conversion.idle import Movement
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.rows import EpisodeEnd, Row, SampleError
from dit_policy_training.conversion.times import Silence

MIN_FRAMES = 2  # LeRobot keeps no statistics of the videos of a single frame


class Takes:
    """Takes the rows of a bag in order, and gives them back episode by episode; fills the account's episodes and gaps.

    `hole`: why there has been no row since the latest one, None if nothing is missing; `last_ns`: that one's instant.
    """

    def __init__(
        self,
        config: ConvertConfig,
        embodiment: Embodiment,
        account: BagAccount,
        spreads: Callable[[], dict[str, Spread]],
    ):
        self._config, self._embodiment, self._account, self._spreads = config, embodiment, account, spreads
        self.hole: Silence | None = None
        self.last_ns: int | None = None
        self._episode: _Episode | None = None
        self._run: tuple[int, str] = (0, "")  # of rows with one instruction, where this makes an episode
        self._dropped: tuple[int, int] | None = None

    def fall_silent(self, silence: Silence) -> None:
        """There is no row now."""
        if self.hole is None:
            self.hole = silence

    def give(self, row: Row, span: int) -> Iterator[Row | EpisodeEnd]:
        """The row, and before it the end of the episode that it does not belong to."""
        if self._config.episodes.by == "instruction" and row.task != self._run[1]:
            self._run = (self._run[0] + 1, row.task)
        take = (span, self._run[0])
        hole = self.close_hole(row.stamp_ns)
        if self._episode is not None and (hole is not None or self._episode.take != take):
            reason = self._reason(hole) if hole is not None and self._episode.take == take else ""
            self._dropped = take if reason else None
            yield from self.end(reason)
        self.last_ns = row.stamp_ns
        if self._dropped == take:
            return
        if self._episode is None:
            self._episode = _Episode(take, row, self._embodiment, self._config, self._spreads())
        self._episode.add(row)
        yield row

    def _reason(self, hole: Silence) -> str:
        """Why an episode with this hole is left out; empty if it is two. Raises SampleError to refuse the bag."""
        said = f"{hole.stream} at {_seconds(hole.start_ns)}: {hole.reason}"
        if self._config.time.on_gap == "refuse":
            raise SampleError(f"a gap in an episode (--time.on_gap=refuse): {said}")
        return f"a gap in it (--time.on_gap=drop): {said}" if self._config.time.on_gap == "drop" else ""

    def leave(self, t_ns: int) -> Iterator[EpisodeEnd]:
        """Rows are not wanted from t_ns on."""
        self.close_hole(t_ns)
        yield from self.end()

    def end(self, reason: str = "") -> Iterator[EpisodeEnd]:
        """The end of the episode under way, if there is one; `reason`: why to leave it out."""
        episode, self._episode = self._episode, None
        if episode is not None:
            account = episode.account(self._account.start_ns, reason)
            self._account.episodes.append(account)
            yield EpisodeEnd(account.left_out)

    def close_hole(self, end_ns: int) -> Silence | None:
        """The hole, if there is one, which ends now; noted in the account."""
        hole, self.hole = self.hole, None
        if hole is not None:
            start, end = ((ns - self._account.start_ns) / 1e9 for ns in (hole.start_ns, end_ns))
            self._account.gaps.append(GapAccount(start, end, hole.stream, hole.kind, hole.reason))
        return hole


class _Episode:
    """What is to say of the episode that is being made."""

    def __init__(
        self,
        take: tuple[int, int],
        first: Row,
        embodiment: Embodiment,
        config: ConvertConfig,
        ages: dict[str, Spread],
    ):
        self.take = take
        self._start_ns = first.stamp_ns
        self._joints = embodiment.state.joints
        self._fps = embodiment.fps
        self._min_seconds = config.episodes.min_seconds
        self._movement = Movement(embodiment.fps, config.episodes.idle_speed)
        self._ages = ages
        self._tasks: list[tuple[int, str]] = []
        self._frames = 0

    def add(self, row: Row) -> None:
        if not self._tasks or self._tasks[-1][1] != row.task:
            self._tasks.append((self._frames, row.task))
        self._movement.add(row.stamp_ns, row.frame["observation.state"][: len(self._joints)])
        for name, age in row.ages.items():
            self._ages[name].add(age)
        self._frames += 1

    def account(self, bag_start_ns: int, reason: str) -> EpisodeAccount:
        seconds = self._frames / self._fps
        if not reason and self._frames < MIN_FRAMES:
            reason = f"only {self._frames} frame, expected {MIN_FRAMES} at least"
        if not reason and seconds < self._min_seconds:
            reason = f"only {seconds:.3f} s long, --episodes.min_seconds={self._min_seconds}"
        return EpisodeAccount(
            start=(self._start_ns - bag_start_ns) / 1e9,
            seconds=seconds,
            frames=self._frames,
            tasks=self._tasks,
            idle_share=self._movement.idle_share,
            idle_start=self._movement.idle_start,
            idle_end=self._movement.idle_end,
            peak_speed=self._movement.peak_speeds(self._joints),
            ages={name: spread.summary() for name, spread in self._ages.items()},
            left_out=reason or None,
        )


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"
