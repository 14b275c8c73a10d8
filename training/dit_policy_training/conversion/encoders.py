"""Which video encoder is used, with which options: asked for by name, or a hardware encoder if one really opens."""

import functools
import os
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np

from dit_policy_training.conversion.depth_codes import SHIFT
from dit_policy_training.conversion.options import DepthCamera, VideoOptions

HARDWARE = ("h264_nvenc", "hevc_nvenc", "h264_vaapi", "h264_qsv", "h264_videotoolbox", "hevc_videotoolbox")
SOFTWARE = ("libsvtav1", "h264", "hevc")
FALLBACK = "libsvtav1"
X26X_PRESET = "superfast"  # half the time of x264's own default, files a third larger
SVT_PIX_FMTS = ("yuv420p", "yuv420p10le")
TRIAL_SIZE = (256, 256)  # height, width: larger than what any hardware encoder refuses as too small
MIN_SIDE = 16  # pixels; below it encoders fail each in its own way
MIN_SIDE_HEVC = 64  # x265 4.1 with a fast preset writes past its memory on smaller pictures in colour

# Both write their banners to stderr, over the progress bar.
os.environ.setdefault("SVT_LOG", "1")
av.logging.set_libav_level(av.logging.ERROR)


class VideoError(ValueError):
    """A video cannot be encoded or joined as asked; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Encoder:
    """An encoder and its options; `info` is what a dataset's info.json says of its videos, `note` of the choice."""

    codec: str
    pix_fmt: str
    options: tuple[tuple[str, str], ...]
    info: dict[str, Any] = field(hash=False, compare=False, default_factory=dict)
    note: str | None = field(hash=False, compare=False, default=None)


def colour_encoder(video: VideoOptions, threads: int) -> Encoder:
    """The encoder for cameras, with `threads` for each where its pictures do not depend on how many.

    Raises VideoError for a codec that is not there and for options that it refuses.
    """
    codec, note = (video.codec, None) if video.codec != "auto" else _hardware()
    if codec not in SOFTWARE + HARDWARE:
        raise VideoError(f"video.codec is '{codec}'; expected auto or one of {', '.join(SOFTWARE + HARDWARE)}")
    preset = _preset(video, codec)
    options = {"g": str(video.gop)} | _options(codec, video.crf, preset, threads)
    info = {"g": video.gop, "crf": video.crf, "preset": int(preset) if preset and preset.isdigit() else preset}
    encoder = Encoder(codec, video.pix_fmt, tuple(options.items()), _info(info), note)
    _check_pix_fmt(encoder)
    _try(encoder, *TRIAL_SIZE)
    return encoder


def depth_encoder(camera: DepthCamera) -> Encoder:
    """LeRobot's encoder for depth: lossless 12-bit HEVC. Raises VideoError if this build of PyAV lacks it."""
    # A picture a time: with more, x265's memory and its order of work depend on the machine.
    options = {"g": "2", "crf": "30", "x265-params": "lossless=1:frame-threads=1:pools=none:log-level=none"}
    info: dict[str, Any] = {"g": 2, "crf": 30, "preset": None, "extra_options": {"x265-params": "lossless=1"}}
    info |= {"depth_min": camera.depth_min, "depth_max": camera.depth_max, "shift": SHIFT, "use_log": True}
    encoder = Encoder("hevc", "gray12le", tuple(options.items()), _info(info))
    _try(encoder, *TRIAL_SIZE)
    return encoder


def check_size(encoder: Encoder, key: str, height: int, width: int) -> None:
    """Raises VideoError if the encoder takes no pictures of this size."""
    least = MIN_SIDE_HEVC if encoder.codec == "hevc" and not encoder.pix_fmt.startswith("gray") else MIN_SIDE
    try:
        if min(height, width) < least:
            raise VideoError(f"{encoder.codec} wants pictures of {least}x{least} at least, these are {width}x{height}")
        _try(encoder, height, width)
    except VideoError as error:
        raise VideoError(
            f"{key}: {error}. Give the camera another size in the embodiment (most codecs want even numbers), "
            "or keep pictures with --video.use_videos=false"
        ) from None


def open_stream(container: Any, encoder: Encoder, fps: int, height: int, width: int) -> Any:
    """A video stream of the container for pictures of this size, with one tick a frame."""
    stream = container.add_stream(encoder.codec, fps, options=dict(encoder.options))
    stream.pix_fmt, stream.height, stream.width = encoder.pix_fmt, height, width
    stream.time_base = Fraction(1, fps)
    return stream


def _options(codec: str, crf: int, preset: str | None, threads: int) -> dict[str, str]:
    named = {"preset": preset} if preset else {}
    if codec == "libsvtav1":
        # enable-tf=0: no picture is mixed with its neighbours, as SVT-AV1 does with key pictures to make them smaller.
        # Pictures are the same with any `lp`; those of x264 and x265 are not, so they get one thread.
        return {"crf": str(crf), **named, "svtav1-params": f"fast-decode=0:enable-tf=0:lp={threads}"}
    if codec == "h264":
        return {"crf": str(crf), **named, "threads": "1"}
    if codec == "hevc":
        return {"crf": str(crf), **named, "x265-params": "frame-threads=1:pools=none:log-level=none"}
    if codec.endswith("_nvenc"):
        return {"rc": "constqp", "qp": str(crf), **named}
    if codec.endswith("_qsv"):
        return {"global_quality": str(crf), **named}
    if codec.endswith("_videotoolbox"):
        return {"q:v": str(max(1, min(100, 100 - 2 * crf)))}
    return {"qp": str(crf)}


def _preset(video: VideoOptions, codec: str) -> str | None:
    """The preset asked for, or the codec's own where it is another codec's: a number is libsvtav1's, a word is not."""
    if codec == "libsvtav1":
        return VideoOptions.preset if video.codec == "auto" and not video.preset.isdigit() else video.preset
    if not video.preset.isdigit():
        return video.preset
    return X26X_PRESET if codec in SOFTWARE else None


def _info(options: dict[str, Any]) -> dict[str, Any]:
    common = {"fast_decode": 0, "video_backend": "pyav", "extra_options": {}}
    return {f"video.{name}": value for name, value in (common | options).items()}


@functools.cache
def _hardware() -> tuple[str, str]:
    reasons = []
    for codec in HARDWARE:
        try:
            _try(Encoder(codec, "yuv420p", (("g", "2"),)), *TRIAL_SIZE)
        except VideoError as error:
            reasons.append(str(error))
        else:
            return codec, f"video.codec auto: {codec} opens here and is used"
    return FALLBACK, f"video.codec auto: no hardware encoder opens here, {FALLBACK} is used ({'; '.join(reasons)})"


def _check_pix_fmt(encoder: Encoder) -> None:
    """SVT-AV1's own refusal, of an invalid argument, tells nobody what to do."""
    if encoder.codec == "libsvtav1" and encoder.pix_fmt not in SVT_PIX_FMTS:
        raise VideoError(
            f"video.pix_fmt is '{encoder.pix_fmt}', libsvtav1 takes yuv420p only (or yuv420p10le): leave it out, "
            "or keep colours whole with --video.codec=h264 --video.pix_fmt=yuv444p"
        )


@functools.cache
def _try(encoder: Encoder, height: int, width: int) -> None:
    """Encode two pictures: an encoder may be in the library and still not work here."""
    black = np.zeros((height, width) if encoder.pix_fmt.startswith("gray") else (height, width, 3), np.uint8)
    picture = av.VideoFrame.from_ndarray(black, format="gray" if black.ndim == 2 else "rgb24")
    try:
        context = av.CodecContext.create(encoder.codec, "w")
        context.options = dict(encoder.options)
        context.pix_fmt, context.height, context.width = encoder.pix_fmt, height, width
        context.time_base, context.framerate = Fraction(1, 30), Fraction(30)
        packets = 0
        for pts in range(2):
            picture.pts = pts
            packets += len(context.encode(picture))
        packets += len(context.encode())
    except (av.FFmpegError, ValueError) as error:
        given = " ".join(f"{name}={value}" for name, value in encoder.options)
        reason = (error.strerror if isinstance(error, av.FFmpegError) else None) or str(error)
        raise VideoError(
            f"{encoder.codec} does not take {width}x{height} {encoder.pix_fmt} pictures with {given} ({reason})"
        ) from None
    if packets != 2:
        raise VideoError(f"{encoder.codec} made {packets} pictures of 2 in a trial")
