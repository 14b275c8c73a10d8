"""Depth pictures of every kind, from the pixels that were meant to what LeRobot gives back."""

import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from dit_policy_training.conversion.options import DepthCamera, TimeOptions
from sampled import sample, seconds
from toy_robot import START_NS, STORE, Recorded, header, messages

from dit_policy_ros.embodiment import Embodiment

WIDTH, HEIGHT, STEP_NS = 24, 16, 66_666_667
TOPIC = "below/depth"
CAMERA = DepthCamera(TOPIC, "raw", WIDTH, HEIGHT, 0.3, depth_min=0.1, depth_max=6.0)


def true_depth(number: int) -> np.ndarray:
    """Metres, whole mm; pixel (0, 0) is not measured."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    mm = 400 + 10 * x + 3 * y + 7 * number
    mm[0, 0] = 0
    return mm / 1000


def raw(number: int, ns: int, encoding: str = "16UC1", big: bool = False, pad: int = 0) -> Any:
    depth = true_depth(number)
    kind = np.dtype("u2" if encoding == "16UC1" else "f4").newbyteorder(">" if big else "<")
    pixels = (depth * 1000).round().astype(kind) if encoding == "16UC1" else depth.astype(kind)
    if encoding == "32FC1":
        pixels[0, 0] = np.nan
        pixels[0, 1], pixels[0, 2] = np.inf, -np.inf
    rows = np.hstack([pixels.view(np.uint8).reshape(HEIGHT, -1), np.full((HEIGHT, pad), 255, np.uint8)])
    image = STORE.types["sensor_msgs/msg/Image"]
    return image(header(ns), HEIGHT, WIDTH, encoding, int(big), rows.shape[1], rows.reshape(-1))


def compressed(number: int, ns: int, encoding: str = "16UC1") -> Any:
    """As compressed_depth_image_transport writes it: inverse depth in 16 bits for 32FC1."""
    depth = true_depth(number)
    a = b = 0.0
    codes = (depth * 1000).round().astype(np.uint16)
    if encoding == "32FC1":
        z0, most = 100.0, 10.0
        a = z0 * (z0 + 1)
        b = 1 - a / most
        with np.errstate(divide="ignore"):
            codes = np.where(depth > 0, a / depth + b, 0).astype(np.uint16)
    png = cv2.imencode(".png", codes)[1].tobytes()
    data = np.frombuffer(struct.pack("<iff", 0, a, b) + png, np.uint8)
    return STORE.types["sensor_msgs/msg/CompressedImage"](header(ns), f"{encoding}; compressedDepth png", data)


def with_depth(make: Callable[[int, int], Any], msgtype: str, length: float = 1.5) -> list[Recorded]:
    def edit(m: Recorded) -> Iterable[Recorded]:
        if m.topic == "instruction":
            for number in range(round(length * 15)):
                ns = START_NS + number * STEP_NS
                yield Recorded(TOPIC, ns + 5_000_000, make(number, ns), msgtype)
        yield m

    return messages(length, edit=edit)


IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"


@pytest.mark.parametrize(
    ("make", "transport", "atol"),
    [
        (raw, "raw", 0),
        (lambda n, ns: raw(n, ns, big=True), "raw", 0),
        (lambda n, ns: raw(n, ns, pad=10), "raw", 0),
        (lambda n, ns: raw(n, ns, "32FC1"), "raw", 0),
        (lambda n, ns: raw(n, ns, "32FC1", big=True, pad=4), "raw", 0),
        (compressed, "compressed", 0),
        # Its codes are whole numbers of a / depth: half a step of depth^2 / a.
        (lambda n, ns: compressed(n, ns, "32FC1"), "compressed", 1.1 * 0.9**2 / 10100),
    ],
)
def test_depth_in_metres_from_every_kind(
    embodiment: Embodiment, tmp_path: Path, make: Callable[[int, int], Any], transport: str, atol: float
) -> None:
    kind = IMAGE if transport == "raw" else COMPRESSED
    camera = replace(CAMERA, transport=transport)
    sampled = sample(tmp_path, with_depth(make, kind), embodiment, depth={"below": camera})
    assert len(sampled.rows) > 10
    for row in sampled.rows:
        seen = row.frame["observation.images.below"]
        assert seen.dtype == np.float32
        number = (row.stamp_ns - START_NS) // STEP_NS
        expected = true_depth(number).astype(np.float32)
        if kind == IMAGE and str(make(0, 0).encoding) == "32FC1":
            expected[0, 1], expected[0, 2] = 6.0, 0.0  # too far, and too near
        np.testing.assert_allclose(seen, expected, rtol=0, atol=atol)
        assert row.ages["below"] == pytest.approx((row.stamp_ns - START_NS - number * STEP_NS) / 1e9)


def test_the_nearest_depth_picture(embodiment: Embodiment, tmp_path: Path) -> None:
    options = TimeOptions(sampling={"below": "nearest"})
    recorded = with_depth(raw, IMAGE)
    for row in sample(tmp_path, recorded, embodiment, depth={"below": CAMERA}, time=options).rows:
        number = round((row.stamp_ns - START_NS) / STEP_NS)
        np.testing.assert_array_equal(row.frame["observation.images.below"], true_depth(number).astype(np.float32))


def test_a_cut_depth_picture_is_a_gap(embodiment: Embodiment, tmp_path: Path) -> None:
    def cut(number: int, ns: int) -> Any:
        message = compressed(number, ns)
        return replace(message, data=message.data[:60]) if 0.6 < seconds(ns) < 0.8 else message

    camera = replace(CAMERA, transport="compressed")
    sampled = sample(tmp_path, with_depth(cut, COMPRESSED, 2.0), embodiment, depth={"below": camera})
    assert [(gap.stream, gap.kind) for gap in sampled.account.gaps] == [("below", "damaged")]


def colour(number: int, ns: int) -> Any:
    return replace(raw(number, ns), encoding="rgb8")


def small(number: int, ns: int) -> Any:
    return replace(raw(number, ns), height=8, data=raw(number, ns).data[: 8 * WIDTH * 2])


def rvl(number: int, ns: int) -> Any:
    return replace(compressed(number, ns), format="16UC1; compressedDepth rvl")


def jpeg(number: int, ns: int) -> Any:
    return replace(compressed(number, ns), format="rgb8; jpeg compressed bgr8")


@pytest.mark.parametrize(
    ("make", "transport", "said"),
    [
        (colour, "raw", r"below/depth, stamp 1700000000\.\d{9}: found encoding 'rgb8'; expected 16UC1 \(mm\) or 32FC1"),
        (small, "raw", r"below/depth.*24x8 pixels; expected 24x16 as --depth says"),
        (rvl, "compressed", "RVL compression"),
        (jpeg, "compressed", "format 'rgb8; jpeg compressed bgr8'; expected '16UC1; compressedDepth'"),
        (raw, "compressed", "below/depth: it carries sensor_msgs/msg/Image, .*CompressedImage"),
    ],
)
def test_what_is_no_depth_refuses_the_bag(
    embodiment: Embodiment, tmp_path: Path, make: Callable[[int, int], Any], transport: str, said: str
) -> None:
    kind = COMPRESSED if make in (rvl, jpeg) else IMAGE
    camera = replace(CAMERA, transport=transport)
    with pytest.raises(ValueError, match=said):
        sample(tmp_path, with_depth(make, kind), embodiment, depth={"below": camera})
