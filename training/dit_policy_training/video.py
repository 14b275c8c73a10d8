"""Video encoding for LeRobotDataset that loses no frame, and spends its time on encoding.

lerobot's own streaming encoder throws a frame away when its queue is full for 100 ms (its pull request 4462), and takes
statistics of every frame, which costs three times what encoding a small picture does. This one waits for room, and
takes statistics of every fourth frame.
"""

import shutil
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from lerobot.configs import RGBEncoderConfig
from lerobot.datasets.compute_stats import RunningQuantileStats, auto_downsample_height_width

WAITING_FRAMES = 30  # of a camera; then `feed_frame` waits
STATS_EVERY = 4  # frames


@dataclass
class VideoOptions:
    """How videos are encoded.

    4:4:4 keeps small coloured things their colour: 4:2:0 halves the colour's resolution, which mixes a block a few
    pixels wide with the table. `gop` 2 makes any frame quick to reach.
    """

    codec: str = "h264"  # or libsvtav1, hevc, auto (hardware, if there is any)
    crf: int = 18  # lower is better and larger
    preset: str = "superfast"  # the codec's name for its effort; a number for libsvtav1
    pix_fmt: str = "yuv444p"  # yuv420p where a browser must play it
    gop: int = 2  # frames from one whole picture to the next

    def encoder_config(self) -> RGBEncoderConfig:
        """The same in lerobot's terms; raises ValueError for what the codec does not know."""
        return RGBEncoderConfig(vcodec=self.codec, crf=self.crf, preset=self.preset, pix_fmt=self.pix_fmt, g=self.gop)


class VideoEncoder:
    """Encodes the cameras of one episode after another; the interface of lerobot's StreamingVideoEncoder."""

    def __init__(self, fps: int, config: RGBEncoderConfig):
        self._fps, self._config = fps, config
        self._cameras: dict[str, _CameraVideo] = {}

    def start_episode(self, video_keys: list[str], temp_dir: Path, depth_video_keys: list[str] | None = None) -> None:
        """Begin an mp4 for each camera, in a folder of its own under temp_dir."""
        if depth_video_keys:
            raise NotImplementedError(f"depth videos: {', '.join(depth_video_keys)}")
        for key in video_keys:
            path = Path(tempfile.mkdtemp(dir=temp_dir)) / f"{key}.mp4"
            self._cameras[key] = _CameraVideo(path, self._fps, self._config)

    def feed_frame(self, video_key: str, image: np.ndarray) -> None:
        """Take a picture (H, W, 3) uint8; waits while the encoder is WAITING_FRAMES behind, raises what it raised."""
        self._cameras[video_key].add(image)

    def finish_episode(self) -> dict[str, tuple[Path, dict[str, np.ndarray]]]:
        """Each camera's mp4 and its statistics (pixel values 0 to 255), when all is encoded."""
        results = {key: camera.finish() for key, camera in self._cameras.items()}
        self._cameras.clear()
        return results

    def cancel_episode(self) -> None:
        """Forget the episode begun, if any, and its files."""
        for camera in self._cameras.values():
            camera.abandon()
        self._cameras.clear()

    def close(self) -> None:
        """Nothing is left open between episodes; an unfinished one is forgotten."""
        self.cancel_episode()


class _CameraVideo:
    """One camera's mp4 of one episode, encoded by a thread of its own."""

    def __init__(self, path: Path, fps: int, config: RGBEncoderConfig):
        self._path, self._fps, self._config = path, fps, config
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[None]] = deque()
        self._container: Any = None
        self._stats = RunningQuantileStats()
        self._frames = 0

    def add(self, image: np.ndarray) -> None:
        while len(self._waiting) >= WAITING_FRAMES or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._encode, image))

    def finish(self) -> tuple[Path, dict[str, np.ndarray]]:
        self._thread.shutdown()
        for job in self._waiting:
            job.result()
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._path, self._stats.get_statistics()

    def abandon(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._container is not None:
            self._container.close()
        shutil.rmtree(self._path.parent, ignore_errors=True)

    def _encode(self, image: np.ndarray) -> None:
        if self._container is None:
            self._open(*image.shape[:2])
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = self._frames, Fraction(1, self._fps)
        self._container.mux(self._stream.encode(frame))
        if self._frames % STATS_EVERY == 0:
            self._stats.update(auto_downsample_height_width(image.transpose(2, 0, 1)).reshape(3, -1).T)
        self._frames += 1

    def _open(self, height: int, width: int) -> None:
        self._container = av.open(str(self._path), "w")
        options = self._config.get_codec_options(encoder_threads=1, as_strings=True)
        self._stream = self._container.add_stream(self._config.vcodec, self._fps, options=options)
        self._stream.pix_fmt = self._config.pix_fmt
        self._stream.width, self._stream.height = width, height
        self._stream.time_base = Fraction(1, self._fps)


def frames_in(video: Path) -> int:
    """How many frames an mp4 holds, counted packet by packet."""
    with av.open(str(video)) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)
