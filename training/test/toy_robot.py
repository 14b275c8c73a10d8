"""A made-up robot whose every message is a known function of time, recorded as real rosbag2 bags."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

START_NS = 1_700_000_000_123_456_789
JOINTS = ("lift", "turn", "reach")  # the state's order; the action's is turn, lift
EMBODIMENT = """
name: toy
fps: 10
instruction: {topic: instruction}
cameras:
  side: {topic: side/image_raw, transport: raw, width: 48, height: 32, max_age: 0.3}
  hand: {topic: hand/image_raw/compressed, transport: compressed, width: 32, height: 32, max_age: 0.3}
max_camera_skew: 0.3
state: {topic: joint_states, joints: [lift, turn, reach], max_age: 0.2}
action_groups:
  arm:
    topic: arm_controller/joint_trajectory
    interface: trajectory
    joints:
      turn: {position: [-3, 3], velocity: 2.0, acceleration: 10.0}
      lift: {position: [-3, 3], velocity: 2.0, acceleration: 10.0}
"""

STORE = get_typestore(Stores.ROS2_KILTED)
TYPES = {
    "side/image_raw": "sensor_msgs/msg/Image",
    "hand/image_raw/compressed": "sensor_msgs/msg/CompressedImage",
    "joint_states": "sensor_msgs/msg/JointState",
    "arm_controller/joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    "instruction": "std_msgs/msg/String",
}


# As control_msgs, std_srvs and dit_policy_msgs define them: rosbags' own store has none of these.
_POINTS = "trajectory_msgs/JointTrajectoryPoint"
_EVENT = "service_msgs/ServiceEventInfo info"
DEFINITIONS = {
    "control_msgs/msg/GripperCommand": "float64 position\nfloat64 max_effort",
    "control_msgs/action/GripperCommand_Feedback": (
        "float64 position\nfloat64 effort\nbool stalled\nbool reached_goal"
    ),
    "control_msgs/action/GripperCommand_FeedbackMessage": (
        "unique_identifier_msgs/UUID goal_id\ncontrol_msgs/action/GripperCommand_Feedback feedback"
    ),
    "control_msgs/action/FollowJointTrajectory_Feedback": (
        f"std_msgs/Header header\nstring[] joint_names\n{_POINTS} desired\n{_POINTS} actual\n{_POINTS} error"
    ),
    "control_msgs/action/FollowJointTrajectory_FeedbackMessage": (
        "unique_identifier_msgs/UUID goal_id\ncontrol_msgs/action/FollowJointTrajectory_Feedback feedback"
    ),
    "std_srvs/srv/SetBool_Request": "bool data",
    "std_srvs/srv/SetBool_Response": "bool success\nstring message",
    "std_srvs/srv/SetBool_Event": (
        f"{_EVENT}\nstd_srvs/srv/SetBool_Request[<=1] request\nstd_srvs/srv/SetBool_Response[<=1] response"
    ),
    "std_srvs/srv/Trigger_Request": "uint8 structure_needs_at_least_one_member",
    "std_srvs/srv/Trigger_Response": "bool success\nstring message",
    "std_srvs/srv/Trigger_Event": (
        f"{_EVENT}\nstd_srvs/srv/Trigger_Request[<=1] request\nstd_srvs/srv/Trigger_Response[<=1] response"
    ),
    "dit_policy_msgs/srv/SetInstruction_Request": "string instruction",
    "dit_policy_msgs/srv/SetInstruction_Response": "bool success\nstring message",
    "dit_policy_msgs/srv/SetInstruction_Event": (
        f"{_EVENT}\ndit_policy_msgs/srv/SetInstruction_Request[<=1] request\n"
        "dit_policy_msgs/srv/SetInstruction_Response[<=1] response"
    ),
}
CONTROLLER_STATES = {
    "humble": f"std_msgs/Header header\nstring[] joint_names\n{_POINTS} desired\n{_POINTS} actual\n{_POINTS} error",
    "kilted": (
        f"std_msgs/Header header\nstring[] joint_names\n{_POINTS} reference\n{_POINTS} feedback\n{_POINTS} error\n"
        f"{_POINTS} output"
    ),
}


def store_with(definitions: Mapping[str, str]) -> Any:
    """A type store with these types too."""
    store = get_typestore(Stores.ROS2_KILTED)
    for name, text in definitions.items():
        store.register(get_types_from_msg(text, name))
    return store


MORE = store_with(DEFINITIONS)


def more_type(name: str, store: Any = MORE) -> Any:
    """A message class of DEFINITIONS."""
    return store.types[_in_rosbags(name, store)]


def _in_rosbags(name: str, store: Any) -> str:
    """rosbags knows pkg/srv/Type_Event as pkg/srv/msg/Type_Event."""
    return name if name in store.types else name.replace("/srv/", "/srv/msg/")


@dataclass(frozen=True)
class Recorded:
    """One message as a recorder gets it; `msgtype` where TYPES does not tell it."""

    topic: str
    receive_ns: int
    msg: Any
    msgtype: str = ""


Edit = Callable[[Recorded], Iterable[Recorded]]


def position(joint: str, seconds: float) -> float:
    """Where a joint is measured to be, rad; `seconds` since the recording's start."""
    return {"lift": 0.5, "turn": 1.0, "reach": -0.7}[joint] * np.sin(1.3 * seconds + len(joint))


def velocity(joint: str, seconds: float) -> float:
    """Its velocity, rad/s."""
    return {"lift": 0.5, "turn": 1.0, "reach": -0.7}[joint] * 1.3 * np.cos(1.3 * seconds + len(joint))


def picture(index: int, width: int, height: int) -> np.ndarray:
    """The index-th picture of a camera: its first pixel says which, a coloured square moves over a slope."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([60 + x, 80 + 2 * y, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    left = index % (width - 10)
    rgb[8:16, left : left + 8] = [(200, 40, 40), (40, 180, 60), (40, 70, 210)][index % 3]
    rgb[0, 0] = index % 256
    return rgb


def stamp(ns: int) -> Any:
    """builtin_interfaces/Time."""
    return STORE.types["builtin_interfaces/msg/Time"](sec=ns // 10**9, nanosec=ns % 10**9)


def header(ns: int) -> Any:
    """std_msgs/Header."""
    return STORE.types["std_msgs/msg/Header"](stamp=stamp(ns), frame_id="")


def with_header_ns(message: Any, ns: int) -> Any:
    """A copy of a message with another header stamp."""
    return replace(message, header=header(ns))


def trajectory(names: list[str], points: list[tuple[float, list[float], list[float]]], ns: int = 0) -> Any:
    """JointTrajectory from (time_from_start, positions, velocities)."""
    duration = STORE.types["builtin_interfaces/msg/Duration"]
    point = STORE.types["trajectory_msgs/msg/JointTrajectoryPoint"]
    none = np.array([])
    return STORE.types["trajectory_msgs/msg/JointTrajectory"](
        header=header(ns),
        joint_names=names,
        points=[
            point(
                positions=np.array(positions),
                velocities=np.array(velocities),
                accelerations=none,
                effort=none,
                time_from_start=duration(sec=int(t), nanosec=round(t % 1 * 1e9)),
            )
            for t, positions, velocities in points
        ],
    )


def robot(seconds: float, instruction: str) -> Iterator[Recorded]:
    """Every message of a recording, unsorted. Stamps and receive times jitter, names are in another order each time."""
    rng = np.random.default_rng(len(instruction))
    string = STORE.types["std_msgs/msg/String"]
    yield Recorded("instruction", START_NS, string(data=instruction))
    for index in range(round(seconds * 15)):
        for topic, width, height in (("side/image_raw", 48, 32), ("hand/image_raw/compressed", 32, 32)):
            stamped = START_NS + round((index / 15 + rng.uniform(0, 0.008)) * 1e9)
            rgb = picture(index, width, height)
            if topic.endswith("compressed"):
                jpeg = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].reshape(-1)
                msg = STORE.types[TYPES[topic]](header(stamped), format="jpeg", data=jpeg)
            else:
                msg = STORE.types[TYPES[topic]](
                    header(stamped), height, width, "rgb8", 0, 3 * width, np.ascontiguousarray(rgb).reshape(-1)
                )
            yield Recorded(topic, stamped + round(rng.uniform(0.002, 0.02) * 1e9), msg)
    names = [*JOINTS, "gripper"]
    for index in range(round(seconds * 50)):
        t = index / 50
        order = rng.permutation(len(names))
        yield Recorded(
            "joint_states",
            START_NS + round((t + rng.uniform(0.0002, 0.004)) * 1e9),
            STORE.types["sensor_msgs/msg/JointState"](
                header(START_NS + round(t * 1e9)),
                name=[names[i] for i in order],
                position=np.array([*(position(j, t) for j in JOINTS), 0.04])[order],
                velocity=np.array([*(velocity(j, t) for j in JOINTS), 0.0])[order],
                effort=np.array([]),
            ),
        )
    for index in range(1, round((seconds - 0.3) * 10)):
        t = index * 0.1 + 0.037
        ahead = [(dt, t + dt + 0.02) for dt in (0.1, 0.2)]
        points = [
            (dt, [position(j, at) for j in ("lift", "turn")], [velocity(j, at) for j in ("lift", "turn")])
            for dt, at in ahead
        ]
        points[-1][2][:] = [0.0, 0.0]
        yield Recorded(
            "arm_controller/joint_trajectory", START_NS + round(t * 1e9), trajectory(["lift", "turn"], points)
        )


def messages(seconds: float = 3.0, instruction: str = "push the red block", edit: Edit | None = None) -> list[Recorded]:
    """A recording's messages in receive order; `edit` may drop, change or add."""
    made = robot(seconds, instruction)
    kept = made if edit is None else (out for message in made for out in edit(message))
    return sorted(kept, key=lambda message: message.receive_ns)


def string(text: str) -> Any:
    """std_msgs/String."""
    return STORE.types["std_msgs/msg/String"](data=text)


def write_bag(
    folder: Path, recorded: Iterable[Recorded], storage: StoragePlugin = StoragePlugin.MCAP, store: Any = STORE
) -> Path:
    """Write a rosbag2 bag; topics get the leading slash that a recorder gives them."""
    recorded = list(recorded)
    types = TYPES | {message.topic: message.msgtype for message in recorded if message.msgtype}
    with Writer(folder, version=9, storage_plugin=storage) as writer:
        connections = {
            topic: writer.add_connection("/" + topic, kind, **_defined(kind, store)) for topic, kind in types.items()
        }
        for message in recorded:
            data = store.serialize_cdr(message.msg, _in_rosbags(types[message.topic], store))
            writer.write(connections[message.topic], message.receive_ns, data)
    return folder


def _defined(kind: str, store: Any) -> dict[str, Any]:
    """How a type is defined in a bag. rosbags cannot write the text of actions' and services' types by itself."""
    if "/msg/" in kind:
        return {"typestore": store}
    needed = ["unique_identifier_msgs/msg/UUID", "trajectory_msgs/msg/JointTrajectoryPoint", "std_msgs/msg/Header"]
    needed += ["service_msgs/msg/ServiceEventInfo"]
    texts = {name: STORE.generate_msgdef(name, ros_version=2)[0] for name in needed}
    texts |= {name: text for name, text in DEFINITIONS.items() if name.rsplit("_", 1)[0] == kind.rsplit("_", 1)[0]}
    parts = [texts.pop(kind), *(f"MSG: {name}\n{text}" for name, text in texts.items())]
    return {"msgdef": f"\n{'=' * 80}\n".join(parts), "rihs01": "not known"}
