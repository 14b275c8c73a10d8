"""A row's action: what the arm was commanded for one frame later, or where it then was.

A tick's action is of the instant 1/fps after it: the reference that a joint_trajectory_controller follows then, the
command that a position controller holds then, or the joints measured then.
"""

from functools import partial
from typing import Any, Protocol

import numpy as np

from dit_policy_ros.embodiment import STATE, ActionGroup, Embodiment
from dit_policy_training.conversion.commands import FollowedTrajectory
from dit_policy_training.conversion.feeds import Feeds
from dit_policy_training.conversion.layout import command_topic, source_names
from dit_policy_training.conversion.message import BagMessage
from dit_policy_training.conversion.observations import Observations
from dit_policy_training.conversion.options import ConvertConfig, OptionError, Source
from dit_policy_training.conversion.streams import Track
from dit_policy_training.conversion.times import Silence, StreamClock, Ticks, stamp_choice
from dit_policy_training.conversion.vectors import VectorError, numbers_of

TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"


class Part(Protocol):
    """Some elements of the action over time."""

    def at(self, t_ns: int) -> np.ndarray:
        """Their values at t_ns."""
        ...


class Actions:
    """What was commanded at an instant."""

    def __init__(self, config: ConvertConfig, embodiment: Embodiment, feeds: Feeds, observations: Observations):
        """Raises OptionError for options that make no sense, VectorError for sources that the bag's types have not."""
        self._config, self._embodiment, self._feeds, self._observations = config, embodiment, feeds, observations
        self._lead_ns = round(1e9 / embodiment.fps)
        self._parts: list[Part] = []
        self._clocks: dict[str, StreamClock] = {}
        vectors = config.vectors
        if observations.next_state is not None:
            self._parts.append(observations.next_state)
        for number, source in enumerate(vectors.action):
            self._take_source(source, f"action {number}: {source.topic}")
        if vectors.action_from == "commands" and not vectors.action:
            for group in embodiment.action_groups:
                self._take_group(group)
        self._measured: list[int] | None = None  # where in the state the joints stand to which the action is relative
        if vectors.action_mode == "relative":
            names = source_names(vectors.action) if vectors.action else embodiment.action_joints
            self._measured = [embodiment.state.joints.index(name) for name in names]

    @property
    def streams(self) -> list[str]:
        """The names of the streams."""
        return list(self._clocks)

    def judge(self, t_ns: int, now_ns: int, ticks: Ticks) -> list[Silence | bool]:
        """Of each stream whether it is known at t_ns, see StreamClock.judge."""
        clocks = [clock for clock in self._clocks.values() if clock.account.sampling != "trajectory"]
        if self._observations.next_state is not None:
            clocks.append(self._observations.clocks[STATE])
        return [clock.judge(t_ns, now_ns, ticks) for clock in clocks]

    def at(self, t_ns: int, state: np.ndarray) -> np.ndarray:
        """The action (A,) float32 of instant t_ns; `state` is the row's own, to which it may be relative.

        Raises CommandError for a command that is not finite, ObservationError for one that cannot be followed just now,
        and what decoding raises.
        """
        action = np.concatenate([part.at(t_ns) for part in self._parts]).astype(np.float64)
        if self._measured is not None:
            action -= state[self._measured]
        return action.astype(np.float32)

    def ages(self, t_ns: int) -> dict[str, float]:
        """How old the latest commands are at t_ns, s, by stream; notes in the account that a row is made of them."""
        if self._observations.next_state is not None:
            self._observations.clocks[STATE].look(t_ns)
        return {name: clock.use(t_ns) for name, clock in self._clocks.items()}

    def _take_source(self, source: Source, name: str) -> None:
        msgtype = self._feeds.msgtype(source.topic)
        if msgtype == TRAJECTORY:
            if source.fields not in ([], ["position"]) or not source.joints:
                raise OptionError(
                    f"--vectors.action: {source.topic} carries trajectories, of which the positions of `joints` are "
                    "followed; name these, and no other fields"
                )
            self._follow(name, source.topic, source.joints, "--vectors.action")
            return
        clock = self._feeds.clock(name, source.topic, "action", source.sampling, source.max_age, source.stamp)
        self._take(clock, source, msgtype, measured=True)

    def _take_group(self, group: ActionGroup) -> None:
        topic, name = command_topic(group.topic, group.interface), f"action {group.name}"
        msgtype = self._feeds.msgtype(topic)
        if group.interface == "trajectory":
            if msgtype not in (None, TRAJECTORY):
                raise VectorError(f"{topic}: it carries {msgtype}, but the embodiment says interface: trajectory")
            self._follow(name, topic, list(group.joints), f"the embodiment's action group {group.name}")
            return
        # A controller holds what it was told last, so a command does not grow too old.
        clock = self._feeds.clock(name, topic, "action", "as_of", None, "receive")
        self._take(clock, Source(topic, joints=list(group.joints)), msgtype, measured=False)

    def _take(self, clock: StreamClock, source: Source, msgtype: str | None, measured: bool) -> None:
        self._clocks[clock.account.name] = clock
        if msgtype is None:
            self._feeds.connect(clock)  # told with all the others that are missing
            return
        track = Track(clock.account.name, source.topic, clock.account.sampling, numbers_of(source, msgtype), told=True)
        self._feeds.remember(track, measured)
        self._parts.append(track)
        self._feeds.connect(clock, track.add, measured=measured, lead_ns=self._lead_ns)

    def _follow(self, name: str, topic: str, joints: list[str], named_by: str) -> None:
        by_receive = stamp_choice(self._config.time, topic) == "receive"
        state, options = self._embodiment.state, self._config.controller
        followed = FollowedTrajectory(topic, joints, state, options, by_receive, named_by)
        clock = self._feeds.clock(name, topic, "action", "trajectory", None, "receive")
        self._clocks[name] = clock
        self._parts.append(followed)
        self._feeds.remember(followed, measured=False)
        # The tick before has an action: the position when the command came. Where the arm set out from must be known.
        self._feeds.connect(
            clock,
            partial(self._add_command, followed),
            measured=False,
            lead_ns=self._lead_ns,
            wanted=lambda: self._observations.latest_joints is not None,
        )

    def _add_command(self, followed: FollowedTrajectory, stamp_ns: int, message: BagMessage) -> None:
        joints: Any = self._observations.latest_joints
        followed.add(stamp_ns, message, joints)
