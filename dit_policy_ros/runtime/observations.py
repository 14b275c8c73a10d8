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

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import cv2
import numpy as np

from dit_policy_ros.embodiment import STATE, Camera, Embodiment
from dit_policy_ros.runtime.messages import MessageError, decode_image, decode_joints, decode_velocities
from dit_policy_ros.runtime.streams import SLACK, ObservationError, Sample, Stream, StreamStatistics, ns

__all__ = ["SLACK", "Arrivals", "CameraFrame", "Observation", "ObservationBuffer", "ObservationError"]

_VELOCITY_SPAN_NS = 40_000_000  # positions this far apart give a velocity where none is measured


@dataclass(frozen=True)
class Observation:
    """n_obs_steps frames, the earliest first, the last one at `stamp_ns`.

    images: {camera: n_obs_steps pictures (3, H, W) uint8 RGB, not to be written to: the same picture is the same array
    in every observation}; state: (n_obs_steps, S) float32;
    ages: {camera name or "state": seconds from the newest message used to `stamp_ns`};
    image_stamps_ns: {camera: the stamp of each of its images}.
    """

    stamp_ns: int
    images: dict[str, Sequence[np.ndarray]]
    state: np.ndarray
    ages: dict[str, float]
    image_stamps_ns: dict[str, tuple[int, ...]]

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays under the policy's feature keys, contiguous and writeable, fit for torch.from_numpy.

        Images: (n_obs_steps, 3, H, W) uint8 RGB.
        """
        images = {f"observation.images.{camera}": np.stack(steps) for camera, steps in self.images.items()}
        return images | {"observation.state": self.state}


@dataclass(frozen=True)
class CameraFrame:
    """One picture (3, H, W) uint8 RGB of a camera, as an Observation has it."""

    camera: str
    stamp_ns: int
    image: np.ndarray


@dataclass(frozen=True)
class Arrivals:
    """What came by stream, undecoded: (stamp_ns, message), earliest first; and the duplicates counted so far.

    `epoch` is another number whenever the buffer has started afresh: what was known of the streams then counts no more.
    """

    epoch: int
    messages: dict[str, list[tuple[int, Any]]]
    duplicates: dict[str, int]


class ObservationBuffer:
    """Keeps the undecoded messages that a window may need, and decodes those it selects, once each.

    `add` is cheap and may be called from any thread, also while another one is in `frame` or `window`.
    """

    def __init__(self, embodiment: Embodiment, n_obs_steps: int) -> None:
        if n_obs_steps < 1:
            raise ValueError(f"n_obs_steps is {n_obs_steps}, expected 1 or more")
        self._n_obs_steps = n_obs_steps
        self._fps = embodiment.fps
        self._max_skew_ns = ns(embodiment.max_camera_skew)
        self._lock = Lock()
        self._epoch = 0
        self._reset_ns: int | None = None  # the newest stamp since the clocks went backwards; None: they did not
        state = embodiment.state
        # The slowest stream sets the time of a common window, so each one keeps what the slowest may ask for.
        slowest = max(state.max_age, *(camera.max_age for camera in embodiment.cameras))
        span = (n_obs_steps - 1) / embodiment.fps + slowest + SLACK

        def stream(name: str, topic: str, max_age: float, decode: Any) -> Stream:
            return Stream(name, topic, ns(max_age), ns(span + max_age), decode)

        self._cameras = [
            stream(camera.name, camera.topic, camera.max_age, partial(_planes, camera=camera))
            for camera in embodiment.cameras
        ]
        decode_state = partial(decode_joints, joints=state.joints, topic=state.topic)
        self._state = stream(STATE, state.topic, state.max_age, decode_state)
        self._streams = {stream.topic: stream for stream in [*self._cameras, self._state]}

    def add(self, topic: str, stamp_ns: int, message: Any) -> None:
        """Keep a message under the embodiment's name of its topic; late ones are put in their place.

        A stamp more than a second behind the newest of its stream means that the clock went backwards (a bag looped, a
        simulator reset). Then every stream starts afresh, and what still comes with stamps of before is dropped, so
        that no window mixes the two. Raises KeyError for a topic that is not the embodiment's.
        """
        stream = self._streams.get(topic)
        if stream is None:
            raise KeyError(f"'{topic}' is not an observed topic, expected one of {', '.join(self._streams)}")
        with self._lock:
            stream.counts.received += 1
            if stream.went_back(stamp_ns):
                stream.counts.resets += 1
                self._start_afresh()
                self._reset_ns = stamp_ns
            if self._reset_ns is not None:
                if not stream.samples and stamp_ns - self._reset_ns > ns(SLACK) // 2:
                    stream.counts.before_reset += 1
                    return
                self._reset_ns = max(self._reset_ns, stamp_ns)
            stream.add(Sample(stamp_ns, message))

    def clear(self) -> None:
        """Forget every message."""
        with self._lock:
            self._start_afresh()

    def forget(self, t_ns: int) -> None:
        """Forget the messages that no frame from t_ns on needs, for who goes through a recording and holds many."""
        with self._lock:
            for stream in self._streams.values():
                stream.forget(t_ns)

    def _start_afresh(self) -> None:
        self._epoch += 1
        self._reset_ns = None
        for stream in self._streams.values():
            stream.samples.clear()

    def frame(self, t_ns: int) -> dict[str, np.ndarray]:
        """One tick: {"observation.images.<camera>": (H, W, 3) uint8 RGB, "observation.state": (S,) float32}.

        Raises ObservationError when a stream has no message as of t or one older than its max_age, or when the cameras'
        are stamped further apart than the embodiment allows; MessageError when the message cannot be decoded. The
        arrays may be shared and read-only.
        """
        chosen = self._as_of(t_ns)
        self._check_skew(chosen)
        frame = {f"observation.images.{s.name}": cv2.merge(list(_decoded(s, chosen[s.name]))) for s in self._cameras}
        return frame | {"observation.state": _decoded(self._state, chosen[STATE])}

    def window(self, t_ns: int) -> Observation:
        """The n_obs_steps frames at t_ns, t_ns - 1/fps, ..., earliest first. Raises as `frame` does."""
        # The newest first: a stream that never came is then told before the others' history is too short.
        newest, *older = [self._as_of(t_ns - round(k * 1e9 / self._fps)) for k in range(self._n_obs_steps)]
        self._check_skew(newest)
        frames = [*reversed(older), newest]
        names = [camera.name for camera in self._cameras]
        return Observation(
            stamp_ns=t_ns,
            images={s.name: [_decoded(s, frame[s.name]) for frame in frames] for s in self._cameras},
            state=np.stack([_decoded(self._state, frame[STATE]) for frame in frames]),
            ages={name: (t_ns - sample.stamp_ns) / 1e9 for name, sample in newest.items()},
            image_stamps_ns={name: tuple(frame[name].stamp_ns for frame in frames) for name in names},
        )

    def frames_ahead(self, now_ns: int) -> Iterator[CameraFrame]:
        """The pictures that a chunk starting now would see, those of the earlier steps first; each decoded as it is
        asked for.

        A chunk that starts a little later sees most of them too, so their features can be computed before it is due.
        Steps with a stream missing or stale, and messages that cannot be decoded, are left out: the chunk will tell.
        """
        common = self.newest_common_ns()
        t_ns = now_ns if common is None else min(common, now_ns)
        for k in reversed(range(self._n_obs_steps)):
            try:
                chosen = self._as_of(t_ns - round(k * 1e9 / self._fps))
            except ObservationError:
                continue
            for stream in self._cameras:
                sample = chosen[stream.name]
                try:
                    yield CameraFrame(stream.name, sample.stamp_ns, _decoded(stream, sample))
                except MessageError:
                    continue

    def latest(self, now_ns: int) -> Observation:
        """The window at `newest_common_ns`, after checking that every stream is fresh at `now_ns`.

        Transport delays then do not age the images, so ages are distributed as in training. Raises as
        `window`, and INPUT_INVALID when a stream is stamped further in the future than its max_age.
        """
        with self._lock:
            for stream in self._streams.values():
                newest = now_ns if stream.newest_ns is None else stream.newest_ns
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
            newest = [stream.newest_ns for stream in self._streams.values()]
        reached = [stamp_ns for stamp_ns in newest if stamp_ns is not None]
        return min(reached) if len(reached) == len(newest) else None

    def measured(self, joints: Sequence[str], now_ns: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Measured position and velocity of `joints`, each (J,) float64, newest as of `now_ns`.

        Velocity comes from the message, or else from positions some 40 ms apart, or else is None.
        Raises as `frame`.
        """
        topic = self._state.topic
        with self._lock:
            newest = self._state.as_of(now_ns)
            index = bisect_right(
                self._state.samples, newest.stamp_ns - _VELOCITY_SPAN_NS, key=lambda sample: sample.stamp_ns
            )
            earlier = self._state.samples[index - 1] if index else None
        position = decode_joints(newest.message, joints, topic).astype(np.float64)
        velocity = decode_velocities(newest.message, joints, topic)
        if velocity is None and earlier is not None:
            span_ns = newest.stamp_ns - earlier.stamp_ns
            if span_ns <= self._state.max_age_ns:
                before = decode_joints(earlier.message, joints, topic).astype(np.float64)
                velocity = (position - before) / (span_ns / 1e9)
        return position, velocity

    def statistics(self, now_ns: int | None = None) -> dict[str, StreamStatistics]:
        """Counts, rate and age (as of `now_ns`; None: as of its newest stamp) by stream: camera names and "state"."""
        with self._lock:
            return {stream.name: stream.statistics(now_ns) for stream in self._streams.values()}

    def arrivals(self, since: Mapping[str, int], epoch: int) -> Arrivals:
        """The kept messages stamped later than `since` says of their stream (all of a stream it does not name).

        If the buffer has started afresh since `epoch`, all messages kept.
        """
        with self._lock:
            known = since if epoch == self._epoch else {}
            messages = {
                stream.name: [(sample.stamp_ns, sample.message) for sample in stream.after(known.get(stream.name))]
                for stream in self._streams.values()
            }
            duplicates = {stream.name: stream.counts.duplicates for stream in self._streams.values()}
            return Arrivals(self._epoch, messages, duplicates)

    def _as_of(self, t_ns: int) -> dict[str, Sample]:
        with self._lock:
            return {stream.name: stream.as_of(t_ns) for stream in self._streams.values()}

    def _check_skew(self, frame: Mapping[str, Sample]) -> None:
        stamps = {stream.name: frame[stream.name].stamp_ns for stream in self._cameras}
        behind, ahead = min(stamps, key=stamps.__getitem__), max(stamps, key=stamps.__getitem__)
        skew_ns = stamps[ahead] - stamps[behind]
        if skew_ns > self._max_skew_ns:
            raise ObservationError(
                "INPUT_SKEWED",
                f"camera '{behind}' is {skew_ns / 1e9:.3f} s behind camera '{ahead}' by their header stamps, allowed "
                f"are {self._max_skew_ns / 1e9} s (max_camera_skew of the embodiment); it drops images, is slow, or "
                "its clock differs: look at its rate, its network and its clock",
            )


def _planes(message: Any, camera: Camera) -> np.ndarray:
    """The picture (3, H, W): channels first, as the policy takes it."""
    image = decode_image(message, camera)
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))  # into the planes given; twenty times as fast as a transposing copy
    return planes


def _decoded(stream: Stream, sample: Sample) -> np.ndarray:
    # Outside the lock, so that callbacks never wait for a JPEG. Two threads may decode the same image; both
    # get the same.
    if sample.value is None:
        sample.value = stream.decode(sample.message)
    return sample.value
