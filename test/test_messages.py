"""Decoding by duck typing: namespaces, rosbags' messages and rclpy's give the same arrays; the rest is refused."""

from __future__ import annotations

import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from rosbags.typesys import Stores, get_typestore

from dit_policy_ros.embodiment import Camera
from dit_policy_ros.runtime.messages import (
    MessageError,
    check_image,
    decode_image,
    decode_joints,
    decode_velocities,
    stamp_ns,
)

RAW = Camera("top", "top/image_raw", "raw", 6, 4, 0.3)
COMPRESSED = Camera("wrist", "wrist/compressed", "compressed", 48, 32, 0.3)
RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def header(sec: int = 12, nanosec: int = 34) -> SimpleNamespace:
    return SimpleNamespace(stamp=SimpleNamespace(sec=sec, nanosec=nanosec), frame_id="")


def raw(data: Any, encoding: str = "rgb8", width: int = 6, height: int = 4, step: int | None = None) -> SimpleNamespace:
    step = len(data) // height if step is None else step
    return SimpleNamespace(
        header=header(), height=height, width=width, encoding=encoding, is_bigendian=0, step=step, data=data
    )


def compressed(data: Any, format: str = "jpeg") -> SimpleNamespace:
    return SimpleNamespace(header=header(), format=format, data=data)


def gradient() -> np.ndarray:
    """Smooth and different in each channel, so that a swapped channel cannot hide in JPEG's loss."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[..., 0] = np.linspace(0, 250, 48)
    image[..., 1] = np.linspace(250, 100, 32)[:, None]
    image[..., 2] = 40
    return image


def jpeg() -> bytes:
    done, data = cv2.imencode(".jpg", gradient()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert done
    return data.tobytes()


def png(image: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)
    assert done
    return data.tobytes()


def test_stamp_in_nanoseconds() -> None:
    assert stamp_ns(raw(RGB.tobytes())) == 12_000_000_034


@pytest.mark.parametrize(
    "wrap",
    [bytes, lambda data: array.array("B", data), lambda data: np.frombuffer(data, np.uint8)],
    ids=["bytes", "array.array", "read-only numpy"],
)
def test_data_may_be_any_buffer(wrap: Any) -> None:
    assert np.array_equal(decode_image(raw(wrap(RGB.tobytes())), RAW), RGB)


def test_rgb8_is_not_copied() -> None:
    data = np.frombuffer(RGB.tobytes(), np.uint8)
    assert np.shares_memory(decode_image(raw(data), RAW), data)


@pytest.mark.parametrize(
    ("encoding", "pixels"),
    [
        ("bgr8", RGB[..., ::-1]),
        ("rgba8", np.dstack([RGB, np.full((4, 6), 9, np.uint8)])),
        ("bgra8", np.dstack([RGB[..., ::-1], np.full((4, 6), 9, np.uint8)])),
    ],
)
def test_colour_encodings_become_rgb(encoding: str, pixels: np.ndarray) -> None:
    assert np.array_equal(decode_image(raw(pixels.tobytes(), encoding), RAW), RGB)


def test_mono_is_spread_over_the_channels() -> None:
    grey = RGB[..., 0]
    image = decode_image(raw(grey.tobytes(), "mono8"), RAW)
    assert image.shape == (4, 6, 3)
    assert all(np.array_equal(image[..., channel], grey) for channel in range(3))


def test_padded_rows() -> None:
    rows = np.full((4, 24), 255, np.uint8)
    rows[:, :18] = RGB.reshape(4, 18)
    assert np.array_equal(decode_image(raw(rows.tobytes(), step=24), RAW), RGB)
    bgr = np.full((4, 24), 255, np.uint8)
    bgr[:, :18] = RGB[..., ::-1].reshape(4, 18)
    assert np.array_equal(decode_image(raw(bgr.tobytes(), "bgr8", step=24), RAW), RGB)


# What stands at the four places of the first 2x2 pixels, row by row, as sensor_msgs/image_encodings names them.
MOSAICS = ["rggb", "bggr", "gbrg", "grbg"]


@pytest.mark.parametrize("mosaic", MOSAICS)
def test_a_mosaic_of_one_colour_becomes_that_colour(mosaic: str) -> None:
    colour = {"r": 200, "g": 90, "b": 30}
    tile = np.array([[colour[mosaic[0]], colour[mosaic[1]]], [colour[mosaic[2]], colour[mosaic[3]]]], np.uint8)
    camera = replace(RAW, width=12, height=8)
    image = decode_image(raw(np.tile(tile, (4, 6)).tobytes(), f"bayer_{mosaic}8", 12, 8), camera)
    assert image.shape == (8, 12, 3)
    assert np.unique(image.reshape(-1, 3), axis=0).tolist() == [[200, 90, 30]]


def to_yuv(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """ITU-R BT.601 with Y from 16 to 235, from its constants Kr = 0.299 and Kb = 0.114."""
    red, green, blue = (value / 255 for value in colour)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    u, v = (blue - luma) / (2 * (1 - 0.114)), (red - luma) / (2 * (1 - 0.299))
    return round(16 + 219 * luma), round(128 + 224 * u), round(128 + 224 * v)


@pytest.mark.parametrize(
    ("encoding", "order"),
    [("yuv422", "u0v1"), ("uyvy", "u0v1"), ("yuv422_yuy2", "0u1v"), ("yuyv", "0u1v")],
)
def test_yuv422_becomes_the_colour_it_was_made_from(encoding: str, order: str) -> None:
    orange, grey = (220, 120, 40), (100, 100, 100)
    pixels = []
    for colour in (orange, grey, orange):
        y, u, v = to_yuv(colour)
        pixels += [{"0": y, "1": y, "u": u, "v": v}[part] for part in order]
    image = decode_image(raw(bytes(pixels) * 4, encoding), RAW).astype(int)
    expected = np.repeat([orange, grey, orange], 2, axis=0)
    assert np.abs(image - expected[None]).max() <= 3


@pytest.mark.parametrize(("encoding", "order"), [("uyvy", "u0v1"), ("yuyv", "0u1v")])
def test_the_two_pixels_of_a_yuv_pair_keep_their_places(encoding: str, order: str) -> None:
    pair = [{"0": 235, "1": 16, "u": 128, "v": 128}[part] for part in order]  # white, black
    image = decode_image(raw(bytes(pair * 3) * 4, encoding), RAW)
    assert image[0, :, 0].tolist() == [255, 0, 255, 0, 255, 0]


@pytest.mark.parametrize("encoding", ["bayer_rggb8", "uyvy"])
def test_padded_rows_of_mosaics_and_yuv(encoding: str) -> None:
    row = 6 if encoding == "bayer_rggb8" else 12
    rows = np.random.default_rng(0).integers(0, 256, (4, row), dtype=np.uint8)
    padded = np.full((4, 16), 255, np.uint8)
    padded[:, :row] = rows
    expected = decode_image(raw(rows.tobytes(), encoding), RAW)
    assert np.array_equal(decode_image(raw(padded.tobytes(), encoding, step=16), RAW), expected)


def test_jpeg_and_png_become_rgb() -> None:
    image = decode_image(compressed(jpeg(), "rgb8; jpeg compressed bgr8"), COMPRESSED)
    assert image.shape == (32, 48, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - gradient()).mean() < 4
    assert np.array_equal(decode_image(compressed(png(gradient()), "png"), COMPRESSED), gradient())


@pytest.mark.parametrize("options", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 1]])
def test_jpegs_of_other_kinds_and_padded_ones(options: list[int]) -> None:
    done, data = cv2.imencode(".jpg", gradient()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95, *options])
    assert done
    for padding in (0, 3, 4096):
        message = compressed(data.tobytes() + bytes(padding))
        check_image(message, COMPRESSED)
        assert np.abs(decode_image(message, COMPRESSED).astype(int) - gradient()).mean() < 4


def test_a_grey_picture_is_spread_over_the_channels() -> None:
    image = decode_image(compressed(png(gradient()[..., 0]), "mono8; png compressed "), COMPRESSED)
    assert all(np.array_equal(image[..., channel], gradient()[..., 0]) for channel in range(3))


def test_a_picture_cut_anywhere_is_found_without_decoding() -> None:
    for whole, kind in ((jpeg(), "jpeg"), (png(gradient()), "png")):
        check_image(compressed(whole, kind), COMPRESSED)
        for length in range(len(whole) - (1 if kind == "jpeg" else 4)):
            with pytest.raises(MessageError):
                check_image(compressed(whole[:length], kind), COMPRESSED)


def test_a_thumbnails_end_is_not_the_pictures() -> None:
    whole = jpeg()
    thumbnail = b"\xff\xe1" + (2 + len(whole)).to_bytes(2) + whole
    check_image(compressed(whole[:2] + thumbnail + whole[2:]), COMPRESSED)
    with pytest.raises(MessageError, match="without its end"):
        check_image(compressed(whole[:2] + thumbnail + whole[2:-2]), COMPRESSED)


@pytest.mark.parametrize(
    ("message", "camera", "words"),
    [
        (raw(bytes(36), "nv12"), RAW, ["another encoding, 'nv12'", "rgb8, bgr8, rgba8, bgra8, mono8, bayer_rggb8"]),
        (raw(bytes(48), "16UC1"), RAW, ["depth", "16UC1", "the policy takes no depth"]),
        (raw(bytes(48), "mono16"), RAW, ["more than 8 bits", "'mono16'"]),
        (raw(bytes(144), "rgb16"), RAW, ["more than 8 bits", "'rgb16'"]),
        (raw(bytes(48), "bayer_rggb16"), RAW, ["more than 8 bits", "'bayer_rggb16'"]),
        (raw(bytes(24), "bayer_rggb8", step=5), RAW, ["step 5"]),
        (raw(bytes(24), "uyvy"), RAW, ["step 6", "at least 12"]),
        (raw(bytes(40), "yuyv", width=5), replace(RAW, width=5), ["5 pixels a row", "multiple of 2"]),
        (raw(bytes(96), "32FC1"), RAW, ["depth", "32FC1"]),
        (raw(bytes(72), width=3, height=8), RAW, ["3x8", "6x4", "camera 'top'", "set the camera"]),
        (raw(bytes(71), step=18), RAW, ["71 bytes", "18"]),
        (raw(bytes(68), step=17), RAW, ["step 17"]),
        (raw(b"", step=0), RAW, ["step 0"]),
        (compressed(jpeg(), "16UC1; compressedDepth png"), COMPRESSED, ["depth", "jpeg, png"]),
        (compressed(jpeg(), "theora"), COMPRESSED, ["theora", "jpeg, png"]),
        (compressed(b""), COMPRESSED, ["damaged or cut short"]),
        (compressed(b"\x00garbage\xff\xd9"), COMPRESSED, ["damaged or cut short"]),
        (compressed(jpeg()[:-200]), COMPRESSED, ["damaged or cut short"]),
        (
            compressed(jpeg()),
            Camera("wrist", "wrist/compressed", "compressed", 32, 48, 0.3),
            ["48x32", "32x48"],
        ),
        (compressed(jpeg()[2:]), COMPRESSED, ["damaged or cut short", "neither JPEG nor PNG"]),
        (compressed(jpeg()[:60]), COMPRESSED, ["damaged or cut short", "cut in its header"]),
        (compressed(png(gradient())[:-5], "png"), COMPRESSED, ["damaged or cut short", "without its end"]),
        (compressed(png(gradient())[:20], "png"), COMPRESSED, ["damaged or cut short", "cut or damaged in its header"]),
        (compressed(png(np.zeros((32, 48), np.uint16)), "png"), COMPRESSED, ["more than 8 bits", "png of 16 bits"]),
        (compressed(png(gradient()[..., 0]), "bayer_rggb8; png compressed "), COMPRESSED, ["mosaic", "debayer"]),
    ],
)
def test_what_cannot_be_decoded_faithfully_is_refused(message: Any, camera: Camera, words: list[str]) -> None:
    for look in (decode_image, check_image):
        with pytest.raises(MessageError) as caught:
            look(message, camera)
        assert caught.value.code == "INPUT_INVALID"
        for word in [camera.topic, "12.000000034", *words]:
            assert word in str(caught.value)


def joint_state(names: list[str], position: Any, velocity: Any = ()) -> SimpleNamespace:
    return SimpleNamespace(header=header(), name=names, position=position, velocity=velocity, effort=[])


def test_joints_are_found_by_name() -> None:
    message = joint_state(["finger", "b", "a"], array.array("d", [9.0, 2.5, 1.5]))
    values = decode_joints(message, ("a", "b"), "joint_states")
    assert values.dtype == np.float32
    assert values.tolist() == [1.5, 2.5]


def test_a_joint_not_asked_for_may_be_anything() -> None:
    message = joint_state(["x", "a", "x"], [np.nan, 1.0, np.inf])
    assert decode_joints(message, ("a",), "joint_states").tolist() == [1.0]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (joint_state(["a", "c"], [1.0, 2.0]), ["no b", "only a, c"]),
        (joint_state(["a", "b"], [1.0, np.nan]), ["'b'", "nan"]),
        (joint_state(["a", "b"], [np.inf, 1.0]), ["'a'", "inf"]),
        (joint_state(["a", "b"], [1.0]), ["2 names", "1 values"]),
        (joint_state(["a", "b"], []), ["0 values", "position"]),
        (joint_state(["a", "b", "a"], [1.0, 2.0, 3.0]), ["a twice"]),
        (joint_state([], []), ["no a, b", "an empty message"]),
    ],
)
def test_bad_joint_states_are_refused(message: Any, words: list[str]) -> None:
    with pytest.raises(MessageError) as caught:
        decode_joints(message, ("a", "b"), "robot/joint_states")
    for word in ["robot/joint_states", "12.000000034", *words]:
        assert word in str(caught.value)


def test_velocities_are_optional() -> None:
    assert decode_velocities(joint_state(["a", "b"], [1.0, 2.0]), ("b",), "t") is None
    assert decode_velocities(joint_state(["a", "b"], [1.0, 2.0], [0.1, np.nan]), ("b",), "t") is None
    measured = decode_velocities(joint_state(["a", "b"], [1.0, 2.0], [0.1, 0.2]), ("b", "a"), "t")
    assert measured is not None
    assert measured.tolist() == [0.2, 0.1]
    with pytest.raises(MessageError, match="velocity"):
        decode_velocities(joint_state(["a", "b"], [1.0, 2.0], [0.1]), ("b",), "t")


def test_messages_of_a_bag() -> None:
    store = get_typestore(Stores.ROS2_KILTED)
    types = store.types
    head = types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](12, 34), "")

    def through_cdr(name: str, *fields: Any) -> Any:
        return store.deserialize_cdr(store.serialize_cdr(types[name](head, *fields), name), name)

    image = through_cdr("sensor_msgs/msg/Image", 4, 6, "rgb8", 0, 18, RGB.reshape(-1))
    assert stamp_ns(image) == 12_000_000_034
    assert np.array_equal(decode_image(image, RAW), RGB)

    small = through_cdr("sensor_msgs/msg/CompressedImage", "jpeg", np.frombuffer(jpeg(), np.uint8))
    assert np.array_equal(decode_image(small, COMPRESSED), decode_image(compressed(jpeg()), COMPRESSED))

    empty = np.zeros(0)
    joints = through_cdr("sensor_msgs/msg/JointState", ["b", "a"], np.array([2.0, 1.0]), empty, empty)
    assert decode_joints(joints, ("a", "b"), "joint_states").tolist() == [1.0, 2.0]
    assert decode_velocities(joints, ("a", "b"), "joint_states") is None


@pytest.mark.ros
def test_messages_of_rclpy() -> None:
    msg = pytest.importorskip("sensor_msgs.msg", reason="no ROS messages for Python here")
    image = msg.Image(height=4, width=6, encoding="rgb8", step=18, data=array.array("B", RGB.tobytes()))
    image.header.stamp.sec, image.header.stamp.nanosec = 12, 34
    assert stamp_ns(image) == 12_000_000_034
    assert np.array_equal(decode_image(image, RAW), RGB)

    small = msg.CompressedImage(format="jpeg", data=array.array("B", jpeg()))
    assert np.array_equal(decode_image(small, COMPRESSED), decode_image(compressed(jpeg()), COMPRESSED))

    joints = msg.JointState(name=["b", "a"], position=[2.0, 1.0])
    assert decode_joints(joints, ("a", "b"), "joint_states").tolist() == [1.0, 2.0]
    assert decode_velocities(joints, ("a", "b"), "joint_states") is None
