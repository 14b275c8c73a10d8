"""One bag to rows: ticks on an integer grid, each with what the robot saw, was told, and was commanded.

Observations are what the policy node would have sampled at that instant, since they come from its own buffer, fed in
receive order (see conversion.streams). Ticks run from the moment when every stream exists to the end of the shortest.
A tick is made once each stream has a message at or past it, as the node does, or has had its time to send one. What is
stamped before it and comes later still, out of its stream's order, changes no row: it is counted as too late. What no
later tick needs is forgotten at once, so memory does not grow with the bag. Where a stream is silent for longer than it
may be, no rows are made (see conversion.times).
"""

from collections import Counter
from collections.abc import Iterator

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.streams import ObservationError
from dit_policy_training.conversion.account import BagAccount, Spread
from dit_policy_training.conversion.actions import Actions
from dit_policy_training.conversion.episodes import Plan, Span, plan_episodes
from dit_policy_training.conversion.feeds import Feeds
from dit_policy_training.conversion.layout import Layout, at_fps
from dit_policy_training.conversion.message import BagMessage
from dit_policy_training.conversion.observations import Observations
from dit_policy_training.conversion.options import ON_GAP, ConvertConfig, OptionError
from dit_policy_training.conversion.recording import Recording
from dit_policy_training.conversion.rows import EpisodeEnd, Row, SampleError
from dit_policy_training.conversion.takes import Takes
from dit_policy_training.conversion.tasks import Tasks
from dit_policy_training.conversion.times import Silence, Ticks, judge_all

__all__ = ["EpisodeEnd", "Row", "SampleError", "Sampler"]

_IMAGE_TYPES = {"raw": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}


class Sampler:
    """The rows of one recording, episode by episode; `account` says what was found, as far as it got."""

    def __init__(self, recording: Recording, config: ConvertConfig, embodiment: Embodiment):
        """Raises OptionError for options that make no sense, SampleError for topics that are not there."""
        if config.time.on_gap not in ON_GAP:
            raise OptionError(f"--time.on_gap={config.time.on_gap}: expected one of {', '.join(ON_GAP)}")
        self._recording, self._config = recording, config
        self._embodiment = at_fps(embodiment, config.fps)
        self.layout = Layout.of(config, embodiment)
        self.account = BagAccount(recording.bag.name, self.layout.fps)
        types = {name: info.msgtype for name, info in recording.topics.items() if info.count}
        self._feeds = Feeds(types, config.time, self.account)
        self._observations = Observations(config, self._embodiment, self._feeds)
        self._actions = Actions(config, self._embodiment, self._feeds, self._observations)
        self._tasks = Tasks(config, self._embodiment, self._feeds)
        self._check_topics()
        self._plan = Plan([])
        self._ticks: Ticks | None = None
        self._k = 0  # the next tick
        self._takes = Takes(config, self._embodiment, self.account, self._spreads)
        self._reasons: Counter[str] = Counter()

    def events(self) -> Iterator[Row | EpisodeEnd]:
        """The rows in order, and the end of each episode behind its last row.

        Raises SampleError, EpisodeError, TimeError, VectorError, CommandError, MessageError, BagError (all of them
        ValueErrors) for what refuses the whole bag, and OptionError for options that do not fit it.
        """
        recording, account = self._recording, self.account
        account.start_ns = recording.start_ns
        account.seconds = (recording.end_ns - recording.start_ns) / 1e9
        try:
            self._plan = plan_episodes(recording, self._config, self._embodiment)
            account.idle_trimmed = self._plan.trimmed
            now_ns = recording.start_ns
            for message in recording.messages(self._feeds.topics):
                now_ns = message.receive_ns
                yield from self._until(now_ns)
                self._take(message)
            yield from self._until(now_ns + 1)
            yield from self._takes.end()
            self._finish(now_ns)
        finally:
            self._feeds.finish()
            account.notes = list(dict.fromkeys([*recording.notes, *self._plan.notes, *self._notes()]))

    def _check_topics(self) -> None:
        self._feeds.check_stamps()
        if missing := self._feeds.missing:
            there = ", ".join(sorted(name for name, info in self._recording.topics.items() if info.count))
            hint = self._tasks.hint if self._embodiment.instruction_topic in missing else ""
            raise SampleError(f"no message on {', '.join(missing)}; topics with messages: {there or 'none'}{hint}")
        expected = {camera.topic: _IMAGE_TYPES[camera.transport] for camera in self._embodiment.cameras}
        expected |= {camera.topic: _IMAGE_TYPES[camera.transport] for camera in self._config.depth.values()}
        expected[self._embodiment.state.topic] = "sensor_msgs/msg/JointState"
        for topic, kind in expected.items():
            if (found := self._feeds.msgtype(topic)) != kind:
                raise SampleError(f"{topic}: it carries {found}, but the embodiment or the options say {kind}")

    def _spreads(self) -> dict[str, Spread]:
        return {name: Spread() for name in [*self._observations.clocks, *self._actions.streams]}

    def _take(self, message: BagMessage) -> None:
        jump = self._feeds.take(message)
        if jump is not None:
            self._takes.fall_silent(jump)
        if self._ticks is None:
            self._warm_up(message.receive_ns)

    def _warm_up(self, now_ns: int) -> None:
        """Begin the grid once every stream is there; until then keep no more than the first tick can need."""
        first = self._feeds.first_tick()
        if first is None:
            self._feeds.forget(now_ns - round((self._config.time.max_skew + 1) * 1e9))
            return
        t0_ns, last = first
        self._ticks = Ticks(t0_ns, self.layout.fps)
        self.account.warm_up = (t0_ns - self.account.start_ns) / 1e9
        self.account.warm_up_stream = last.account.name

    def _until(self, now_ns: int) -> Iterator[Row | EpisodeEnd]:
        """The ticks that can be made of what was received before now_ns, with the instant of their action."""
        ticks = self._ticks
        while ticks is not None and ticks.at(self._k + 1) < now_ns:
            t_ns, action_ns = ticks.at(self._k), ticks.at(self._k + 1)
            place = self._plan.at(t_ns)
            if place is None:
                yield from self._takes.leave(t_ns)
                self._skip_to(min(self._plan.next_start(t_ns), now_ns - (action_ns - t_ns)))
                continue
            number, span = place
            row = self._row(span, t_ns, action_ns, now_ns)
            if row is None:
                return
            if isinstance(row, Silence):
                self._reasons[f"{row.stream}: {row.reason}"] += 1
                self._takes.fall_silent(row)
                self._skip_to(row.end_ns)
                continue
            yield from self._takes.give(row, number)
            self._k += 1
            self._forget(t_ns)

    def _skip_to(self, t_ns: int) -> None:
        assert self._ticks is not None
        self._k = max(self._k + 1, self._ticks.first_from(t_ns))
        self._forget(self._ticks.at(self._k - 1))

    def _forget(self, t_ns: int) -> None:
        self._feeds.forget(t_ns)
        self._tasks.forget(t_ns)

    def _row(self, span: Span, t_ns: int, action_ns: int, now_ns: int) -> Row | Silence | None:
        """The row of a tick; why there is none; None if that is not known yet."""
        assert self._ticks is not None
        verdicts = self._observations.judge(t_ns, now_ns, self._ticks)
        verdicts += self._actions.judge(action_ns, now_ns, self._ticks)
        verdict = judge_all(verdicts)
        if isinstance(verdict, Silence):
            return verdict
        if not verdict:
            return None
        frame = self._observations.frame(t_ns)
        if isinstance(frame, Silence):
            return frame
        try:
            action = self._actions.at(action_ns, frame["observation.state"])
        except ObservationError as error:
            return Silence(t_ns, t_ns + 1, self._actions.streams[0], "stale", str(error))
        ages = self._observations.ages(t_ns) | self._actions.ages(action_ns)
        return Row(t_ns, span.task or self._tasks.at(t_ns), frame, action, ages)

    def _finish(self, now_ns: int) -> None:
        """What is to say of the end, once every message was seen."""
        account, takes = self.account, self._takes
        if takes.last_ns is None:
            raise SampleError(self._no_rows(now_ns))
        if takes.hole is not None and takes.hole.kind != "stale":
            takes.close_hole(now_ns)
        account.trimmed_stream, end_ns = self._observations.first_end()
        account.trimmed = max(0, now_ns - end_ns) / 1e9
        if not any(episode.left_out is None for episode in account.episodes):
            reasons = Counter(str(episode.left_out) for episode in account.episodes)
            reason, count = reasons.most_common(1)[0]
            raise SampleError(f"no episode can be kept: {reason} ({count} of {len(account.episodes)} episodes)")

    def _no_rows(self, now_ns: int) -> str:
        if self._ticks is None:
            names = ", ".join(
                f"{stream.name} ({stream.topic}, {stream.count} messages)" for stream in self._feeds.awaited
            )
            notes = "".join(f"; {note}" for note in self._notes())
            return f"no row can be made: there is nothing to be used of {names}{notes}"
        if self._reasons:
            (reason, _), *_ = self._reasons.most_common(1)
            return f"no row can be made; most often: {reason}"
        end = (now_ns - self.account.start_ns) / 1e9
        return (
            f"no row can be made: the last stream ({self.account.warm_up_stream}) begins {self.account.warm_up:.3f} s "
            f"into the bag, which ends at {end:.3f} s: it is too short, or no episode lies there"
        )

    def _notes(self) -> list[str]:
        early = [
            f"{count} commands on {topic} came before the first joint state and cannot be followed: where the arm set "
            "out from is not known"
            for topic, count in self._feeds.unused.items()
        ]
        return [*self._tasks.notes, *early]
