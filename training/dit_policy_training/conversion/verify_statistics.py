"""Statistics taken once more from the tables, and compared with those that a trainer will normalise by."""

import json
from typing import Any

import cv2
import numpy as np

from dit_policy_training.conversion.findings import Findings
from dit_policy_training.conversion.reloaded import Reloaded

NEEDED = ("mean", "std", "min", "max", "count")
SUM_ERROR = 1e-5  # of the largest value: what sums of float32 may lose
CANCELLED = 3e-4  # of the mean: what E[x^2] - E[x]^2 of float32 may lose of a small deviation
BINS = 2e-3  # of the range: LeRobot takes quantiles from histograms of 5000 bins


def check_statistics(opened: Reloaded, findings: Findings) -> None:
    """Of each vector all statistics, and of depth in tables; of other cameras that they are those of pictures."""
    path = opened.root / "meta" / "stats.json"
    try:
        statistics: dict[str, dict[str, Any]] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        findings.add("statistics", f"meta/stats.json cannot be read: {error}; convert again")
        return
    for key in (*opened.vector_keys, *opened.cameras):
        found = {name: np.asarray(value, float) for name, value in statistics.get(key, {}).items()}
        if missing := [name for name in NEEDED if name not in found]:
            findings.add("statistics", f"meta/stats.json: {key} has no {', '.join(missing)}; convert again")
        elif key in opened.cameras:
            _check_camera(opened, key, found, findings)
            if opened.is_depth(key) and opened.features[key]["dtype"] == "image":
                _check_stored_depth(opened, key, found, findings)
        else:
            _check_vector(opened, key, found, findings)


def _check_vector(opened: Reloaded, key: str, found: dict[str, np.ndarray], findings: Findings) -> None:
    due, allowed = _recomputed(opened, key)
    for name, values in due.items():
        if name not in found:
            continue
        given = np.broadcast_to(found[name].reshape(-1), values.shape)
        for column in np.flatnonzero(~(np.abs(given - values) <= allowed[name])):
            who = f"{key} of {opened.names(key)[column]}" if values.size > 1 else key
            findings.add(
                "statistics",
                f"meta/stats.json: {name} of {who} is {given[column]:.6g}, the table gives {values[column]:.6g}; "
                "convert again",
            )


def _recomputed(opened: Reloaded, key: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Statistics by name, each (D,), and by how much each may be off. Quantiles as LeRobot joins those of episodes."""
    values = opened.vector(key).astype(np.float64)
    low, high, mean, std = values.min(0), values.max(0), values.mean(0), values.std(0)
    due = {"count": np.array([len(values)], float), "min": low, "max": high, "mean": mean, "std": std}
    largest = np.maximum(np.abs(low), np.abs(high))
    allowed = {
        "count": np.zeros(1),
        "min": 1e-6 * largest,
        "max": 1e-6 * largest,
        "mean": SUM_ERROR * largest + 1e-9,
        "std": 1e-3 * std + CANCELLED * np.abs(mean) + 1e-9,
    }
    for percent in (1, 10, 50, 90, 99):
        name = f"q{percent:02d}"
        due[name] = _joined_quantile(opened, values, percent)
        allowed[name] = BINS * (high - low) + 1e-6
    return due, allowed


def _joined_quantile(opened: Reloaded, values: np.ndarray, percent: int) -> np.ndarray:
    """LeRobot's rule: the mean of the episodes' quantiles, by their lengths."""
    parts = [values[opened.rows(number)] for number in range(len(opened.episodes))]
    quantiles = np.stack([np.percentile(part, percent, axis=0) for part in parts if len(part)])
    return np.average(quantiles, axis=0, weights=[len(part) for part in parts if len(part)])


def _check_camera(opened: Reloaded, key: str, found: dict[str, np.ndarray], findings: Findings) -> None:
    """Each channel's statistics in order and, for colour, in 0 to 1."""
    low, mean, high = (found[name].reshape(-1) for name in ("min", "mean", "max"))
    channels = 1 if opened.is_depth(key) else 3
    if len(mean) != channels:
        wrong = f"meta/stats.json: {key} has means of {len(mean)} channels, expected {channels}; convert again"
        findings.add("statistics", wrong)
    elif not ((low <= mean) & (mean <= high)).all() or (channels == 3 and (low.min() < 0 or high.max() > 1)):
        findings.add(
            "statistics",
            f"meta/stats.json: {key} has min {low.tolist()}, mean {mean.tolist()}, max {high.tolist()}; expected them "
            "in this order" + (" and within 0 to 1" if channels == 3 else "") + "; convert again",
        )


def _check_stored_depth(opened: Reloaded, key: str, found: dict[str, np.ndarray], findings: Findings) -> None:
    """Metres in TIFF files once more, thinned by LeRobot's own rule."""
    from lerobot.datasets.compute_stats import auto_downsample_height_width

    parts: list[np.ndarray] = []
    for frame, data in enumerate(opened.pictures(key)):
        depth = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if depth is None:
            findings.add(key, f"row {frame}: {key} is no readable picture; convert again")
            return
        thin = auto_downsample_height_width(depth[None]).astype(np.float64)
        parts.append(np.array([thin.min(), thin.max(), thin.mean(), np.square(thin).mean()]))
    low, high, means, squares = np.array(parts).T
    mean = means.mean()
    due = {"min": low.min(), "max": high.max(), "mean": mean, "std": np.sqrt(max(squares.mean() - mean**2, 0.0))}
    for name, value in due.items():
        given = float(found[name].reshape(-1)[0])
        if not abs(given - value) <= SUM_ERROR * high.max() + 1e-6:
            wrong = f"{name} of {key} is {given:.6g} m, the stored pictures give {value:.6g} m; convert again"
            findings.add("statistics", f"meta/stats.json: {wrong}")
