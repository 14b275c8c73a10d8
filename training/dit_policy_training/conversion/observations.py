"""A row's observation: the pictures and the state vector, each part by the rule that the options give it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dit_policy_ros.embodiment import STATE, Embodiment
from dit_policy_ros.runtime.messages import DamagedError, decode_joints
from dit_policy_ros.runtime.streams import ObservationError
from dit_policy_training.conversion.feeds import Feeds
from dit_policy_training.conversion.layout import image_key
from dit_policy_training.conversion.message import BagError, BagMessage
from dit_policy_training.conversion.options import ConvertConfig, OptionError, Source
from dit_policy_training.conversion.streams import Track, check_skew, depth_track, samplings_of, view_of
from dit_policy_training.conversion.times import Silence, StreamClock, Ticks
from dit_policy_training.conversion.vectors import joint_numbers, numbers_of

_KINDS = {"INPUT_SKEWED": "skew", "INPUT_STALE": "stale", "INPUT_MISSING": "stale"}


class Observations:
    """What was observed at an instant."""

    def __init__(self, config: ConvertConfig, embodiment: Embodiment, feeds: Feeds):
        """Raises OptionError for options that make no sense, VectorError for sources that the bag's types have not."""
        self._config, self._embodiment, self._feeds = config, embodiment, feeds
        self.samplings = samplings_of(embodiment, config.depth, config.time)
        names = [camera.name for camera in embodiment.cameras]
        rules = {name: self.samplings[name] for name in [*names, STATE]}
        self._view = view_of(embodiment, rules, config.time.max_skew)
        feeds.remember(self._view)
        self.clocks: dict[str, StreamClock] = {}
        self._cameras: dict[str, StreamClock] = {}
        self._depths: dict[str, Track] = {}
        self._more_state: list[Track] = []
        self.latest_joints: BagMessage | None = None  # as received
        self.next_state: Track | None = None  # the action joints' positions, where the action is made of them
        for camera in embodiment.cameras:
            clock = feeds.clock(camera.name, camera.topic, "camera", rules[camera.name], camera.max_age)
            self._cameras[camera.name] = self._watch(clock, self._view.sink(camera.topic))
        for name, depth in config.depth.items():
            track = self._depths[name] = depth_track(name, depth, self.samplings[name])
            feeds.remember(track)
            self._watch(feeds.clock(name, depth.topic, "depth", self.samplings[name], depth.max_age), track.add)
        self._watch_state()
        for number, source in enumerate(config.vectors.state):
            self._watch_source(source, f"state {number}: {source.topic}")

    def _watch(self, clock: StreamClock, *sinks: Callable[[int, BagMessage], None]) -> StreamClock:
        self.clocks[clock.account.name] = clock
        self._feeds.connect(clock, *sinks)
        return clock

    def _watch_state(self) -> None:
        state, fields = self._embodiment.state, self._config.vectors.state_fields
        if fields[0] != "position":
            raise OptionError(f"--vectors.state_fields={fields}: position comes first")
        clock = self._feeds.clock(STATE, state.topic, "state", self.samplings[STATE], state.max_age)
        sinks = [self._view.sink(state.topic), self._remember_joints]
        for field in fields[1:]:
            decode = partial(joint_numbers, fields=(field,), joints=state.joints, topic=state.topic)
            sinks.append(self._add_to_state(f"{STATE}.{field}", state.topic, self.samplings[STATE], decode).add)
        if self._config.vectors.action_from == "next_state":
            joints = self._embodiment.action_joints
            decode_next = partial(decode_joints, joints=joints, topic=state.topic)
            self.next_state = Track("next_state", state.topic, self.samplings[STATE], decode_next)
            self._feeds.remember(self.next_state)
            sinks.append(self.next_state.add)
        self._watch(clock, *sinks)

    def _watch_source(self, source: Source, name: str) -> None:
        clock = self._feeds.clock(name, source.topic, "state", source.sampling, source.max_age, source.stamp)
        msgtype = self._feeds.msgtype(source.topic)
        if msgtype is None:
            self._watch(clock)  # told with all the others that are missing
        else:
            track = self._add_to_state(name, source.topic, source.sampling, numbers_of(source, msgtype))
            self._watch(clock, track.add)

    def _add_to_state(self, name: str, topic: str, sampling: str, decode: Callable[[Any], np.ndarray]) -> Track:
        track = Track(name, topic, sampling, lambda message: decode(message).astype(np.float32))
        self._more_state.append(track)
        self._feeds.remember(track)
        return track

    def _remember_joints(self, stamp_ns: int, message: BagMessage) -> None:
        self.latest_joints = message

    def judge(self, t_ns: int, now_ns: int, ticks: Ticks) -> list[Silence | bool]:
        """Of each stream whether it is known at t_ns, see StreamClock.judge."""
        return [clock.judge(t_ns, now_ns, ticks) for clock in self.clocks.values()]

    def frame(self, t_ns: int) -> dict[str, np.ndarray] | Silence:
        """Pictures and state of an instant at which every stream is known; or why that instant alone has none."""
        try:
            if any(clock.account.sampling != "as_of" for clock in self.clocks.values()):
                chosen = {name: clock.chosen(t_ns) for name, clock in self._cameras.items()}
                check_skew(chosen, self._embodiment.max_camera_skew)
            frame = self._view.frame(t_ns)
            frame |= {image_key(name): track.at(t_ns) for name, track in self._depths.items()}
            state = [frame["observation.state"], *(track.at(t_ns) for track in self._more_state)]
        except ObservationError as error:
            return self._moment(t_ns, _KINDS.get(error.code, "stale"), str(error))
        except (DamagedError, BagError) as error:
            return self._moment(t_ns, "damaged", str(error))
        if len(state) > 1:
            frame["observation.state"] = np.concatenate(state)
        return frame

    def ages(self, t_ns: int) -> dict[str, float]:
        """How far from t_ns the messages are, s, by stream; notes in the account that a row is made of them."""
        return {name: clock.use(t_ns) for name, clock in self.clocks.items()}

    def first_end(self) -> tuple[str, int]:
        """The stream that ended first, and its latest stamp."""
        ends = {name: clock.last_ns or 0 for name, clock in self.clocks.items()}
        name = min(ends, key=ends.__getitem__)
        return name, ends[name]

    def _moment(self, t_ns: int, kind: str, reason: str) -> Silence:
        named = [name for name, clock in self.clocks.items() if clock.account.topic in reason]
        return Silence(t_ns, t_ns + 1, named[0] if named else "cameras", kind, reason)
