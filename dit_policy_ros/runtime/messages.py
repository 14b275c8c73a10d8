"""ROS messages to arrays, by duck typing: one decoder for the node's messages and for those read from a bag.

A message is anything with the fields of its ROS type (rclpy, rosbags, a test's namespace). What cannot be
decoded faithfully is refused with the topic, the stamp, what was found, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from dit_policy_ros.embodiment import Camera

# Encoding of sensor_msgs/Image -> (channels, OpenCV's conversion to RGB; None: it is RGB).
_RAW_ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
}
_DEPTH_ENCODINGS = ("16uc1", "32fc1", "mono16", "compresseddepth")


class MessageError(ValueError):
    """A message cannot be used. `code` is the name of the runtime.gate.Verdict that it means."""

    def __init__(self, message: str, code: str = "INPUT_INVALID") -> None:
        super().__init__(message)
        self.code = code


def stamp_ns(message: Any) -> int:
    """The header stamp in nanoseconds."""
    stamp = message.header.stamp
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def decode_image(message: Any, camera: Camera) -> np.ndarray:
    """Decode an Image or CompressedImage of `camera` to (height, width, 3) uint8 RGB.

    An rgb8 image is returned as a view of the message's data, possibly read-only. Raises MessageError for
    another size, an unsupported encoding, padding that does not add up and data that is damaged.
    """
    if camera.transport == "compressed":
        return _decode_compressed(message, camera)
    return _decode_raw(message, camera)


def decode_joints(message: Any, joints: Sequence[str], topic: str) -> np.ndarray:
    """Positions (J,) float32 of `joints`, found by name in a JointState; other joints and any order are fine.

    Raises MessageError naming the joint that is missing, there twice, or not finite.
    """
    positions = _select(message, "position", joints, topic)
    for joint, value in zip(joints, positions, strict=True):
        if not np.isfinite(value):
            raise _error(
                topic,
                message,
                f"position of '{joint}' is {value}",
                "a finite number",
                "look at the driver or the encoder of this joint",
            )
    return positions.astype(np.float32)


def decode_velocities(message: Any, joints: Sequence[str], topic: str) -> np.ndarray | None:
    """Velocities (J,) float64 of `joints`; None when the message does not measure all of them.

    Not measured means an empty array, or NaN, which joint_state_broadcaster writes for an interface that is
    not there.
    """
    if len(message.velocity) == 0:
        return None
    velocities = _select(message, "velocity", joints, topic)
    return velocities if bool(np.isfinite(velocities).all()) else None


def _select(message: Any, field: str, joints: Sequence[str], topic: str) -> np.ndarray:
    names, values = list(message.name), getattr(message, field)
    if len(values) != len(names):
        raise _error(
            topic,
            message,
            f"{len(names)} names but {len(values)} values in '{field}'",
            "as many as names",
            "mend the publisher of the joint states",
        )
    places = {name: index for index, name in enumerate(names)}
    missing = [joint for joint in joints if joint not in places]
    if missing:
        raise _error(
            topic,
            message,
            f"no {', '.join(missing)}, only {', '.join(names) or 'an empty message'}",
            f"all of {', '.join(joints)}",
            "compare `state.joints` of the embodiment with the robot's joint names",
        )
    if len(places) != len(names):
        doubled = [joint for joint in joints if names.count(joint) > 1]
        if doubled:
            raise _error(topic, message, f"{', '.join(doubled)} twice", "each joint once", "find the second publisher")
    return np.array([values[places[joint]] for joint in joints], dtype=np.float64)


def _decode_raw(message: Any, camera: Camera) -> np.ndarray:
    encoding = str(message.encoding)
    if encoding not in _RAW_ENCODINGS:
        raise _unsupported(message, camera, encoding, ", ".join(_RAW_ENCODINGS))
    _check_size(int(message.width), int(message.height), message, camera)
    channels, conversion = _RAW_ENCODINGS[encoding]
    row, step = camera.width * channels, int(message.step)
    data = np.frombuffer(message.data, dtype=np.uint8)
    if step < row or data.size != step * camera.height:
        raise _error(
            camera.topic,
            message,
            f"step {step} and {data.size} bytes of {encoding}",
            f"a step of at least {row} and step x {camera.height} bytes",
            "mend the camera's driver",
        )
    pixels = data.reshape(camera.height, step)[:, :row].reshape(camera.height, camera.width, channels)
    return pixels if conversion is None else cv2.cvtColor(np.ascontiguousarray(pixels), conversion)


def _decode_compressed(message: Any, camera: Camera) -> np.ndarray:
    # image_transport writes "rgb8; jpeg compressed bgr8"; plain drivers write "jpeg" or "png".
    described = str(message.format)
    words = described.lower()
    if any(depth in words for depth in _DEPTH_ENCODINGS) or not any(kind in words for kind in ("jpeg", "jpg", "png")):
        raise _unsupported(message, camera, described, "jpeg, png")
    data = np.frombuffer(message.data, dtype=np.uint8)
    damaged = f"{data.size} bytes of {described} that are damaged or cut short"
    image = None
    if data.size:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise _error(camera.topic, message, damaged, "a whole image", "look at the camera and the network")
    _check_size(image.shape[1], image.shape[0], message, camera)
    return image


def _check_size(width: int, height: int, message: Any, camera: Camera) -> None:
    if (width, height) != (camera.width, camera.height):
        raise _error(
            camera.topic,
            message,
            f"an image of {width}x{height} pixels",
            f"{camera.width}x{camera.height} as the embodiment says of camera '{camera.name}'",
            "set the camera to that size, or train for the new one",
        )


def _unsupported(message: Any, camera: Camera, encoding: str, supported: str) -> MessageError:
    kind = "a depth image, encoding" if any(d in encoding.lower() for d in _DEPTH_ENCODINGS) else "encoding"
    return _error(
        camera.topic,
        message,
        f"{kind} '{encoding}'",
        f"a colour image encoded as one of {supported}",
        "choose the camera's colour topic, or convert it with image_proc",
    )


def _error(topic: str, message: Any, found: str, expected: str, remedy: str) -> MessageError:
    stamp = message.header.stamp
    where = f"topic '{topic}', stamp {int(stamp.sec)}.{int(stamp.nanosec):09d}"
    return MessageError(f"{where}: found {found}; expected {expected}; {remedy}")
