"""One bag to rows: ticks on an integer grid, each with what the robot saw, was told, and was commanded.

Observations are what the policy node would have sampled at that instant, since they come from its own buffer, fed in
receive order (see conversion.streams). Ticks run from the moment when every stream exists to the end of the shortest.
A tick is made when no later message can change it, and what no later tick needs is forgotten at once, so memory does
not grow with the bag. Where a stream is silent for longer than it may be, no rows are made (see conversion.times).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from dit_policy_ros.embodiment import STATE, ActionGroup, Embodiment
from dit_policy_ros.runtime.messages import DamagedError, decode_joints
from dit_policy_ros.runtime.streams import ObservationError
from dit_policy_training.conversion.account import BagAccount, EpisodeAccount, GapAccount, Spread, StreamAccount
from dit_policy_training.conversion.commands import FollowedTrajectory
from dit_policy_training.conversion.episodes import Plan, Span, plan_episodes
from dit_policy_training.conversion.idle import Movement
from dit_policy_training.conversion.layout import Layout, at_fps, command_topic, image_key
from dit_policy_training.conversion.options import ON_GAP, ConvertConfig, OptionError, Source
from dit_policy_training.conversion.recording import BagError, BagMessage, Recording
from dit_policy_training.conversion.streams import (
    Track,
    check_skew,
    depth_track,
    samplings_of,
    view_of,
)
from dit_policy_training.conversion.times import Silence, StreamClock, Ticks, judge_all, stamp_choice
from dit_policy_training.conversion.vectors import joint_numbers, numbers_of

INSTRUCTION = "instruction"
MIN_FRAMES = 2  # LeRobot keeps no statistics of the videos of a single frame
_IMAGE_TYPES = {"raw": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}
_TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
_NO_ROW = {"INPUT_SKEWED": "skew", "INPUT_STALE": "stale", "INPUT_MISSING": "stale"}


class SampleError(ValueError):
    """A recording that makes no sound rows; the message says what was found, where, and what to do."""


@dataclass(frozen=True)
class Row:
    """One tick.

    frame: {"observation.images.<camera>": (H, W, 3) uint8 RGB, or (H, W) float32 m of a depth camera,
    "observation.state": (S,) float32}, arrays that may be shared and must not be written to; action (A,) float32;
    ages: s from the message used to the tick, by stream.
    """

    stamp_ns: int
    task: str
    frame: dict[str, np.ndarray]
    action: np.ndarray
    ages: dict[str, float]


@dataclass(frozen=True)
class EpisodeEnd:
    """The rows since the last one are an episode; `reason`: why it is left out, None to keep it."""

    reason: str | None


class Feed(NamedTuple):
    """One use of a topic: the clock that says when a message was, and what takes it."""

    clock: StreamClock
    sinks: tuple[Callable[[int, BagMessage], None], ...]
    observed: bool
    needs_joints: bool = False  # where the arm is, as a command to follow does


class Part(Protocol):
    """Some elements of the action vector over time."""

    def at(self, t_ns: int) -> np.ndarray:
        """Their values at t_ns."""
        ...

    def forget(self, t_ns: int) -> None:
        """Forget what no instant from t_ns on needs."""
        ...


class Sampler:
    """The rows of one recording, episode by episode; `account` says what was found, as far as it got."""

    def __init__(self, recording: Recording, config: ConvertConfig, embodiment: Embodiment):
        """Raises OptionError for options that make no sense, SampleError for topics that are not there."""
        if config.time.on_gap not in ON_GAP:
            raise OptionError(f"--time.on_gap={config.time.on_gap}: expected one of {', '.join(ON_GAP)}")
        self._recording, self._config = recording, config
        self._embodiment = embodiment = at_fps(embodiment, config.fps)
        self.layout = Layout.of(config, embodiment)
        self.account = BagAccount(recording.bag.name, embodiment.fps)
        self._types = {name.lstrip("/"): info.msgtype for name, info in recording.topics.items() if info.count}
        self._period_ns = round(1e9 / embodiment.fps)
        self._by_hand = config.episodes.task.strip()
        self._feeds: dict[str, list[Feed]] = {}
        self._ready: list[tuple[StreamClock, int]] = []  # what a bag must have, and so much before it the first tick is
        self._build()
        self._plan = Plan([])
        self._ticks: Ticks | None = None
        self._k = 0
        self._done_ns = -1
        self._tasks: list[tuple[int, str]] = []
        self._early_commands: Counter[str] = Counter()
        self._hole: Silence | None = None
        self._episode: _Episode | None = None
        self._run: tuple[int, str] = (0, "")  # of equal instructions, where these make episodes
        self._dropped: tuple[int, int] | None = None
        self._reasons: Counter[str] = Counter()
        self._rows = 0
        self._last_row_ns: int | None = None

    def events(self) -> Iterator[Row | EpisodeEnd]:
        """The rows in order, and the end of each episode behind its last row.

        Raises SampleError, EpisodeError, TimeError, VectorError, CommandError, MessageError (all of them ValueErrors)
        and BagError for what refuses the whole bag, and OptionError for options that do not fit it.
        """
        recording, account = self._recording, self.account
        account.start_ns = recording.start_ns
        account.seconds = (recording.end_ns - recording.start_ns) / 1e9
        try:
            self._plan = plan_episodes(recording, self._config, self._embodiment)
            account.idle_trimmed = self._plan.trimmed
            now_ns = recording.start_ns
            for message in recording.messages(self._topics()):
                now_ns = message.receive_ns
                yield from self._until(now_ns)
                self._take(message)
            yield from self._until(now_ns + 1)
            yield from self._end_episode("")
            self._finish(now_ns)
        finally:
            self._close_account()

    # What is read, and where it goes.

    def _build(self) -> None:
        config, embodiment = self._config, self._embodiment
        samplings = samplings_of(embodiment, config.depth, config.time)
        names = [camera.name for camera in embodiment.cameras]
        self._view = view_of(embodiment, {name: samplings[name] for name in [*names, STATE]}, config.time.max_skew)
        self._cameras: dict[str, StreamClock] = {}
        self._observed: dict[str, StreamClock] = {}
        self._tracks: list[Track] = []
        self._state_parts: list[Track] = []
        self._depths: dict[str, Track] = {}
        self._actions: dict[str, StreamClock] = {}
        self._parts: list[Part] = []
        self._joint_state: BagMessage | None = None
        self._next_state: Track | None = None
        for camera in embodiment.cameras:
            clock = self._clock(camera.name, camera.topic, "camera", samplings[camera.name], camera.max_age)
            self._cameras[camera.name] = clock
            self._observe(clock, self._view.sink(camera.topic))
        for name, depth in config.depth.items():
            track = depth_track(name, depth, samplings[name])
            self._depths[name] = track
            self._tracks.append(track)
            self._observe(self._clock(name, depth.topic, "depth", samplings[name], depth.max_age), track.add)
        self._build_state(samplings[STATE])
        for number, source in enumerate(config.vectors.state):
            self._build_source(source, f"state {number}: {source.topic}", "state")
        self._build_actions(samplings[STATE])
        self._build_instruction()
        missing = [topic for topic in self._feeds if topic not in self._types]
        if missing:
            raise SampleError(self._missing(missing))
        self._check_types()

    def _check_types(self) -> None:
        expected = {topic: kind for topic, kind in self._embodiment.topics.items() if "MultiArray" not in kind}
        expected |= {camera.topic: _IMAGE_TYPES[camera.transport] for camera in self._config.depth.values()}
        for topic, kind in expected.items():
            found = self._types.get(topic.lstrip("/"))
            if topic.lstrip("/") in self._feeds and found != kind:
                raise SampleError(f"{topic} carries {found}, but the embodiment and the options expect {kind} there")

    def _build_state(self, sampling: str) -> None:
        state, fields = self._embodiment.state, self._config.vectors.state_fields
        clock = self._clock(STATE, state.topic, "state", sampling, state.max_age)
        sinks = [self._view.sink(state.topic), self._remember_joints]
        others = [field for field in fields if field != "position"]
        if fields[0] != "position":
            raise OptionError(f"--vectors.state_fields={fields}: position comes first")
        for field in others:
            decode = partial(joint_numbers, fields=(field,), joints=state.joints, topic=state.topic)
            track = Track(f"{STATE}.{field}", state.topic, sampling, _float32(decode))
            self._tracks.append(track)
            self._state_parts.append(track)
            sinks.append(track.add)
        if self._config.vectors.action_from == "next_state":
            joints = self._embodiment.action_joints
            decode = partial(decode_joints, joints=joints, topic=state.topic)
            self._next_state = Track("next_state", state.topic, sampling, decode)
            self._tracks.append(self._next_state)
            self._parts.append(self._next_state)
            sinks.append(self._next_state.add)
        self._observe(clock, *sinks)

    def _build_source(self, source: Source, name: str, kind: str) -> None:
        clock = self._clock(name, source.topic, kind, source.sampling, source.max_age, source.stamp)
        msgtype = self._types.get(source.topic.lstrip("/"))
        if msgtype is None:
            self._feed(clock, (), True, 0)  # told below, with all the others that are missing
            return
        decode = numbers_of(source, msgtype)
        track = Track(name, source.topic, source.sampling, _float32(decode) if kind == "state" else decode)
        self._tracks.append(track)
        if kind == "state":
            self._state_parts.append(track)
            self._observe(clock, track.add)
        else:
            self._parts.append(track)
            self._actions[name] = clock
            self._feed(clock, (track.add,), True, self._period_ns)

    def _build_actions(self, state_sampling: str) -> None:
        vectors = self._config.vectors
        if vectors.action_from == "next_state":
            return
        for number, source in enumerate(vectors.action):
            if self._types.get(source.topic.lstrip("/")) == _TRAJECTORY:
                if source.fields not in ([], ["position"]) or not source.joints:
                    raise OptionError(
                        f"--vectors.action: {source.topic} carries trajectories, of which the positions of `joints` "
                        "are followed; name these, and no other fields"
                    )
                self._follow(source.topic, source.topic, source.joints)
            else:
                self._build_source(source, f"action {number}: {source.topic}", "action")
        if not vectors.action:
            for group in self._embodiment.action_groups:
                self._build_group(group)

    def _build_group(self, group: ActionGroup) -> None:
        if group.interface == "trajectory":
            self._follow(group.name, group.topic, list(group.joints))
            return
        topic = command_topic(group.topic, group.interface)
        msgtype = self._types.get(topic.lstrip("/"))
        source = Source(topic, joints=list(group.joints))
        # A controller holds what it was told last, so a command does not grow too old.
        clock = self._clock(f"action {group.name}", topic, "action", "as_of", None, "receive")
        if msgtype is None:
            self._feed(clock, (), False, 0)
            return
        track = Track(group.name, topic, "as_of", numbers_of(source, msgtype))
        self._parts.append(track)
        self._actions[clock.account.name] = clock
        self._feed(clock, (track.add,), False, self._period_ns)

    def _follow(self, name: str, topic: str, joints: list[str]) -> None:
        by_receive = stamp_choice(self._config.time, topic) == "receive"
        state_topic = self._embodiment.state.topic
        followed = FollowedTrajectory(topic, joints, state_topic, self._config.controller, by_receive)
        clock = self._clock(f"action {name}", topic, "action", "trajectory", None, "receive")
        self._parts.append(followed)
        self._actions[clock.account.name] = clock
        # The tick before has an action: the position when the command came.
        self._feed(clock, (partial(self._add_command, followed),), False, self._period_ns, needs_joints=True)

    def _build_instruction(self) -> None:
        topic = self._embodiment.instruction_topic
        options = self._config.episodes
        there = topic.lstrip("/") in self._types
        has_tasks = options.by == "annotations"
        if has_tasks or (self._by_hand and not there and options.by != "instruction"):
            return
        if options.by == "service" and not there:
            return  # the calls may tell the tasks; if not, the first row says that one is missing
        if there and self._by_hand:
            self.account.notes.append(
                f"its own instructions on {topic} are used, not --episodes.task, which is for bags without any"
            )
        clock = self._clock(INSTRUCTION, topic, "task", "as_of", None, "receive")
        self._feed(clock, (self._add_instruction,), False, 0)

    def _clock(
        self, name: str, topic: str, kind: str, sampling: str, max_age: float | None, stamp: str = ""
    ) -> StreamClock:
        choice = stamp or stamp_choice(self._config.time, topic)
        account = StreamAccount(name, topic, kind, choice, sampling, max_age)
        self.account.streams.append(account)
        return StreamClock(account, self._config.time.max_skew)

    def _observe(self, clock: StreamClock, *sinks: Callable[[int, BagMessage], None]) -> None:
        self._observed[clock.account.name] = clock
        self._feed(clock, sinks, True, 0)

    def _feed(
        self,
        clock: StreamClock,
        sinks: tuple[Callable[[int, BagMessage], None], ...],
        observed: bool,
        before_ns: int,
        needs_joints: bool = False,
    ) -> None:
        """`before_ns`: the first tick is so much before the stream's first message."""
        feed = Feed(clock, sinks, observed, needs_joints)
        self._feeds.setdefault(clock.account.topic.lstrip("/"), []).append(feed)
        self._ready.append((clock, before_ns))

    def _topics(self) -> list[str]:
        return [feeds[0].clock.account.topic for feeds in self._feeds.values()]

    def _missing(self, topics: list[str]) -> str:
        there = ", ".join(f"/{name}" for name in sorted(self._types)) or "none at all"
        by_hand = ""
        if self._embodiment.instruction_topic.lstrip("/") in topics:
            by_hand = ". For a bag without instructions give its task by hand: --episodes.task='what it does'"
        return f"no message on {', '.join(topics)}; topics with messages: {there}{by_hand}"

    # Messages, as they were received.

    def _take(self, message: BagMessage) -> None:
        for feed in self._feeds[message.topic.lstrip("/")]:
            clock = feed.clock
            if feed.needs_joints and self._joint_state is None:
                self._early_commands[message.topic] += 1
                continue
            stamp_ns = clock.stamp(message)
            if stamp_ns is None:
                continue
            if feed.observed and clock.jumped(stamp_ns, message.receive_ns):
                self._start_afresh(clock, message)
            if feed.clock.add(stamp_ns, message.receive_ns, self._done_ns):
                for sink in feed.sinks:
                    sink(stamp_ns, message)
        if self._ticks is None:
            self._warm_up(message.receive_ns)

    def _remember_joints(self, stamp_ns: int, message: BagMessage) -> None:
        self._joint_state = message

    def _add_command(self, followed: FollowedTrajectory, stamp_ns: int, message: BagMessage) -> None:
        assert self._joint_state is not None
        followed.add(stamp_ns, message, self._joint_state)

    def _add_instruction(self, stamp_ns: int, message: BagMessage) -> None:
        task = str(message.data).strip()
        if not task:
            raise SampleError(f"the instruction on {message.topic} at {_seconds(stamp_ns)} is empty")
        self._tasks.append((stamp_ns, task))

    def _start_afresh(self, clock: StreamClock, message: BagMessage) -> None:
        clock.account.clock_jumps += 1
        newest_ns = clock.newest_ns or message.receive_ns
        reason = (
            f"the header stamps of {clock.account.topic} jumped to {_seconds(message.stamp_ns or 0)} behind "
            f"{_seconds(newest_ns)}, received at {_seconds(message.receive_ns)}"
        )
        self._view.clear()
        for track in self._tracks:
            track.clear()
        for feeds in self._feeds.values():
            for feed in feeds:
                if feed.observed:
                    feed.clock.start_afresh()
        self._fall_silent(Silence(newest_ns, newest_ns, clock.account.name, "clock", reason))

    def _warm_up(self, now_ns: int) -> None:
        """Begin the grid once every stream is there; until then keep no more than the first tick can need."""
        if any(clock.first_ns is None for clock, _ in self._ready):
            self._forget(now_ns - round((self._config.time.max_skew + 1) * 1e9))
            return
        begins = [
            (first - before_ns, clock) for clock, before_ns in self._ready if (first := clock.first_ns) is not None
        ]
        t0_ns, last = max(begins, key=lambda begin: begin[0])
        self._ticks = Ticks(t0_ns, self._embodiment.fps)
        self.account.warm_up = (t0_ns - self.account.start_ns) / 1e9
        self.account.warm_up_stream = last.account.name

    # Ticks.

    def _until(self, now_ns: int) -> Iterator[Row | EpisodeEnd]:
        """The ticks that no message received from now_ns on can change, nor the instant of their action."""
        ticks = self._ticks
        while ticks is not None and ticks.at(self._k + 1) < now_ns:
            t_ns, action_ns = ticks.at(self._k), ticks.at(self._k + 1)
            place = self._plan.at(t_ns)
            if place is None:
                yield from self._leave(t_ns)
                self._skip_to(min(self._plan.next_start(t_ns), now_ns - self._period_ns))
                continue
            verdict = self._judge(t_ns, action_ns, now_ns)
            if verdict is False:
                return
            row = verdict if isinstance(verdict, Silence) else self._row(place[1], t_ns, action_ns)
            if isinstance(row, Silence):
                self._fall_silent(row)
                self._skip_to(row.end_ns)
                continue
            yield from self._give(row, place[0])
            self._done_ns = t_ns
            self._k += 1
            self._forget(t_ns)

    def _leave(self, t_ns: int) -> Iterator[EpisodeEnd]:
        """The span is over, and so is a hole at its end."""
        hole, self._hole = self._hole, None
        if hole is not None:
            self._note_gap(hole, t_ns)
        yield from self._end_episode("")

    def _skip_to(self, t_ns: int) -> None:
        assert self._ticks is not None
        self._k = max(self._k + 1, self._ticks.first_from(t_ns))
        self._forget(self._ticks.at(self._k - 1))

    def _judge(self, t_ns: int, action_ns: int, now_ns: int) -> Silence | bool:
        assert self._ticks is not None
        ticks = self._ticks
        verdicts = [clock.judge(t_ns, now_ns, ticks) for clock in self._observed.values()]
        verdicts += [
            clock.judge(action_ns, now_ns, ticks)
            for clock in self._actions.values()
            if clock.account.sampling != "trajectory"
        ]
        if self._next_state is not None:
            verdicts.append(self._observed[STATE].judge(action_ns, now_ns, ticks))
        return judge_all(verdicts)

    def _row(self, span: Span, t_ns: int, action_ns: int) -> Row | Silence:
        """The tick's row, or why there is none; it alone then is without one."""
        try:
            if any(clock.account.sampling != "as_of" for clock in self._cameras.values()):
                chosen = {name: clock.chosen(t_ns) for name, clock in self._cameras.items()}
                check_skew(chosen, self._embodiment.max_camera_skew)
            frame = self._view.frame(t_ns)
            frame |= {image_key(name): track.at(t_ns) for name, track in self._depths.items()}
            state = [frame["observation.state"], *(part.at(t_ns) for part in self._state_parts)]
        except ObservationError as error:
            return self._moment(t_ns, _NO_ROW.get(error.code, "stale"), error)
        except (DamagedError, BagError) as error:
            return self._moment(t_ns, "damaged", error)
        frame["observation.state"] = np.concatenate(state)
        action = np.concatenate([part.at(action_ns) for part in self._parts]).astype(np.float64)
        if self._config.vectors.action_mode == "relative":
            places = [self._embodiment.state.joints.index(name) for name in self.layout.action_names]
            action -= state[0][places]
        ages = {name: clock.use(t_ns) for name, clock in self._observed.items()}
        ages |= {name: clock.use(action_ns) for name, clock in self._actions.items()}
        return Row(t_ns, self._task(span, t_ns), frame, action.astype(np.float32), ages)

    def _moment(self, t_ns: int, kind: str, error: Exception) -> Silence:
        reason = str(error)
        named = [name for name, clock in self._observed.items() if clock.account.topic in reason]
        return Silence(t_ns, t_ns + 1, named[0] if named else "cameras", kind, reason)

    def _task(self, span: Span, t_ns: int) -> str:
        if span.task is not None:
            return span.task
        task = next((task for received_ns, task in reversed(self._tasks) if received_ns <= t_ns), self._by_hand)
        if not task:
            raise SampleError(
                f"no task at {_seconds(t_ns)}: there is no message on {self._embodiment.instruction_topic}; give the "
                "task by hand: --episodes.task='what it does'"
            )
        return task

    def _forget(self, t_ns: int) -> None:
        self._view.forget(t_ns)
        for track in self._tracks:
            track.forget(t_ns)
        for part in self._parts:
            part.forget(t_ns)
        for feeds in self._feeds.values():
            for feed in feeds:
                feed.clock.forget(t_ns)
        while len(self._tasks) > 1 and self._tasks[1][0] <= t_ns:
            self._tasks.pop(0)

    # Episodes and the holes between them.

    def _fall_silent(self, silence: Silence) -> None:
        self._reasons[f"{silence.stream}: {silence.reason}"] += 1
        if self._hole is None:
            self._hole = silence

    def _give(self, row: Row, span: int) -> Iterator[Row | EpisodeEnd]:
        """The row, and before it the end of the episode that it does not belong to."""
        if self._config.episodes.by == "instruction" and row.task != self._run[1]:
            self._run = (self._run[0] + 1, row.task)
        take = (span, self._run[0])
        hole, self._hole = self._hole, None
        if hole is not None:
            self._note_gap(hole, row.stamp_ns)
        same = self._episode is not None and self._episode.take == take
        if hole is not None and same:
            said = f"{hole.stream} at {_seconds(hole.start_ns)}: {hole.reason}"
            if self._config.time.on_gap == "refuse":
                raise SampleError(f"a gap in an episode (--time.on_gap=refuse): {said}")
            if self._config.time.on_gap == "drop":
                self._dropped = take
                yield from self._end_episode(f"a gap in it (--time.on_gap=drop): {said}")
        if self._episode is not None and (hole is not None or not same):
            yield from self._end_episode("")
        if self._dropped == take:
            return
        self._dropped = None
        if self._episode is None:
            self._episode = _Episode(take, row, self._embodiment, self._config, self._spreads())
        self._episode.add(row)
        self._rows += 1
        self._last_row_ns = row.stamp_ns
        yield row

    def _spreads(self) -> dict[str, Spread]:
        return {name: Spread() for name in [*self._observed, *self._actions]}

    def _note_gap(self, hole: Silence, end_ns: int) -> None:
        start, end = ((ns - self.account.start_ns) / 1e9 for ns in (hole.start_ns, end_ns))
        self.account.gaps.append(GapAccount(start, end, hole.stream, hole.kind, hole.reason))

    def _end_episode(self, reason: str) -> Iterator[EpisodeEnd]:
        episode, self._episode = self._episode, None
        if episode is None:
            return
        account = episode.account(self.account.start_ns, reason)
        self.account.episodes.append(account)
        yield EpisodeEnd(account.left_out)

    # The end.

    def _finish(self, now_ns: int) -> None:
        account = self.account
        if self._hole is not None and (self._hole.kind in ("damaged", "skew") or self._last_row_ns is None):
            self._note_gap(self._hole, now_ns)
        if self._last_row_ns is None:
            raise SampleError(self._no_rows(now_ns))
        account.trimmed = (now_ns - self._last_row_ns) / 1e9
        ends = {name: clock.newest_ns or 0 for name, clock in self._observed.items()}
        account.trimmed_stream = self._hole.stream if self._hole is not None else min(ends, key=ends.__getitem__)
        if not any(episode.left_out is None for episode in account.episodes):
            reasons = Counter(episode.left_out for episode in account.episodes)
            reason, count = reasons.most_common(1)[0]
            raise SampleError(f"no episode of it can be kept; {count} of {len(account.episodes)}: {reason}")

    def _no_rows(self, now_ns: int) -> str:
        if self._ticks is None:
            late = [clock.account for clock, _ in self._ready if clock.first_ns is None]
            names = ", ".join(f"{stream.name} ({stream.topic}, {stream.count} messages)" for stream in late)
            return f"no row can be made: nothing to be used of {names}{self._said_of_commands()}"
        if self._reasons:
            (reason, _), *_ = self._reasons.most_common(1)
            return f"no row can be made; most often: {reason}"
        return (
            f"no row can be made: the last stream ({self.account.warm_up_stream}) begins {self.account.warm_up:.3f} s "
            f"into the bag, which ends at {(now_ns - self.account.start_ns) / 1e9:.3f} s: it is too short, or no episode "
            "lies there"
        )

    def _said_of_commands(self) -> str:
        if not self._early_commands:
            return ""
        return " (commands before the first joint state cannot be followed: where they set out from is not known)"

    def _close_account(self) -> None:
        for feeds in self._feeds.values():
            for feed in feeds:
                feed.clock.finish()
        notes = [*self._recording.notes, *self._plan.notes, *self.account.notes]
        for topic, count in self._early_commands.items():
            notes.append(f"{count} commands on {topic} before the first joint state were not used")
        self.account.notes = list(dict.fromkeys(notes))


class _Episode:
    """What is to say of the episode that is being made."""

    def __init__(
        self,
        take: tuple[int, int],
        first: Row,
        embodiment: Embodiment,
        config: ConvertConfig,
        ages: Mapping[str, Spread],
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


def _float32(decode: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    return lambda message: decode(message).astype(np.float32)


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"
