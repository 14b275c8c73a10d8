"""What is in a recording: for each topic its rate, gaps, clocks, pictures, joints, texts; and what is damaged."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_policy_ros.runtime.pictures import PictureError, read_header
from dit_policy_training.conversion.account import Spread
from dit_policy_training.conversion.message import BagError, BagMessage
from dit_policy_training.conversion.recording import Recording, TopicInfo, content_files

IMAGE, COMPRESSED, JOINTS = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/JointState"
TRAJECTORY, STRING, ARRAY = (
    "trajectory_msgs/msg/JointTrajectory",
    "std_msgs/msg/String",
    "std_msgs/msg/Float64MultiArray",
)
FEEDBACK = "control_msgs/action/FollowJointTrajectory_FeedbackMessage"
CONTROLLER_STATE = "control_msgs/msg/JointTrajectoryControllerState"

_LIMITS_EVERY = 0.1  # s
_JOINTS_EVERY_NS = 20_000_000  # enough for limits, and bounds the memory


@dataclass
class Pictures:
    """How often each kind of picture came: (width, height, encoding or format)."""

    kinds: Counter[tuple[int, int, str]] = field(default_factory=Counter)
    broken: int = 0

    def add(self, message: BagMessage) -> None:
        """Count one more."""
        if message.msgtype == IMAGE:
            self.kinds[int(message.msg.width), int(message.msg.height), str(message.msg.encoding)] += 1
            return
        try:
            header = read_header(_picture_in(message.msg))
        except PictureError:
            self.broken += 1
        else:
            self.kinds[header.width, header.height, str(message.msg.format)] += 1


class Extent(NamedTuple):
    """How a joint moved in a recording: smallest and largest position (rad), speed (rad/s), acceleration (rad/s^2)."""

    lower: float
    upper: float
    speed: float
    acceleration: float


@dataclass
class Joints:
    """Joint names in the order of their first appearance; `extents` of those that moved or stood, once all are in."""

    names: tuple[str, ...] = ()
    orders: int = 0  # how many different lists of names came
    fields: tuple[str, ...] = ()
    extents: dict[str, Extent] = field(default_factory=dict)
    _times_ns: list[int] = field(default_factory=list)
    _positions: list[np.ndarray] = field(default_factory=list)
    _seen: set[tuple[str, ...]] = field(default_factory=set)

    def add(self, names: tuple[str, ...], positions: Any, time_ns: int) -> None:
        """Take one message's joints."""
        self.names += tuple(name for name in names if name not in self.names)
        self._seen.add(names)
        self.orders = len(self._seen)
        if len(positions) != len(names) or (self._times_ns and time_ns - self._times_ns[-1] < _JOINTS_EVERY_NS):
            return
        values = dict(zip(names, positions, strict=True))
        self._times_ns.append(time_ns)
        self._positions.append(np.array([values.get(name, np.nan) for name in self.names], np.float64))

    def close(self) -> None:
        """Sum up: of many recordings not every position can be kept."""
        table = np.full((len(self._positions), len(self.names)), np.nan)
        for row, values in zip(table, self._positions, strict=True):
            row[: len(values)] = values
        times = np.array(self._times_ns, np.float64) / 1e9
        extents = {name: _extent(times, positions) for name, positions in zip(self.names, table.T, strict=True)}
        self.extents = {name: extent for name, extent in extents.items() if extent is not None}
        self._times_ns.clear()
        self._positions.clear()
        self._seen.clear()


@dataclass
class TopicLook:
    """One topic: `read` messages, their largest gap (s), and by how much stamps lag behind the receive times (s)."""

    info: TopicInfo
    read: int = 0
    largest_gap: float = 0.0
    lags: Spread = field(default_factory=Spread)
    stamped: int = 0
    unstamped: int = 0  # messages with a header whose stamp is zero
    pictures: Pictures = field(default_factory=Pictures)
    joints: Joints = field(default_factory=Joints)
    texts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)  # of arrays
    _first_ns: int = 0
    _last_ns: int = 0

    @property
    def rate(self) -> float:
        """Messages a second between the first and the last; 0 for fewer than two."""
        span = self._last_ns - self._first_ns
        return (self.read - 1) / (span / 1e9) if span else 0.0

    def add(self, message: BagMessage) -> None:
        """Take one more message. Raises BagError if it cannot be decoded."""
        if self.read:
            self.largest_gap = max(self.largest_gap, (message.receive_ns - self._last_ns) / 1e9)
        else:
            self._first_ns = message.receive_ns
        self._last_ns = message.receive_ns
        self.read += 1
        if stamp_ns := message.stamp_ns:
            self.lags.add((message.receive_ns - stamp_ns) / 1e9)
            self.stamped += 1
        elif stamp_ns == 0:
            self.unstamped += 1
        if (look := _LOOKS.get(message.msgtype)) is not None:
            look(self, message)


@dataclass
class BagLook:
    """One recording. `damage` says why it could not be read to the end; None if it could."""

    bag: Path
    size: int = 0  # bytes
    start_ns: int = 0
    end_ns: int = 0
    topics: dict[str, TopicLook] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    damage: str | None = None

    @property
    def seconds(self) -> float:
        """From the first message to the last."""
        return (self.end_ns - self.start_ns) / 1e9

    def of_type(self, *msgtypes: str) -> list[TopicLook]:
        """The topics of these types, by name."""
        return [self.topics[name] for name in sorted(self.topics) if self.topics[name].info.msgtype in msgtypes]


def look_at(bag: Path, recover: bool = False) -> BagLook:
    """Read a recording once. Damage ends the look and stands in it; what was read before counts."""
    look = BagLook(bag)
    try:
        look.size = sum(path.stat().st_size for path in content_files(bag))
        with Recording(bag, recover) as recording:
            look.start_ns, look.end_ns = recording.start_ns, recording.end_ns
            look.topics = {name: TopicLook(info) for name, info in recording.topics.items()}
            try:
                for message in recording.messages(list(recording.topics)):
                    look.topics[message.topic].add(message)
            finally:
                look.notes = recording.notes
                for topic in look.topics.values():
                    topic.joints.close()
    except (BagError, OSError) as error:
        look.damage = str(error)
    return look


def _extent(times: np.ndarray, positions: np.ndarray) -> Extent | None:
    known = np.isfinite(positions)
    if not known.any():
        return None
    times, positions = times[known], positions[known]
    # Positions this far apart give velocities and accelerations; nearer ones the encoder's noise.
    every = max(1, round(_LIMITS_EVERY / float(np.median(np.diff(times))))) if len(times) > 1 else 1
    coarse_times, coarse = times[::every], positions[::every]
    speeds = np.diff(coarse) / np.diff(coarse_times)
    changes = np.diff(speeds) / np.diff(coarse_times)[1:]
    most = (float(np.abs(values).max(initial=0.0)) for values in (speeds, changes))
    return Extent(float(positions.min()), float(positions.max()), *most)


def natural(name: str) -> tuple[str | int, ...]:
    """A key by which joint2 comes before joint10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def _picture_in(message: Any) -> Any:
    # compressedDepth has its own header of 12 bytes before the PNG.
    return message.data[12:] if "compressedDepth" in str(message.format) else message.data


def _look_at_joints(look: TopicLook, message: BagMessage) -> None:
    look.joints.fields = tuple(name for name in ("position", "velocity", "effort") if len(getattr(message.msg, name)))
    look.joints.add(tuple(message.msg.name), message.msg.position, message.receive_ns)


def _look_at_trajectory(look: TopicLook, message: BagMessage) -> None:
    last = message.msg.points[-1].positions if len(message.msg.points) else ()
    look.joints.add(tuple(message.msg.joint_names), last, message.receive_ns)


def _look_at_state(look: TopicLook, message: BagMessage) -> None:
    state = message.msg.feedback if message.msgtype == FEEDBACK else message.msg
    now = getattr(state, "reference", None) or state.desired
    look.joints.add(tuple(state.joint_names), now.positions, message.receive_ns)


def _look_at_text(look: TopicLook, message: BagMessage) -> None:
    look.texts[str(message.msg.data).strip()] += 1


def _look_at_array(look: TopicLook, message: BagMessage) -> None:
    look.sizes[len(message.msg.data)] += 1


_LOOKS: dict[str, Callable[[TopicLook, BagMessage], None]] = {
    IMAGE: lambda look, message: look.pictures.add(message),
    COMPRESSED: lambda look, message: look.pictures.add(message),
    JOINTS: _look_at_joints,
    TRAJECTORY: _look_at_trajectory,
    FEEDBACK: _look_at_state,
    CONTROLLER_STATE: _look_at_state,
    STRING: _look_at_text,
    ARRAY: _look_at_array,
}
