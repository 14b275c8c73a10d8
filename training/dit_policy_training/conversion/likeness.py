"""Is this the picture that was sampled? By peak signal-to-noise ratio, and against its neighbours in time.

Brightness is compared, (H, W), since 4:2:0 halves the colour's resolution: small saturated things lose 15 dB of their
colour and none of their brightness. That red and blue are not exchanged is asked apart.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np

LOSSLESS = float("inf")
CELL = 8  # pixels
CLOSER = 3.0  # dB by which another picture must be nearer before it counts as the one that is shown
STRAYED = 1.5  # dB by which a frame may be nearer to what was sampled for it than a neighbour's picture is, and be that
# (PSNR at a crf, loss for each step of crf), dB. The worst frames measured lie 1.5 dB and more above: still scenes, and
# textures that pan, turn, flicker and are cut, with sensor noise up to a deviation of 15 grey levels; and white noise.
BOUNDS = {"av1": (29.0, 20, 0.35), "h264": (30.0, 18, 0.5), "hevc": (30.0, 18, 0.5)}
BOUND_RANGE = (18.0, 34.0)  # dB


def bound(feature: Mapping[str, Any]) -> float:
    """The least PSNR, dB, of a camera's frames, from its feature in info.json: by codec and crf; LOSSLESS if so."""
    info = feature.get("info") or {}
    if feature["dtype"] != "video" or info.get("is_depth_map"):
        return LOSSLESS
    codec = str(info.get("video.codec", ""))
    at, crf_there, slope = next((value for name, value in BOUNDS.items() if name in codec), BOUNDS["av1"])
    crf = info.get("video.crf")
    least, most = BOUND_RANGE
    return least if crf is None else float(np.clip(at - slope * (float(crf) - crf_there), least, most))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of the brightness of two RGB pictures (H, W, 3) uint8, dB; infinite for equal ones."""
    if a.shape != b.shape:
        return -LOSSLESS
    return _decibels(cv2.cvtColor(a, cv2.COLOR_RGB2GRAY), cv2.cvtColor(b, cv2.COLOR_RGB2GRAY))


def colour_error(found: np.ndarray, expected: np.ndarray) -> int:
    """The largest difference of any channel, 0 to 255, in the mean of any CELL x CELL pixels: small things' colour."""
    size = (max(1, expected.shape[1] // CELL), max(1, expected.shape[0] // CELL))
    here, there = (cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in (found, expected))
    return int(cv2.absdiff(here, there).max())


def fault(
    found: np.ndarray, expected: np.ndarray, others: Iterable[np.ndarray], apart: Iterable[float], least: float
) -> str | None:
    """What is wrong with a picture, in words, or None.

    All (H, W, 3) uint8; `others` are the dataset's pictures before and after it, `apart` says how like (PSNR, dB)
    `expected` was to what was sampled before and after, `least` is the bound in dB.
    """
    if found.shape != expected.shape:
        return f"its size is {found.shape[1]}x{found.shape[0]}, expected {expected.shape[1]}x{expected.shape[0]}"
    if least == LOSSLESS:
        wrong = np.count_nonzero((found != expected).any(axis=-1))
        return f"{wrong} of {found.shape[0] * found.shape[1]} pixels differ, expected none" if wrong else None
    own = psnr(found, expected)
    # A frame that shows a neighbour's picture is as far from its own as that is; a coarse frame is nearer. Where the
    # neighbour was the same picture, one of the two may well be the better.
    differing = [(other, decibels) for other, decibels in zip(others, apart, strict=False) if decibels != LOSSLESS]
    strayed = any(own < decibels + STRAYED for _, decibels in differing)
    if strayed and any(psnr(other, expected) > own + CLOSER for other, _ in differing):
        return f"the frame beside it shows the expected picture better ({own:.1f} dB here): frames are out of place"
    if own < least:
        return f"PSNR {own:.1f} dB, expected at least {least:.1f}: another picture, or too coarse a --video.crf"
    if _decibels(found[..., ::-1], expected) > _decibels(found, expected) + CLOSER:
        return "red and blue are exchanged"
    return None


def _decibels(a: np.ndarray, b: np.ndarray) -> float:
    squares = cv2.norm(np.ascontiguousarray(a), np.ascontiguousarray(b), cv2.NORM_L2SQR)
    return float(10 * np.log10(255.0**2 * a.size / squares)) if squares else LOSSLESS
