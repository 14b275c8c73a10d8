"""Idling: a policy that stands still where those who showed it moved, mostly because it was shown standing still."""

from dataclasses import dataclass

import numpy as np

from dit_policy_training.data.order import is_idle
from dit_policy_training.data.windows import Windows
from dit_policy_training.judging.listening import action_range
from dit_policy_training.judging.predictions import Predictions

TENTHS = 10


@dataclass(frozen=True)
class Idling:
    """Shares of moments, but for the `idle_frames`; a moment's tenth is its place in its episode, None without any.

    A chunk hardly moves if none of its executed actions gets further than `motion` of that action's range.
    """

    motion: float
    moments: int  # those whose executed steps all lie in the episode
    recorded: float
    predicted: float
    stuck: float  # of the moments at which the recorded chunk moves, those at which the predicted one hardly does
    way: float | None  # there, how far the predicted chunks lead, 1: as far as the recorded ones; None without any
    recorded_by_tenth: list[float | None]
    predicted_by_tenth: list[float | None]
    idle_frames: int  # of the whole dataset, as --idle_weight takes them
    idle_frames_share: float
    idle_starts: int  # episodes that begin idle
    idle_start_seconds: float  # how long those stay so, in the mean


def idling(
    predictions: Predictions, windows: Windows, n_action_steps: int, motion: float, origin: np.ndarray | None = None
) -> Idling:
    """Measure it; n_action_steps are executed of a chunk, motion is the share of an action's range that is none.

    origin (N, 1, A) is where the robot stands at each moment; None: as its first recorded action says.
    """
    steps = min(max(n_action_steps, 2), predictions.recorded.shape[1])
    whole = ~predictions.is_pad[:, :steps].any(axis=1)
    reach = action_range(windows)
    both = predictions.recorded[whole, :steps], predictions.predicted[whole, :steps]
    recorded, predicted = (_motion(chunks, reach) <= motion for chunks in both)
    here = both[0][:, :1] if origin is None else origin[whole]
    went, goes = (_way(chunks, here, reach)[~recorded].sum() for chunks in both)
    tenth = _tenths(windows, predictions.rows[whole])
    idle = is_idle(windows, n_action_steps, motion)
    starts = windows.table.episode_starts
    lengths = [_run(idle[start : windows.table.episode_end[start]]) for start in starts[idle[starts]]]
    return Idling(
        motion=motion,
        moments=int(whole.sum()),
        recorded=_share(recorded),
        predicted=_share(predicted),
        stuck=_share(predicted[~recorded]),
        way=float(goes / went) if went > 0 else None,
        recorded_by_tenth=_by_tenth(recorded, tenth),
        predicted_by_tenth=_by_tenth(predicted, tenth),
        idle_frames=int(idle.sum()),
        idle_frames_share=float(idle.mean()),
        idle_starts=len(lengths),
        idle_start_seconds=float(np.mean(lengths)) / windows.table.fps if lengths else 0.0,
    )


def _motion(chunks: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """(N, k, A) -> (N,) the furthest that any action goes, as a share of its range.

    From the mean of the first half to that of the second, and that twice, which is the whole way of a steady motion:
    the noise left in a sampled chunk would pass for motion if single steps were compared.
    """
    half = chunks.shape[1] // 2
    first, second = chunks[:, :half].mean(axis=1), chunks[:, -half:].mean(axis=1)
    share = 2 * np.abs(second.astype(np.float64) - first) / reach
    return np.where(np.isnan(share), 0.0, share).max(axis=1)


def _way(chunks: np.ndarray, origin: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """(N, k, A), (N, 1, A) -> (N,) how far the second half of a chunk lies from the origin, in shares of the ranges."""
    later = chunks[:, -(chunks.shape[1] // 2) :].mean(axis=1)
    return np.linalg.norm(np.nan_to_num((later.astype(np.float64) - origin[:, 0]) / reach), axis=1)


def _tenths(windows: Windows, rows: np.ndarray) -> np.ndarray:
    first, end = windows.table.episode_start[rows], windows.table.episode_end[rows]
    return (rows - first) * TENTHS // (end - first)


def _by_tenth(chosen: np.ndarray, tenth: np.ndarray) -> list[float | None]:
    return [_share(chosen[tenth == number]) if (tenth == number).any() else None for number in range(TENTHS)]


def _share(chosen: np.ndarray) -> float:
    return float(chosen.mean()) if len(chosen) else 0.0


def _run(idle: np.ndarray) -> int:
    """How many are idle before the first that is not."""
    return len(idle) if idle.all() else int(idle.argmin())
