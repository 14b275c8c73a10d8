"""ROS messages to arrays, by duck typing: one decoder for the node's messages and for those read from a bag.

A message is anything with the fields of its ROS type (rclpy, rosbags, a test's namespace). What cannot be
decoded faithfully is refused with the topic, the stamp, what was found, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from dit_policy_ros.embodiment import Camera
from dit_policy_ros.runtime.pictures import PictureError, PictureHeader, read_header


@dataclass(frozen=True)
class _Encoding:
    """Bytes a pixel, OpenCV's conversion to RGB (None: it is RGB), and of what the width must be a multiple."""

    channels: int
    conversion: int | None
    width_step: int = 1


# By the names of sensor_msgs/image_encodings. A mosaic's name gives its first 2x2 pixels row by row, as OpenCV's names
# with four letters do; those with two letters, which cv_bridge uses, begin at the second pixel of the second row.
_RAW_ENCODINGS = {
    "rgb8": _Encoding(3, None),
    "bgr8": _Encoding(3, cv2.COLOR_BGR2RGB),
    "rgba8": _Encoding(4, cv2.COLOR_RGBA2RGB),
    "bgra8": _Encoding(4, cv2.COLOR_BGRA2RGB),
    "mono8": _Encoding(1, cv2.COLOR_GRAY2RGB),
    "bayer_rggb8": _Encoding(1, cv2.COLOR_BayerRGGB2RGB),
    "bayer_bggr8": _Encoding(1, cv2.COLOR_BayerBGGR2RGB),
    "bayer_gbrg8": _Encoding(1, cv2.COLOR_BayerGBRG2RGB),
    "bayer_grbg8": _Encoding(1, cv2.COLOR_BayerGRBG2RGB),
    # ITU-R BT.601, Y from 16 to 235, as cv_bridge and v4l2 have it.
    "yuv422": _Encoding(2, cv2.COLOR_YUV2RGB_UYVY, 2),
    "uyvy": _Encoding(2, cv2.COLOR_YUV2RGB_UYVY, 2),
    "yuv422_yuy2": _Encoding(2, cv2.COLOR_YUV2RGB_YUY2, 2),
    "yuyv": _Encoding(2, cv2.COLOR_YUV2RGB_YUY2, 2),
}
_DEPTH_ENCODINGS = ("16uc1", "32fc1", "64fc1", "compresseddepth")


class MessageError(ValueError):
    """A message cannot be used. `code` is the name of the runtime.gate.Verdict that it means."""

    def __init__(self, message: str, code: str = "INPUT_INVALID") -> None:
        super().__init__(message)
        self.code = code


class DamagedError(MessageError):
    """A picture whose bytes are damaged or cut short; the next one may be sound."""


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


def check_image(message: Any, camera: Camera) -> None:
    """Whether an Image or CompressedImage is what the embodiment says of its camera, without decoding a pixel.

    Raises MessageError as `decode_image` does, but for damage that only decoding finds.
    """
    if camera.transport == "compressed":
        _check_compressed(message, camera)
    else:
        _check_raw(message, camera)


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
    encoding = _check_raw(message, camera)
    row, step = camera.width * encoding.channels, int(message.step)
    data = np.frombuffer(message.data, dtype=np.uint8)
    pixels = data.reshape(camera.height, step)[:, :row].reshape(camera.height, camera.width, encoding.channels)
    if encoding.conversion is None:
        return pixels
    return cv2.cvtColor(np.ascontiguousarray(pixels), encoding.conversion)


def _check_raw(message: Any, camera: Camera) -> _Encoding:
    name = str(message.encoding)
    if name not in _RAW_ENCODINGS:
        raise _unsupported(message, camera, name, ", ".join(_RAW_ENCODINGS))
    encoding = _RAW_ENCODINGS[name]
    _check_size(int(message.width), int(message.height), message, camera)
    if camera.width % encoding.width_step:
        found, expected = f"{name} of {camera.width} pixels a row", f"a multiple of {encoding.width_step}"
        raise _error(camera.topic, message, found, expected, "let the camera send rgb8")
    row, step = camera.width * encoding.channels, int(message.step)
    size = len(memoryview(message.data).cast("B"))
    if step < row or size != step * camera.height:
        raise _error(
            camera.topic,
            message,
            f"step {step} and {size} bytes of {name}",
            f"a step of at least {row} and step x {camera.height} bytes",
            "mend the camera's driver",
        )
    return encoding


def _decode_compressed(message: Any, camera: Camera) -> np.ndarray:
    _check_compressed(message, camera)
    data = np.frombuffer(message.data, dtype=np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise _damaged(message, camera, "it cannot be decoded")
    return image


def _check_compressed(message: Any, camera: Camera) -> None:
    # image_transport writes "rgb8; jpeg compressed bgr8"; plain drivers write "jpeg" or "png".
    described = str(message.format)
    words = described.lower()
    if any(depth in words for depth in _DEPTH_ENCODINGS) or not any(kind in words for kind in ("jpeg", "jpg", "png")):
        raise _unsupported(message, camera, described, "jpeg, png")
    try:
        header = read_header(message.data)
    except PictureError as error:
        raise _damaged(message, camera, str(error)) from error
    _check_size(header.width, header.height, message, camera)
    _check_colours(header, message, camera)


def _check_colours(header: PictureHeader, message: Any, camera: Camera) -> None:
    described = str(message.format)
    if header.bits > 8:
        raise _unsupported(message, camera, f"{described} of {header.bits} bits", "jpeg, png")
    if header.channels == 1 and described.lower().startswith("bayer"):
        found = f"a mosaic compressed as a grey picture, '{described}'"
        raise _error(
            camera.topic, message, found, "a colour picture", "put image_proc's debayer before the compression"
        )


def _damaged(message: Any, camera: Camera, reason: str) -> DamagedError:
    found = f"{len(message.data)} bytes of {message.format} that are damaged or cut short: {reason}"
    error = _error(camera.topic, message, found, "a whole image", "look at the camera and the network")
    return DamagedError(str(error))


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
    words = encoding.lower()
    if any(depth in words for depth in _DEPTH_ENCODINGS):
        kind, remedy = "a depth image", "the policy takes no depth: choose the camera's colour topic"
    elif "16" in words or words.endswith("bits"):
        kind, remedy = (
            "more than 8 bits a channel",
            "set the camera to 8 bits, or choose its colour topic if it is depth",
        )
    else:
        kind, remedy = "another encoding", "choose the camera's colour topic, or convert it with image_proc"
    expected = f"a colour image encoded as one of {supported}, 8 bits a channel"
    return _error(camera.topic, message, f"{kind}, '{encoding}'", expected, remedy)


def _error(topic: str, message: Any, found: str, expected: str, remedy: str) -> MessageError:
    stamp = message.header.stamp
    where = f"topic '{topic}', stamp {int(stamp.sec)}.{int(stamp.nanosec):09d}"
    return MessageError(f"{where}: found {found}; expected {expected}; {remedy}")
