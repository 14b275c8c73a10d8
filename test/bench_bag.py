"""A generated recording as a lab makes it: two cameras 640x480 at 30 Hz, seven joints at 100 Hz, and their commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

WIDTH, HEIGHT, FPS = 640, 480, 30
JOINTS = tuple(f"joint_{number}" for number in range(1, 8))
START_NS = 1_700_000_000_000_000_000
TRANSPORTS = {"raw": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}
STORE = get_typestore(Stores.ROS2_KILTED)
TYPES = STORE.types
JPEG_QUALITY = 90
LOOP = 150  # pictures of a camera; a longer recording shows them again, forwards and backwards


@dataclass(frozen=True)
class Robot:
    """How the two cameras send their pictures: raw or compressed."""

    transports: tuple[str, str] = ("raw", "compressed")

    @property
    def topics(self) -> tuple[str, str]:
        """The cameras' topics."""
        ends = {"raw": "image_raw", "compressed": "image_raw/compressed"}
        left, right = (f"{side}/{ends[kind]}" for side, kind in zip(("left", "right"), self.transports, strict=True))
        return left, right

    def embodiment(self) -> str:
        """The robot's description, YAML."""
        size = f"width: {WIDTH}, height: {HEIGHT}, max_age: 0.2"
        cameras = "\n".join(
            f"  {topic.split('/')[0]}: {{topic: {topic}, transport: {kind}, {size}}}"
            for topic, kind in zip(self.topics, self.transports, strict=True)
        )
        joints = ", ".join(JOINTS)
        limits = "\n".join(f"      {name}: {{position: [-3, 3], velocity: 3.0, acceleration: 20.0}}" for name in JOINTS)
        return f"""name: bench
fps: {FPS}
instruction: {{topic: instruction}}
cameras:
{cameras}
max_camera_skew: 0.1
state: {{topic: joint_states, joints: [{joints}], max_age: 0.2}}
action_groups:
  arm:
    topic: arm_controller/joint_trajectory
    interface: trajectory
    joints:
{limits}
"""


def write_bag(folder: Path, seconds: float, robot: Robot, seed: int = 0) -> Path:
    """An mcap bag of that length; the same seed gives the same bag."""
    cameras = [list(movie(min(LOOP, round(seconds * FPS)), seed + side)) for side in (0, 1000)]
    pictures = [_messages(frames, kind) for frames, kind in zip(cameras, robot.transports, strict=True)]
    types = dict(zip(robot.topics, (TRANSPORTS[kind] for kind in robot.transports), strict=True))
    types |= {"joint_states": "sensor_msgs/msg/JointState", "instruction": "std_msgs/msg/String"}
    types |= {"arm_controller/joint_trajectory": "trajectory_msgs/msg/JointTrajectory"}
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {
            topic: writer.add_connection("/" + topic, kind, typestore=STORE) for topic, kind in types.items()
        }
        for ns, topic, message in _recorded(seconds, robot, pictures):
            writer.write(connections[topic], ns, STORE.serialize_cdr(message, types[topic]))
    return folder


def movie(frames: int, seed: int) -> Iterator[np.ndarray]:
    """(480, 640, 3) uint8: a textured background that sways, a textured block that circles, a camera's noise."""
    rng = np.random.default_rng(seed)
    wide, block = _texture(HEIGHT, WIDTH + 200, rng), _texture(120, 120, rng)
    for index in range(frames):
        sway = int(100 + 90 * np.sin(index / 40))
        picture = wide[:, sway : sway + WIDTH].copy()
        x, y = int(WIDTH / 2 + 200 * np.sin(index / 15)), int(HEIGHT / 2 + 120 * np.cos(index / 22))
        picture[y - 60 : y + 60, x - 60 : x + 60] = block
        yield cv2.add(picture, rng.integers(0, 6, picture.shape, dtype=np.uint8))


def _texture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of four sizes, the coarse ones strongest, as natural pictures have it."""
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((6, 90), (20, 50), (70, 25), (200, 10)):
        coarse = rng.uniform(-1, 1, (cells * height // width + 2, cells + 2, 3)).astype(np.float32)
        picture += strength * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture + 128, 0, 255).astype(np.uint8)


def _messages(frames: list[np.ndarray], transport: str) -> list[Any]:
    """Pictures as messages, still without their stamps."""
    if transport == "raw":
        return [frame.reshape(-1) for frame in frames]
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    return [cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), options)[1].reshape(-1) for frame in frames]


def _recorded(seconds: float, robot: Robot, pictures: list[list[Any]]) -> Iterator[tuple[int, str, Any]]:
    """(receive time, topic, message) in order: at each 10 ms the joints, at their times pictures and commands."""
    yield START_NS, "instruction", TYPES["std_msgs/msg/String"](data="push the block to the line")
    shown = 0
    for step in range(round(seconds * 100)):
        ns = START_NS + step * 10_000_000
        yield ns + 500_000, "joint_states", _joint_state(ns)
        if step % 10 == 0:
            yield ns + 600_000, "arm_controller/joint_trajectory", _command(ns)
        while shown / FPS <= step / 100 and shown < seconds * FPS:
            stamp = START_NS + round(shown * 1e9 / FPS)
            for topic, transport, loop in zip(robot.topics, robot.transports, pictures, strict=True):
                turn = shown % (2 * len(loop))
                yield ns + 3_000_000, topic, _image(loop[min(turn, 2 * len(loop) - 1 - turn)], transport, stamp)
            shown += 1


def _header(ns: int) -> Any:
    stamp = TYPES["builtin_interfaces/msg/Time"](sec=ns // 10**9, nanosec=ns % 10**9)
    return TYPES["std_msgs/msg/Header"](stamp=stamp, frame_id="camera")


def _image(data: np.ndarray, transport: str, ns: int) -> Any:
    if transport == "raw":
        return TYPES[TRANSPORTS[transport]](_header(ns), HEIGHT, WIDTH, "rgb8", 0, 3 * WIDTH, data)
    return TYPES[TRANSPORTS[transport]](_header(ns), format="jpeg", data=data)


def _positions(ns: int) -> np.ndarray:
    return 0.8 * np.sin((ns - START_NS) / 1e9 + np.arange(len(JOINTS)))


def _joint_state(ns: int) -> Any:
    velocity = 0.8 * np.cos((ns - START_NS) / 1e9 + np.arange(len(JOINTS)))
    effort = np.zeros(len(JOINTS))
    kind = TYPES["sensor_msgs/msg/JointState"]
    return kind(_header(ns), name=list(JOINTS), position=_positions(ns), velocity=velocity, effort=effort)


def _command(ns: int) -> Any:
    none = np.array([])
    points = [
        TYPES["trajectory_msgs/msg/JointTrajectoryPoint"](
            positions=_positions(ns + after),
            velocities=none,
            accelerations=none,
            effort=none,
            time_from_start=TYPES["builtin_interfaces/msg/Duration"](sec=0, nanosec=after),
        )
        for after in (100_000_000, 200_000_000)
    ]
    return TYPES["trajectory_msgs/msg/JointTrajectory"](_header(0), joint_names=list(JOINTS), points=points)
