"""The pictures of one camera of one episode on their way to the disk: by a thread of their own or at once, none lost.

`add` waits while the encoder is WAITING pictures behind, so that memory stays bounded. LeRobot's own streaming encoder
throws a picture away when its queue is full for 100 ms (its pull request 4462).
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import av
import cv2
import numpy as np

from dit_policy_training.conversion.depth_codes import DepthCodes
from dit_policy_training.conversion.encoders import VideoError
from dit_policy_training.conversion.stats import DepthCounts, Stats, ValueCounts
from dit_policy_training.conversion.videos import VideoFile
from dit_policy_training.conversion.yuv import to_yuv420p

WAITING = 8  # pictures of a camera
PNG_LEVEL = 6  # of LeRobot's pictures in tables


class Sink(Protocol):
    """Where encoded pictures go: one for each camera and episode."""

    def add(self, picture: np.ndarray, values: np.ndarray) -> None:
        """Encode and keep the next picture; `values` (H, W, channels): the same as its statistics take it."""

    def close(self) -> None:
        """Finish. Raises VideoError or OSError if something is missing."""

    def abandon(self) -> None:
        """Let go; what was written is worth nothing."""


class _AtOnce(Executor):
    """Runs what is submitted in the caller's thread: where there is one core, another thread only costs."""

    def submit[**P, T](self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Done when it returns."""
        future: Future[T] = Future()
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class CameraPictures:
    """Encodes pictures into a sink and counts their values, in a thread of its own if there is more than one core.

    `codes` is for depth, (H, W) float32 metres; other pictures are (H, W, 3) uint8 RGB. Statistics are of what is
    stored: depth's codes in a video, metres where `raw`.
    """

    def __init__(self, key: str, sink: Sink, codes: DepthCodes | None, threads: int, raw: bool = False):
        self._key, self._codes, self._raw = key, codes, raw
        self._counts: DepthCounts | ValueCounts
        if codes is None:
            self._counts = ValueCounts(np.arange(256) / 255, 3)
        else:
            self._counts = DepthCounts() if raw else ValueCounts(codes.values(), 1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=key) if threads > 1 else _AtOnce()
        self._waiting: deque[Future[None]] = deque()
        self._sink = sink

    def add(self, picture: np.ndarray) -> None:
        """Take the next picture, which must not change any more; raises what encoding an earlier one raised."""
        while len(self._waiting) >= WAITING or (self._waiting and self._waiting[0].done()):
            self._result(self._waiting.popleft())
        self._waiting.append(self._thread.submit(self._encode, picture))

    def finish(self) -> Stats:
        """The episode's statistics, once all is encoded; raises what encoding raised."""
        while self._waiting:
            self._result(self._waiting.popleft())
        self._result(self._thread.submit(self._sink.close))
        self._thread.shutdown()
        return self._counts.stats()

    def abandon(self) -> None:
        """Forget what waits and close the sink."""
        self._thread.shutdown(cancel_futures=True)
        self._sink.abandon()

    def _encode(self, picture: np.ndarray) -> None:
        values = self._values(picture)
        self._counts.add(values)
        self._sink.add(picture, values)

    def _values(self, picture: np.ndarray) -> np.ndarray:
        if self._codes is None:
            return picture
        if self._raw:
            return np.where(np.isposinf(picture), np.float32(self._codes.far), picture)[..., None]
        return self._codes.encode(picture)[..., None]

    def _result(self, job: Future[None]) -> None:
        try:
            job.result()
        except OSError as error:  # also what libav says of files: a full disk first of all
            reason = f"{self._key}: its pictures cannot be written: {error.strerror or error}"
            raise OSError(error.errno, reason) from error
        except av.FFmpegError as error:
            raise VideoError(f"{self._key}: its pictures cannot be encoded: {error}") from error


class ColourVideo:
    """A sink: an mp4 of RGB pictures."""

    def __init__(self, video: VideoFile):
        self._video = video

    def add(self, picture: np.ndarray, values: np.ndarray) -> None:
        """Encode (H, W, 3) uint8."""
        height, width = picture.shape[:2]
        if self._video.pix_fmt == "yuv420p" and height % 2 == width % 2 == 0:
            self._video.add(to_yuv420p(picture))
        else:  # libav converts; without a copy before
            self._video.add(av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(picture), format="rgb24"))

    def close(self) -> None:
        """Finish the mp4."""
        self._video.close()

    def abandon(self) -> None:
        """Close the mp4 as it is."""
        self._video.abandon()


class DepthVideo(ColourVideo):
    """A sink: a lossless mp4 of depth as 12-bit codes."""

    def add(self, picture: np.ndarray, values: np.ndarray) -> None:
        """Encode (H, W, 1) uint16 codes."""
        self._video.add(av.VideoFrame.from_ndarray(values[..., 0], format="gray12le"))


class PictureFile:
    """A sink: PNG pictures one behind the other in a file, until a table takes them.

    Depth: TIFF pictures of float32 metres, as they came but for +inf, which is the range's end here as in videos.
    """

    def __init__(self, path: Path, depth: bool):
        self._file: BinaryIO = path.open("wb")
        self._path, self._depth = path, depth
        self.sizes: list[int] = []

    def add(self, picture: np.ndarray, values: np.ndarray) -> None:
        """Compress losslessly and append."""
        encoded = _tiff(values[..., 0]) if self._depth else _png(picture)
        self._file.write(encoded)
        self.sizes.append(len(encoded))

    def close(self) -> None:
        """Everything to the disk."""
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        with suppress(OSError):  # what it holds back cannot be written either
            self._file.close()

    def read(self) -> Iterator[bytes]:
        """The pictures' files in order."""
        with self._path.open("rb") as file:
            for size in self.sizes:
                yield file.read(size)


def _png(picture: np.ndarray) -> bytes:
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, PNG_LEVEL])
    if not done:
        raise VideoError(f"a picture of shape {picture.shape} cannot be made a PNG")
    return data.tobytes()


def _tiff(depth: np.ndarray) -> bytes:
    done, data = cv2.imencode(".tiff", depth)
    if not done:
        raise VideoError(f"depth of shape {depth.shape} cannot be made a TIFF")
    return data.tobytes()
