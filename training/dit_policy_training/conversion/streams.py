"""What was measured at an instant: the node's own buffer by default, or the nearest message, or between two.

The embodiment's cameras and joints, each as of the instant, come from runtime.observations.ObservationBuffer, which is
what the policy node samples. Where the options ask for another rule for one of these, and for depth and further
sources, a Track samples the same kind of ring by its rule.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from typing import Any

import numpy as np

from dit_policy_ros.embodiment import STATE, Embodiment
from dit_policy_ros.runtime.messages import decode_image, decode_joints
from dit_policy_ros.runtime.observations import ObservationBuffer
from dit_policy_ros.runtime.streams import SLACK, ObservationError, Sample, Stream
from dit_policy_training.conversion.depth import decode_depth
from dit_policy_training.conversion.layout import image_key
from dit_policy_training.conversion.options import SAMPLINGS, DepthCamera, OptionError, TimeOptions

_FOREVER_NS = 1 << 62


class Track:
    """The messages of one stream as far back as needed, and its value at an instant by one of the rules.

    as_of: the newest message not later; nearest: the nearer one, of two as near the earlier; interpolate: on the line
    between the two. How old a message may be is the stream clock's business.
    """

    def __init__(self, name: str, topic: str, sampling: str, decode: Callable[[Any], np.ndarray], told: bool = False):
        """told: of two messages at one instant the second counts, as with commands; else the first, as in the node."""
        self._sampling, self._told = sampling, told
        self._stream = Stream(name, topic, _FOREVER_NS, _FOREVER_NS, decode)

    def add(self, stamp_ns: int, message: Any) -> None:
        """Keep a message."""
        if self._told and self._stream.newest_ns == stamp_ns:
            self._stream.samples.pop()
        self._stream.add(Sample(stamp_ns, message))

    def forget(self, t_ns: int) -> None:
        """Forget what no instant from t_ns on needs."""
        self._stream.forget(t_ns)

    def clear(self) -> None:
        """Forget every message."""
        self._stream.samples.clear()

    def __len__(self) -> int:
        return len(self._stream.samples)

    def at(self, t_ns: int) -> np.ndarray:
        """The value at t_ns. Raises ObservationError if there is no message to make it of, and what decoding raises."""
        if self._sampling == "as_of":
            return self._decoded(self._stream.as_of(t_ns))
        before, after = self._stream.around(t_ns)
        nearer = nearer_of(before, after, t_ns)
        if nearer is None:
            self._stream.as_of(t_ns)  # says what is missing
        assert nearer is not None
        if self._sampling == "nearest" or before is None or after is None or before.stamp_ns == t_ns:
            return self._decoded(nearer)
        share = (t_ns - before.stamp_ns) / (after.stamp_ns - before.stamp_ns)
        start, end = (self._decoded(sample).astype(np.float64) for sample in (before, after))
        value: np.ndarray = start + share * (end - start)
        return value.astype(self._decoded(before).dtype)

    def _decoded(self, sample: Sample) -> np.ndarray:
        if sample.value is None:
            sample.value = self._stream.decode(sample.message)
            sample.message = None
        return sample.value


def nearer_of(before: Sample | None, after: Sample | None, t_ns: int) -> Sample | None:
    """The one nearer to t_ns, of two as near the earlier."""
    if before is None or after is None:
        return before or after
    return before if t_ns - before.stamp_ns <= after.stamp_ns - t_ns else after


class NodeView:
    """The embodiment's pictures and joint positions at an instant, each as of it, by the policy node's own code."""

    def __init__(self, embodiment: Embodiment, max_skew: float):
        # A tick may have to wait so much longer than the node would: for a stream stamped max_skew behind its receive
        # time, while another is stamped as much ahead.
        more = ceil((max(0.0, 2 * max_skew - SLACK)) * embodiment.fps)
        self._buffer = ObservationBuffer(embodiment, n_obs_steps=3 + more)

    def sink(self, topic: str) -> Callable[[int, Any], None]:
        """What takes the messages of a topic."""
        return partial(self._buffer.add, topic)

    def frame(self, t_ns: int) -> dict[str, np.ndarray]:
        """As ObservationBuffer.frame."""
        return self._buffer.frame(t_ns)

    def forget(self, t_ns: int) -> None:
        """Forget what no instant from t_ns on needs."""
        self._buffer.forget(t_ns)

    def clear(self) -> None:
        """Forget every message."""
        self._buffer.clear()


class TrackView:
    """The same by a rule for each of them."""

    def __init__(self, embodiment: Embodiment, samplings: Mapping[str, str]):
        """samplings: the rule by camera's name or "state"."""
        state = embodiment.state
        self._tracks = {
            camera.name: Track(camera.name, camera.topic, samplings[camera.name], partial(decode_image, camera=camera))
            for camera in embodiment.cameras
        }
        decode = partial(decode_joints, joints=state.joints, topic=state.topic)
        self._tracks[STATE] = Track(STATE, state.topic, samplings[STATE], decode)
        self._topics = {camera.topic: camera.name for camera in embodiment.cameras} | {state.topic: STATE}

    def sink(self, topic: str) -> Callable[[int, Any], None]:
        """What takes the messages of a topic."""
        return self._tracks[self._topics[topic]].add

    def frame(self, t_ns: int) -> dict[str, np.ndarray]:
        """As ObservationBuffer.frame."""
        values = {name: track.at(t_ns) for name, track in self._tracks.items()}
        state = values.pop(STATE)
        return {image_key(name): picture for name, picture in values.items()} | {"observation.state": state}

    def forget(self, t_ns: int) -> None:
        """Forget what no instant from t_ns on needs."""
        for track in self._tracks.values():
            track.forget(t_ns)

    def clear(self) -> None:
        """Forget every message."""
        for track in self._tracks.values():
            track.clear()


def view_of(embodiment: Embodiment, samplings: Mapping[str, str], max_skew: float) -> NodeView | TrackView:
    """The node's way wherever it serves: with every stream as of the instant."""
    if set(samplings.values()) == {"as_of"}:
        return NodeView(embodiment, max_skew)
    return TrackView(embodiment, samplings)


def samplings_of(embodiment: Embodiment, depth: Mapping[str, DepthCamera], options: TimeOptions) -> dict[str, str]:
    """The rule of every camera, depth camera, and "state". Raises OptionError for names and rules that are not."""
    names = [*(camera.name for camera in embodiment.cameras), *depth, STATE]
    for name, sampling in options.sampling.items():
        if name not in names:
            raise OptionError(f"--time.sampling: there is no '{name}', expected of {', '.join(names)}")
        if sampling not in SAMPLINGS:
            raise OptionError(f"--time.sampling: {name} is '{sampling}', expected {', '.join(SAMPLINGS)}")
        if sampling == "interpolate" and name != STATE:
            raise OptionError(f"--time.sampling: camera '{name}' cannot be interpolated, only joints; take nearest")
    return {name: options.sampling.get(name, "as_of") for name in names}


def depth_track(name: str, camera: DepthCamera, sampling: str) -> Track:
    """The track of a depth camera: (height, width) float32 metres."""
    return Track(name, camera.topic, sampling, partial(decode_depth, camera=camera))


def check_skew(stamps_ns: Mapping[str, int], max_skew: float) -> None:
    """Raises ObservationError, INPUT_SKEWED, if the pictures chosen for a row, by camera, are too far apart."""
    behind, ahead = min(stamps_ns, key=stamps_ns.__getitem__), max(stamps_ns, key=stamps_ns.__getitem__)
    skew = (stamps_ns[ahead] - stamps_ns[behind]) / 1e9
    if skew > max_skew:
        raise ObservationError(
            "INPUT_SKEWED",
            f"camera '{behind}' is {skew:.3f} s behind camera '{ahead}' by their stamps, allowed are {max_skew} s "
            "(max_camera_skew of the embodiment)",
        )
