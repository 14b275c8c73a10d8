"""Rows by formula, written as shards: what the tests of shards and of merging share."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.options import DepthCamera, VideoOptions
from dit_policy_training.conversion.rows import Row
from dit_policy_training.conversion.shards import ShardWriter

SIDE, HAND, DEPTH = "observation.images.side", "observation.images.hand", "observation.images.range"
LAYOUT = Layout(
    fps=10,
    robot_type="toy",
    cameras={SIDE: (32, 48), HAND: (32, 32)},
    depth={},
    state_names=("lift", "turn", "reach"),
    action_names=("turn",),
    topics=(),
)
DEEP = Layout(10, "toy", {SIDE: (32, 48)}, {DEPTH: DepthCamera("d", "raw", 40, 24, 1.0)}, ("lift",), ("lift",), ())
H264 = VideoOptions(codec="h264", crf=18, preset="superfast", pix_fmt="yuv444p")


def picture(index: int, height: int, width: int) -> np.ndarray:
    """A slope with a bright square that is elsewhere in each picture."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([40 + x, 60 + y, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    left = 3 * index % (width - 8)
    rgb[8:16, left : left + 8] = (200, 180, 40 + 5 * index % 200)
    return rgb


def depth(index: int, height: int, width: int) -> np.ndarray:
    """Metres: a floor that sinks, and a square that comes nearer."""
    y, x = np.mgrid[0:height, 0:width]
    metres = (0.5 + 0.05 * y + 0.01 * x).astype(np.float32)
    metres[4:12, 4:12] = 0.3 + 0.02 * index
    return metres


def row(index: int, layout: Layout = LAYOUT, task: str = "push") -> Row:
    """The index-th row of everything."""
    frame = {key: picture(index + size[1], *size) for key, size in layout.cameras.items()}
    frame |= {key: depth(index, camera.height, camera.width) for key, camera in layout.depth.items()}
    frame["observation.state"] = np.sin(index / 3 + np.arange(len(layout.state_names))).astype(np.float32)
    action = np.cos(index / 5 + np.arange(len(layout.action_names))).astype(np.float32)
    return Row(1_000_000_000 + index * 100_000_000, task, frame, action, {})


def rows(first: int, count: int, layout: Layout = LAYOUT, task: str = "push") -> list[Row]:
    """Rows `first` to `first + count`."""
    return [row(index, layout, task) for index in range(first, first + count)]


def write_shard(
    folder: Path,
    episodes: Iterable[Iterable[Row]],
    layout: Layout = LAYOUT,
    video: VideoOptions = H264,
    threads: int = 1,
) -> Path:
    """A shard of these episodes."""
    with ShardWriter(folder, layout, video, threads) as writer:
        for episode in episodes:
            for each in episode:
                writer.add(each)
            writer.end(keep=True)
    return folder
