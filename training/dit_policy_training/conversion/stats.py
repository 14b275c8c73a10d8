"""A feature's statistics as LeRobot keeps them: min, max, mean, std, count and five quantiles, by one rule everywhere.

An episode's are exact over its rows; of pictures, over every frame at about 160 pixels a side, from counts of pixel
values. A dataset's are pooled over its episodes, each weighted by its rows, as LeRobot's `aggregate_stats` does.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

Stats = dict[str, np.ndarray]

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
KEYS = ("min", "max", "mean", "std", "count", *QUANTILES)
SMALL_SIDE, LARGE_SIDE = 150, 300  # pixels: LeRobot thins pictures of LARGE_SIDE and more to about SMALL_SIDE
MILLIMETRES = 2**16  # as far as 16UC1 goes


def of_values(values: np.ndarray) -> Stats:
    """Of a table's column (N, D), N >= 1; each result has shape (D,), but `count`, (1,)."""
    wide = values.astype(np.float64)
    exact = {"min": wide.min(0), "max": wide.max(0), "mean": wide.mean(0), "std": wide.std(0)}
    quantiles = np.quantile(wide, list(QUANTILES.values()), axis=0)
    return {**exact, "count": np.array([len(wide)]), **dict(zip(QUANTILES, quantiles, strict=True))}


class ValueCounts:
    """How often each of V values was seen in each channel: all that statistics of pictures need, in little memory."""

    def __init__(self, values: np.ndarray, channels: int):
        self._values = values
        self._counts = np.zeros((channels, len(values)), np.int64)
        self._frames = 0

    def add(self, picture: np.ndarray) -> None:
        """Count a picture (H, W, channels) of indices into the values, thinned as LeRobot thins it."""
        thin = _thinned(picture)
        bins = len(self._values)
        for channel in range(picture.shape[2]):  # counts in float32 are exact: a picture has fewer than 2^24 pixels
            counts = cv2.calcHist([thin], [channel], None, [bins], [0, bins])
            self._counts[channel] += counts.ravel().astype(np.int64)
        self._frames += 1

    def stats(self) -> Stats:
        """Each of shape (channels, 1, 1), but `count`: the frames, (1,)."""
        share = self._counts / self._counts.sum(1, keepdims=True)
        seen = [self._values[counts > 0] for counts in self._counts]
        mean = share @ self._values
        std = np.sqrt(np.maximum((share * (self._values - mean[:, None]) ** 2).sum(1), 0.0))
        below = np.cumsum(share, axis=1)
        result = {"min": np.array([v.min() for v in seen]), "max": np.array([v.max() for v in seen])}
        result |= {"mean": mean, "std": std}
        for name, part in QUANTILES.items():
            reached = (below < part).sum(1)  # the first value that `part` of the pixels do not exceed
            result[name] = self._values[np.minimum(reached, len(self._values) - 1)]
        shaped = {name: value.reshape(-1, 1, 1) for name, value in result.items()}
        return {key: np.array([self._frames]) if key == "count" else shaped[key] for key in KEYS}


class DepthCounts:
    """The same of depth in metres as it is stored. Exact, but for quantiles: these to the millimetre, up to 65 m."""

    def __init__(self) -> None:
        self._counts = np.zeros(MILLIMETRES, np.int64)
        self._low, self._high = np.inf, -np.inf
        self._sum = self._squares = 0.0
        self._frames = 0

    def add(self, picture: np.ndarray) -> None:
        """Count a picture (H, W, 1) float32, finite, thinned as LeRobot thins it."""
        thin = _thinned(picture).astype(np.float64)
        self._low, self._high = min(self._low, thin.min()), max(self._high, thin.max())
        self._sum += thin.sum()
        self._squares += np.square(thin).sum()
        millimetres = np.clip(np.rint(thin * 1000), 0, MILLIMETRES - 1).astype(np.int64)
        self._counts += np.bincount(millimetres.ravel(), minlength=MILLIMETRES)
        self._frames += 1

    def stats(self) -> Stats:
        """Each of shape (1, 1, 1), but `count`: the frames, (1,)."""
        total = self._counts.sum()
        mean = self._sum / total
        result = {"min": self._low, "max": self._high, "mean": mean}
        result["std"] = np.sqrt(max(self._squares / total - mean**2, 0.0))
        below = np.cumsum(self._counts) / total
        for name, part in QUANTILES.items():
            reached = int((below < part).sum())
            metres = self._high if reached >= MILLIMETRES - 1 else reached / 1000
            result[name] = np.clip(metres, self._low, self._high)
        shaped = {name: np.reshape(value, (1, 1, 1)) for name, value in result.items()}
        return {key: np.array([self._frames]) if key == "count" else shaped[key] for key in KEYS}


def _thinned(picture: np.ndarray) -> np.ndarray:
    side = max(picture.shape[:2])
    step = side // SMALL_SIDE if side >= LARGE_SIDE else 1
    return np.ascontiguousarray(picture[::step, ::step])


def pooled(parts: Sequence[Mapping[str, Stats]]) -> dict[str, Stats]:
    """Of several episodes together, by feature: each weighted by its count; quantiles are the weighted means."""
    return {key: _pooled([part[key] for part in parts]) for key in parts[0]}


def _pooled(parts: Sequence[Stats]) -> Stats:
    counts = np.concatenate([part["count"] for part in parts])
    total = counts.sum()
    stacked = {key: np.stack([part[key] for part in parts]) for key in KEYS if key != "count"}
    weights = counts.reshape(-1, *[1] * (stacked["mean"].ndim - 1)) / total
    result = {key: (values * weights).sum(0) for key, values in stacked.items()}
    variance = (weights * (stacked["std"] ** 2 + (stacked["mean"] - result["mean"]) ** 2)).sum(0)
    result |= {"min": stacked["min"].min(0), "max": stacked["max"].max(0), "std": np.sqrt(variance)}
    return {key: np.array([total]) if key == "count" else result[key] for key in KEYS}
