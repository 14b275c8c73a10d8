"""Film strips: a few frames of an episode side by side, at the places in time where the plots have them."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from dit_policy_training.conversion.reloaded import Reel, Reloaded

FRAMES = 8  # a strip
HEIGHT = 96  # pixels of a strip; at most MAX_WIDTH wide a frame
MAX_WIDTH = 192
QUALITY = 72  # of JPEG
SAME = 0.4  # of 255: a mean difference below it is none, whatever the codec does


@dataclass(frozen=True)
class Strip:
    """One camera in one episode."""

    camera: str
    data: str  # data: URI of one JPEG
    width: int  # of the whole strip, pixels
    frames: tuple[int, ...]  # shown
    brightness: float  # 0 to 1, of all frames shown
    frozen: bool  # all frames shown are the same picture


def strips_of(opened: Reloaded, episode: int) -> list[Strip]:
    """One for each camera; depth is shown from near (light) to far (dark)."""
    reel = Reel(opened, episode)
    shown = _places(len(reel))
    strips = []
    for key in opened.cameras:
        pictures = [reel.picture(key, frame) for frame in shown]
        if opened.is_depth(key):
            pictures = _shades(pictures)
        strips.append(_strip(key.removeprefix("observation.images."), shown, pictures))
    return strips


def _places(frames: int) -> tuple[int, ...]:
    """The middles of FRAMES equal parts of an episode."""
    count = min(FRAMES, frames)
    return tuple(int((2 * k + 1) * frames // (2 * count)) for k in range(count))


def _strip(camera: str, shown: tuple[int, ...], pictures: Sequence[np.ndarray]) -> Strip:
    thumbs = [_thumb(picture) for picture in pictures]
    whole = np.concatenate(thumbs, axis=1)
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(whole, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    changes = [np.abs(a.astype(int) - b).mean() for a, b in pairwise(thumbs)]
    return Strip(
        camera=camera,
        data="data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode(),
        width=whole.shape[1],
        frames=shown,
        brightness=float(np.mean([picture.mean() for picture in pictures]) / 255),
        frozen=bool(changes and max(changes) < SAME),
    )


def _thumb(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    size = (min(MAX_WIDTH, max(1, round(HEIGHT * width / height))), HEIGHT)
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def _shades(depths: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Grey pictures of depths in mm, all on one scale."""
    near, far = (float(np.percentile(np.stack(depths), percent)) for percent in (2, 98))
    span = max(far - near, 1.0)
    shades = [255 - (np.clip((depth - near) / span, 0, 1) * 255).astype(np.uint8) for depth in depths]
    return [np.asarray(cv2.cvtColor(shade, cv2.COLOR_GRAY2RGB)) for shade in shades]
