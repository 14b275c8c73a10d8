"""The watchdog of the inputs: whether each stream still brings messages that the policy could use, at any moment.

The chunks look at their own messages only when they are sampled; this looks at every message, once, without decoding a
pixel, so that an arm that follows a chunk is stopped when what it was planned from is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dit_policy_ros.embodiment import STATE, Camera, Embodiment
from dit_policy_ros.runtime.faults import Fault, Trouble
from dit_policy_ros.runtime.messages import MessageError, check_image, decode_joints
from dit_policy_ros.runtime.observations import ObservationBuffer
from dit_policy_ros.runtime.streams import ns

JUMP_SPEED = 3.0  # times its velocity limit: what a joint may seem to do between two messages, as stamps are not exact
JUMP_DISTANCE = 0.05  # rad or m on top of that: a step of this size does no harm, and resolution and noise are below it


@dataclass
class _Watched:
    name: str
    topic: str
    max_age_ns: int
    judge: Callable[[int, Any], None]  # (stamp_ns, message); raises MessageError
    seen_ns: int | None = None
    good_ns: int | None = None
    duplicates: int = 0  # when the newest good message was seen
    last_bad: str = ""
    invalid: int = 0

    def forget(self) -> None:
        self.seen_ns = self.good_ns = None
        self.last_bad = ""

    def take(self, stamp_ns: int, message: Any, duplicates: int) -> None:
        self.seen_ns = stamp_ns
        try:
            self.judge(stamp_ns, message)
        except MessageError as error:
            self.last_bad = str(error)
            self.invalid += 1
        else:
            self.good_ns, self.last_bad, self.duplicates = stamp_ns, "", duplicates

    def trouble(self, now_ns: int, duplicates: int) -> str | None:
        """What is wrong with the stream, None if nothing."""
        where, limit = f"topic '{self.topic}' ({self.name})", self.max_age_ns / 1e9
        if self.seen_ns is None:
            return f"{where}: no message yet; is it published, with matching QoS?"
        if self.good_ns is None:
            return f"no message fit for the policy yet: {self.last_bad}"
        age = (now_ns - self.good_ns) / 1e9
        if age < -limit:
            return (
                f"{where}: stamped {-age:.3f} s in the future, allowed are {limit} s; synchronise the clocks of "
                "camera, robot and this computer"
            )
        if age <= limit:
            return None
        if self.last_bad:
            return f"no message fit for the policy for {age:.3f} s, allowed are {limit} s: {self.last_bad}"
        repeated = duplicates - self.duplicates
        if repeated > 0:
            return (
                f"{where}: frozen, its stamp has not changed for {age:.3f} s, allowed are {limit} s, while {repeated} "
                "more messages came; restart its driver"
            )
        return f"{where}: no new message for {age:.3f} s, allowed are {limit} s; look at its driver and the network"


@dataclass
class _Jumps:
    """Joints that moved farther between two messages than an arm can: a broken encoder, or another robot's states."""

    topic: str
    joints: tuple[str, ...]
    speeds: np.ndarray  # (J,) rad/s; infinite where the embodiment has no limit
    last: tuple[int, np.ndarray] | None = None
    jumped_ns: int | None = None
    reason: str = ""
    count: int = 0

    def judge(self, stamp_ns: int, message: Any) -> None:
        positions = decode_joints(message, self.joints, self.topic)
        if self.last is not None:
            self._compare(stamp_ns, positions, *self.last)
        self.last = (stamp_ns, positions)

    def _compare(self, stamp_ns: int, now: np.ndarray, before_ns: int, before: np.ndarray) -> None:
        seconds = (stamp_ns - before_ns) / 1e9
        moved, allowed = np.abs(now - before), JUMP_SPEED * self.speeds * seconds + JUMP_DISTANCE
        if (moved <= allowed).all():
            return
        worst = int(np.argmax(moved - allowed))
        self.jumped_ns = stamp_ns
        self.count += 1
        self.reason = (
            f"topic '{self.topic}' ({STATE}): joint '{self.joints[worst]}' jumped from {before[worst]:.3f} to "
            f"{now[worst]:.3f} in {seconds:.3f} s, more than {JUMP_SPEED:g} times its velocity limit of "
            f"{self.speeds[worst]:g} allows; look at its encoder and for a second publisher"
        )

    def forget(self) -> None:
        self.last = self.jumped_ns = None


class InputWatch:
    """Judges the messages of an ObservationBuffer; for one thread, which calls `check` some hundred times a second.

    A stream is well while its newest good message is not older than its max_age. Good is an image of the size, the
    encoding and the length that it should have, a whole JPEG or PNG, joint states with every joint, finite. A bad
    message among good ones is no trouble, but counted. A joint that jumped is trouble at once, and for the state's
    max_age.
    """

    def __init__(self, embodiment: Embodiment, observations: ObservationBuffer) -> None:
        self._observations = observations
        self._epoch = -1
        state, limits = embodiment.state, embodiment.limits
        speeds = [limits[joint].velocity if joint in limits else np.inf for joint in state.joints]
        self._jumps = _Jumps(state.topic, state.joints, np.array(speeds))
        self._watched = [
            _Watched(camera.name, camera.topic, ns(camera.max_age), partial(_judge_image, camera))
            for camera in embodiment.cameras
        ]
        self._watched.append(_Watched(STATE, state.topic, ns(state.max_age), self._jumps.judge))

    def check(self, now_ns: int) -> list[Trouble]:
        """What is wrong at now_ns, by the clock that stamps the messages: a Trouble for each stream not well."""
        since = {each.name: each.seen_ns for each in self._watched if each.seen_ns is not None}
        arrivals = self._observations.arrivals(since, self._epoch)
        if arrivals.epoch != self._epoch:
            self._epoch = arrivals.epoch
            self._jumps.forget()
            for each in self._watched:
                each.forget()
        troubles = []
        for each in self._watched:
            duplicates = arrivals.duplicates[each.name]
            for stamp_ns, message in arrivals.messages[each.name]:
                each.take(stamp_ns, message, duplicates)
            reason = each.trouble(now_ns, duplicates)
            if reason is None and each.name == STATE:
                reason = self._jump(now_ns, each.max_age_ns)
            if reason is not None:
                troubles.append(Trouble(Fault.INPUT, reason))
        return troubles

    def invalid(self) -> dict[str, int]:
        """How many messages of each stream (camera names and "state") could not be used, jumps of joints included."""
        counts = {each.name: each.invalid for each in self._watched}
        counts[STATE] += self._jumps.count
        return counts

    def _jump(self, now_ns: int, max_age_ns: int) -> str | None:
        jumped_ns = self._jumps.jumped_ns
        return None if jumped_ns is None or now_ns - jumped_ns > max_age_ns else self._jumps.reason


def _judge_image(camera: Camera, _: int, message: Any) -> None:
    check_image(message, camera)
