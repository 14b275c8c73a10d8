"""Depth pictures to metres, by one rule for the whole dataset: nothing is scaled frame by frame.

A pixel without a measurement is 0 m here: 16UC1's 0 and 32FC1's NaN (REP 118), and what is too near for the sensor
(-inf). Too far (+inf) is `depth_max`. A LeRobot video keeps depth as 12-bit codes from `depth_min` to `depth_max` of
the dataset's feature, so that a pixel without a measurement reads back as `depth_min`, as does what is nearer, and what
is farther than `depth_max` as `depth_max`: who trains on depth takes both ends as not measured. Pictures in the table
keep the metres.
"""

import struct
from typing import Any

import cv2
import numpy as np

from dit_policy_ros.runtime.messages import DamagedError, MessageError
from dit_policy_training.conversion.options import DepthCamera
from dit_policy_training.conversion.vectors import when

_RAW: dict[str, np.dtype] = {"16UC1": np.dtype("u2"), "mono16": np.dtype("u2"), "32FC1": np.dtype("f4")}
# compressed_depth_image_transport's header before the PNG: format (enum), then the quantisation's A and B.
_HEADER = struct.Struct("<iff")


def decode_depth(message: Any, camera: DepthCamera) -> np.ndarray:
    """A depth Image or CompressedImage to (height, width) float32 metres, all finite.

    Raises MessageError for another size or encoding and for a negative depth, DamagedError for a picture that is
    damaged or cut short.
    """
    metres = _compressed(message, camera) if camera.transport == "compressed" else _raw(message, camera)
    if metres.shape != (camera.height, camera.width):
        found = f"a depth image of {metres.shape[1]}x{metres.shape[0]} pixels"
        raise MessageError(_words(message, camera, found, f"{camera.width}x{camera.height} as --depth says"))
    metres = np.nan_to_num(metres, copy=False, nan=0.0, neginf=0.0, posinf=camera.depth_max)
    if (metres < 0).any():
        raise MessageError(_words(message, camera, f"a depth of {metres.min()} m", "0 m or more"))
    return metres


def _raw(message: Any, camera: DepthCamera) -> np.ndarray:
    encoding = str(message.encoding)
    if encoding not in _RAW:
        raise MessageError(_words(message, camera, f"encoding '{encoding}'", "16UC1 (mm) or 32FC1 (m)"))
    kind = _RAW[encoding].newbyteorder(">" if message.is_bigendian else "<")
    width, height, step = int(message.width), int(message.height), int(message.step)
    data = np.frombuffer(message.data, dtype=np.uint8)
    if step < width * kind.itemsize or data.size != step * height:
        expected = f"a step of at least {width * kind.itemsize} and step x {height} bytes"
        raise MessageError(_words(message, camera, f"step {step} and {data.size} bytes of {encoding}", expected))
    rows = data.reshape(height, step)[:, : width * kind.itemsize]
    return _metres(np.ascontiguousarray(rows).view(kind))


def _compressed(message: Any, camera: DepthCamera) -> np.ndarray:
    described = str(message.format)
    encoding, data = described.split(";")[0].strip(), bytes(message.data)
    if encoding not in _RAW or "compresseddepth" not in described.lower():
        expected = "'16UC1; compressedDepth' or '32FC1; compressedDepth', with PNG"
        raise MessageError(_words(message, camera, f"format '{described}'", expected))
    if "rvl" in described.lower():
        raise MessageError(_words(message, camera, "RVL compression", "PNG (the transport's parameter `format`)"))
    if len(data) <= _HEADER.size:
        raise DamagedError(_words(message, camera, f"{len(data)} bytes that are cut short", "a whole image"))
    codes = cv2.imdecode(np.frombuffer(data, np.uint8, offset=_HEADER.size), cv2.IMREAD_UNCHANGED)
    if codes is None or codes.ndim != 2:
        raise DamagedError(_words(message, camera, f"{len(data)} bytes that are damaged", "a whole PNG of one channel"))
    if encoding != "32FC1":
        return _metres(codes)
    if codes.dtype != np.uint16:
        raise MessageError(_words(message, camera, "an 8-bit PNG", "a 16-bit one"))
    _, a, b = _HEADER.unpack_from(data)
    return _unquantised(codes, a, b)


def _unquantised(codes: np.ndarray, a: float, b: float) -> np.ndarray:
    """Metres of the transport's codes: it writes A / depth + B, and 0 for what it did not measure."""
    codes = codes.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        metres = np.float32(a) / (codes - np.float32(b))
    return np.where(codes == 0, np.float32(0), metres).astype(np.float32)


def _metres(depth: np.ndarray) -> np.ndarray:
    if depth.dtype.kind == "u":
        return depth.astype(np.float32) / np.float32(1000)
    return depth.astype(np.float32)


def _words(message: Any, camera: DepthCamera, found: str, expected: str) -> str:
    return f"{camera.topic}, {when(message)}: found {found}; expected {expected}"
