"""Film strips: a few frames of an episode side by side, at the places in time where the plots have them."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from dit_policy_training.conversion.reloaded import Reel, Reloaded

FRAMES = 8  # a strip
WIDTH = 140  # pixels of a frame; its height as the camera has it
QUALITY = 72  # of JPEG
GRID = 24  # cells a side, in which pictures are compared
SAME = 6  # of 255: no cell differs by more, so only the codec made the difference


@dataclass(frozen=True)
class Strip:
    """One camera in one episode."""

    camera: str
    data: str  # data: URI of one JPEG
    frames: tuple[int, ...]  # shown
    brightness: float  # 0 to 1, of all frames shown
    frozen: bool  # all frames shown are the same picture


def strips_of(opened: Reloaded, episode: int) -> list[Strip]:
    """One for each camera; depth is shown from near (light) to far (dark)."""
    reel = Reel(opened, episode)
    shown = _places(len(reel))
    # Frame by frame: a reel decodes all cameras together.
    seen = [{key: reel.picture(key, frame) for key in opened.cameras} for frame in shown]
    strips = []
    for key in opened.cameras:
        pictures = [pictures[key] for pictures in seen]
        name = key.removeprefix("observation.images.")
        strips.append(_strip(name, shown, _shades(pictures) if opened.is_depth(key) else pictures))
    return strips


def _places(frames: int) -> tuple[int, ...]:
    """The middles of FRAMES equal parts of an episode."""
    count = min(FRAMES, frames)
    return tuple(int((2 * k + 1) * frames // (2 * count)) for k in range(count))


def _strip(camera: str, shown: tuple[int, ...], pictures: Sequence[np.ndarray]) -> Strip:
    thumbs = [_thumb(picture) for picture in pictures]
    whole = np.concatenate(thumbs, axis=1)
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(whole, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    return Strip(
        camera=camera,
        data="data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode(),
        frames=shown,
        brightness=float(np.mean([picture.mean() for picture in pictures]) / 255),
        frozen=_frozen(thumbs),
    )


def _frozen(pictures: Sequence[np.ndarray]) -> bool:
    cells = [cv2.resize(picture, (GRID, GRID), interpolation=cv2.INTER_AREA).astype(int) for picture in pictures]
    return len(cells) > 1 and all(bool(np.abs(a - b).max() <= SAME) for a, b in pairwise(cells))


def _thumb(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    size = (WIDTH, max(1, round(WIDTH * height / width)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA if width > WIDTH else cv2.INTER_CUBIC))


def _shades(depths: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Grey pictures of depths in mm, all on one scale."""
    near, far = (float(np.percentile(np.stack(depths), percent)) for percent in (2, 98))
    span = max(far - near, 1.0)
    shades = [255 - (np.clip((depth - near) / span, 0, 1) * 255).astype(np.uint8) for depth in depths]
    return [np.asarray(cv2.cvtColor(shade, cv2.COLOR_GRAY2RGB)) for shade in shades]
