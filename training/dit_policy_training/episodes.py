"""One bag to one episode: ticks on an integer grid, each with what the robot saw, was told, and was commanded.

Observations come from the runtime's ObservationBuffer, fed in receive order, so they are what the policy node
would have sampled at that instant. Ticks run from the moment when every stream exists to the end of the
shortest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.messages import stamp_ns
from dit_policy_ros.runtime.observations import ObservationBuffer
from dit_policy_training.bags import BagMessage
from dit_policy_training.commands import CommandedPositions, ControllerOptions

MAX_SKEW = 1.0  # s between a header stamp and the receive time


class EpisodeError(ValueError):
    """A recording that makes no sound episode; the message says what was found and when."""


@dataclass(frozen=True)
class Row:
    """One tick: frame {feature key: image (H, W, 3) uint8 or state (S,) float32}, action (A,) float32, rad."""

    stamp_ns: int
    task: str
    frame: dict[str, np.ndarray]
    action: np.ndarray


def topics_of(embodiment: Embodiment) -> list[str]:
    """The topics that an episode is made from."""
    return [
        *(camera.topic for camera in embodiment.cameras),
        embodiment.state.topic,
        *(group.topic for group in embodiment.action_groups),
        embodiment.instruction_topic,
    ]


def sample_rows(messages: Iterable[BagMessage], embodiment: Embodiment, controller: ControllerOptions) -> Iterator[Row]:
    """The rows of a bag's messages, given in receive order; only what a tick still needs is kept in memory.

    Tick k is at t0 + round(k * 1e9 / fps). Its action is the commanded position at the tick's time + 1/fps.
    Raises EpisodeError, and what the runtime raises for messages that are missing, stale or cannot be
    decoded.
    """
    sampler = _Sampler(embodiment, controller)
    for message in messages:
        yield from sampler.rows_until(message.receive_ns)
        sampler.add(message)
    yield from sampler.rows_until(sampler.now_ns + 1)
    sampler.check_end()


class _Sampler:
    def __init__(self, embodiment: Embodiment, controller: ControllerOptions):
        self._embodiment = embodiment
        self._streams = len(topics_of(embodiment))
        self._period_ns = 1e9 / embodiment.fps
        self._observations = ObservationBuffer(embodiment, n_obs_steps=1)
        self._commands = CommandedPositions(embodiment, controller)
        self._command_topics = {group.topic for group in embodiment.action_groups}
        self._joint_state: Any = None
        self._first_ns: dict[str, int] = {}
        self._tasks: list[tuple[int, str]] = []
        self._ticks = 0
        self.now_ns = 0

    def add(self, message: BagMessage) -> None:
        self.now_ns = message.receive_ns
        if message.topic == self._embodiment.instruction_topic:
            self._add_instruction(message)
        elif message.topic in self._command_topics:
            self._add_command(message)
        else:
            self._add_observation(message)

    def _add_instruction(self, message: BagMessage) -> None:
        task = str(message.msg.data).strip()
        if not task:
            raise EpisodeError(f"the instruction on {message.topic} at {_seconds(message.receive_ns)} is empty")
        self._tasks.append((message.receive_ns, task))
        self._first_ns.setdefault(message.topic, message.receive_ns)

    def _add_command(self, message: BagMessage) -> None:
        if self._joint_state is None:
            return  # where the arm set out from is not known; the next command will do as the first
        self._commands.add(message.topic, message.receive_ns, message.msg, self._joint_state)
        # The tick before has an action: the position when the command came.
        self._first_ns.setdefault(message.topic, message.receive_ns - round(self._period_ns))

    def _add_observation(self, message: BagMessage) -> None:
        stamp = stamp_ns(message.msg)
        if abs(stamp - message.receive_ns) > MAX_SKEW * 1e9:
            raise EpisodeError(
                f"{message.topic}: stamped {_seconds(stamp)}, received {_seconds(message.receive_ns)}. Commands and "
                f"instructions are known by receive time, so the clocks must agree within {MAX_SKEW} s"
            )
        self._observations.add(message.topic, stamp, message.msg)
        self._first_ns.setdefault(message.topic, stamp)
        if message.topic == self._embodiment.state.topic:
            self._joint_state = message.msg

    def rows_until(self, now_ns: int) -> Iterator[Row]:
        """The ticks that no message received from `now_ns` on can change: every stream is past them, and so is
        the instant of their action."""
        while len(self._first_ns) == self._streams:
            tick_ns = self._tick_ns(self._ticks)
            action_ns = self._tick_ns(self._ticks + 1)
            reached_ns = self._observations.newest_common_ns()
            if reached_ns is None or tick_ns > reached_ns or action_ns >= now_ns:
                return
            yield Row(
                stamp_ns=tick_ns,
                task=self._task_at(tick_ns),
                frame=self._observations.frame(tick_ns),
                action=self._commands.at(action_ns),
            )
            self._ticks += 1

    def _tick_ns(self, k: int) -> int:
        return max(self._first_ns.values()) + round(k * self._period_ns)

    def _task_at(self, t_ns: int) -> str:
        return next(task for received_ns, task in reversed(self._tasks) if received_ns <= t_ns)

    def check_end(self) -> None:
        """Raises EpisodeError if a stream's clock jumped: its messages before the jump are lost."""
        for name, statistics in self._observations.statistics().items():
            if statistics.resets:
                raise EpisodeError(f"{name}: its header stamps went backwards {statistics.resets} times")


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"
