"""Stamped messages to observations: what each sensor said last, as of a given instant, sampled exactly
1/fps apart.

The node and the converter use the same two functions: `frame(t)` is one tick, `window(t)` the n_obs_steps
frames that end at t, so a bag replayed through the node gives bit for bit what the converter wrote. "As of
t" means the newest message whose *header stamp* is not later than t: when a message arrived plays no part,
only when it was measured.

At the start the node waits: until every stream reaches back (n_obs_steps - 1)/fps, `window` raises
INPUT_MISSING. A training set pads an episode's first frames by repeating the first one; the node does not,
because its history is missing only for that moment after start, and a repeated frame would claim that the
arm stood still.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from threading import Lock
from typing import Any

import numpy as np

from dit_policy_ros.embodiment import STATE, Embodiment
from dit_policy_ros.runtime.messages import decode_image, decode_joints, decode_velocities

SLACK = 1.0  # s: a stamp this much older than the newest is late; beyond that the clock went backwards
_VELOCITY_SPAN_NS = 40_000_000  # positions this far apart give a velocity where none is measured


class ObservationError(RuntimeError):
    """No observation can be made. `code` is the name of a runtime.gate.Verdict."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Observation:
    """n_obs_steps frames, the earliest first, the last one at `stamp_ns`.

    images: {camera: (n_obs_steps, 3, H, W) uint8 RGB}; state: (n_obs_steps, S) float32;
    ages: {camera name or "state": seconds from the newest message used to `stamp_ns`};
    image_stamps_ns: {camera: the stamp of each of its images}.
    """

    stamp_ns: int
    images: dict[str, np.ndarray]
    state: np.ndarray
    ages: dict[str, float]
    image_stamps_ns: dict[str, tuple[int, ...]]

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays under the policy's feature keys, contiguous and writeable, fit for torch.from_numpy."""
        images = {f"observation.images.{camera}": array for camera, array in self.images.items()}
        return images | {"observation.state": self.state}


@dataclass
class StreamStatistics:
    """What a stream has seen: messages taken, those that came late, twice (dropped), and clock resets."""

    received: int = 0
    late: int = 0
    duplicates: int = 0
    resets: int = 0


@dataclass
class _Sample:
    stamp_ns: int
    message: Any
    value: np.ndarray | None = None


@dataclass
class _Stream:
    name: str
    topic: str
    max_age_ns: int
    keep_ns: int
    decode: Callable[[Any], np.ndarray]
    samples: list[_Sample] = field(default_factory=list)
    statistics: StreamStatistics = field(default_factory=StreamStatistics)

    def add(self, sample: _Sample) -> None:
        samples = self.samples
        self.statistics.received += 1
        if samples and sample.stamp_ns < samples[-1].stamp_ns - _ns(SLACK):
            samples.clear()
            self.statistics.resets += 1
        if not samples or sample.stamp_ns > samples[-1].stamp_ns:
            samples.append(sample)
        else:
            self._insert(sample)
        oldest_ns = samples[-1].stamp_ns - self.keep_ns
        if samples[0].stamp_ns < oldest_ns:
            del samples[: bisect_left(samples, oldest_ns, key=_stamp)]

    def _insert(self, sample: _Sample) -> None:
        index = bisect_left(self.samples, sample.stamp_ns, key=_stamp)
        if self.samples[index].stamp_ns == sample.stamp_ns:
            self.statistics.duplicates += 1  # the first one stays: what was once sampled does not change
        else:
            self.statistics.late += 1
            self.samples.insert(index, sample)

    def as_of(self, t_ns: int) -> _Sample:
        index = bisect_right(self.samples, t_ns, key=_stamp)
        if index == 0:
            raise ObservationError("INPUT_MISSING", self._missing(t_ns))
        sample = self.samples[index - 1]
        if t_ns - sample.stamp_ns > self.max_age_ns:
            raise ObservationError("INPUT_STALE", self._stale(sample, t_ns))
        return sample

    def _missing(self, t_ns: int) -> str:
        if not self.samples:
            return f"no message yet on topic '{self.topic}' ({self.name}): is it published, with matching QoS?"
        ahead = (self.samples[0].stamp_ns - t_ns) / 1e9
        return (
            f"topic '{self.topic}' ({self.name}) has no message as old as {_seconds(t_ns)}: the oldest is "
            f"{ahead:.3f} s younger. It has just begun, or its clock is ahead of this one"
        )

    def _stale(self, sample: _Sample, t_ns: int) -> str:
        age, limit = (t_ns - sample.stamp_ns) / 1e9, self.max_age_ns / 1e9
        cause = "it stopped, is slow, or its clock is behind"
        if sample.stamp_ns == 0:
            cause = "its header stamp is zero: the driver does not stamp"
        where = f"topic '{self.topic}' ({self.name})"
        return f"{where}: newest message is {age:.3f} s old, allowed are {limit} s; {cause}"


class ObservationBuffer:
    """Keeps the undecoded messages that a window may need, and decodes those it selects, once each.

    `add` is cheap and may be called from any thread, also while another one is in `frame` or `window`.
    """

    def __init__(self, embodiment: Embodiment, n_obs_steps: int) -> None:
        if n_obs_steps < 1:
            raise ValueError(f"n_obs_steps is {n_obs_steps}, expected 1 or more")
        self._n_obs_steps = n_obs_steps
        self._fps = embodiment.fps
        self._lock = Lock()
        state = embodiment.state
        # The slowest stream sets the time of a common window, so each one keeps what the slowest may ask for.
        slowest = max(state.max_age, *(camera.max_age for camera in embodiment.cameras))
        span = (n_obs_steps - 1) / embodiment.fps + slowest + SLACK
        self._cameras = [
            _Stream(
                camera.name,
                camera.topic,
                _ns(camera.max_age),
                _ns(span + camera.max_age),
                partial(decode_image, camera=camera),
            )
            for camera in embodiment.cameras
        ]
        self._state = _Stream(
            STATE,
            state.topic,
            _ns(state.max_age),
            _ns(span + state.max_age),
            partial(decode_joints, joints=state.joints, topic=state.topic),
        )
        self._streams = {stream.topic: stream for stream in [*self._cameras, self._state]}

    def add(self, topic: str, stamp_ns: int, message: Any) -> None:
        """Keep a message under the embodiment's name of its topic; late ones are put in their place.

        A stamp more than a second behind the newest means that the clock went backwards (a bag looped, a
        simulator reset): the stream starts afresh. Raises KeyError for a topic that is not the
        embodiment's.
        """
        stream = self._streams.get(topic)
        if stream is None:
            raise KeyError(f"'{topic}' is not an observed topic, expected one of {', '.join(self._streams)}")
        with self._lock:
            stream.add(_Sample(stamp_ns, message))

    def clear(self) -> None:
        """Forget every message."""
        with self._lock:
            for stream in self._streams.values():
                stream.samples.clear()

    def frame(self, t_ns: int) -> dict[str, np.ndarray]:
        """One tick: {"observation.images.<camera>": (H, W, 3) uint8 RGB, "observation.state": (S,) float32}.

        Raises ObservationError when a stream has no message as of t or one older than its max_age,
        MessageError when the message cannot be decoded. The arrays may be shared and read-only.
        """
        return {_feature(name): value for name, (value, _) in self._as_of(t_ns).items()}

    def window(self, t_ns: int) -> Observation:
        """The n_obs_steps frames at t_ns, t_ns - 1/fps, ..., earliest first. Raises as `frame` does."""
        # The newest first: a stream that never came is then told before the others' history is too short.
        newest, *older = [self._as_of(t_ns - round(k * 1e9 / self._fps)) for k in range(self._n_obs_steps)]
        frames = [*reversed(older), newest]
        return Observation(
            stamp_ns=t_ns,
            images={
                camera.name: _channels_first([frame[camera.name][0] for frame in frames]) for camera in self._cameras
            },
            state=np.stack([frame[STATE][0] for frame in frames]),
            ages={name: (t_ns - stamp_ns) / 1e9 for name, (_, stamp_ns) in newest.items()},
            image_stamps_ns={camera.name: tuple(frame[camera.name][1] for frame in frames) for camera in self._cameras},
        )

    def latest(self, now_ns: int) -> Observation:
        """The window at `newest_common_ns`, after checking that every stream is fresh at `now_ns`.

        Transport delays then do not age the images, so ages are distributed as in training. Raises as
        `window`, and INPUT_INVALID when a stream is stamped further in the future than its max_age.
        """
        with self._lock:
            for stream in self._streams.values():
                newest = stream.samples[-1].stamp_ns if stream.samples else now_ns
                if newest - now_ns > stream.max_age_ns:
                    raise ObservationError(
                        "INPUT_INVALID",
                        f"topic '{stream.topic}' ({stream.name}) is stamped {(newest - now_ns) / 1e9:.3f} s "
                        "in the future; synchronise the clocks of camera, robot and this computer",
                    )
                stream.as_of(now_ns)
        common = self.newest_common_ns()
        return self.window(now_ns if common is None else min(common, now_ns))

    def newest_common_ns(self) -> int | None:
        """The newest instant that every stream has reached (min of their newest stamps); None before."""
        with self._lock:
            if not all(stream.samples for stream in self._streams.values()):
                return None
            return min(stream.samples[-1].stamp_ns for stream in self._streams.values())

    def measured(self, joints: Sequence[str], now_ns: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Measured position and velocity of `joints`, each (J,) float64, newest as of `now_ns`.

        Velocity comes from the message, or else from positions some 40 ms apart, or else is None.
        Raises as `frame`.
        """
        topic = self._state.topic
        with self._lock:
            newest = self._state.as_of(now_ns)
            index = bisect_right(self._state.samples, newest.stamp_ns - _VELOCITY_SPAN_NS, key=_stamp)
            earlier = self._state.samples[index - 1] if index else None
        position = decode_joints(newest.message, joints, topic).astype(np.float64)
        velocity = decode_velocities(newest.message, joints, topic)
        if velocity is None and earlier is not None:
            span_ns = newest.stamp_ns - earlier.stamp_ns
            if span_ns <= self._state.max_age_ns:
                before = decode_joints(earlier.message, joints, topic).astype(np.float64)
                velocity = (position - before) / (span_ns / 1e9)
        return position, velocity

    def statistics(self) -> dict[str, StreamStatistics]:
        """Counts by stream: camera names and "state"."""
        with self._lock:
            return {stream.name: replace(stream.statistics) for stream in self._streams.values()}

    def _as_of(self, t_ns: int) -> dict[str, tuple[np.ndarray, int]]:
        with self._lock:
            chosen = [(stream, stream.as_of(t_ns)) for stream in self._streams.values()]
        return {stream.name: (_decoded(stream, sample), sample.stamp_ns) for stream, sample in chosen}


def _decoded(stream: _Stream, sample: _Sample) -> np.ndarray:
    # Outside the lock, so that callbacks never wait for a JPEG. Two threads may decode the same image; both
    # get the same.
    if sample.value is None:
        sample.value = stream.decode(sample.message)
    return sample.value


def _channels_first(images: list[np.ndarray]) -> np.ndarray:
    height, width, channels = images[0].shape
    stacked = np.empty((len(images), channels, height, width), np.uint8)
    for step, image in zip(stacked, images, strict=True):
        step[:] = image.transpose(2, 0, 1)
    return stacked


def _feature(stream: str) -> str:
    return "observation.state" if stream == STATE else f"observation.images.{stream}"


_stamp = attrgetter("stamp_ns")


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"
