"""What a policy normalises with: min, max, mean and std of state and action, in float64."""

import numpy as np

from dit_policy_ros.policy.configuration import ACTION, ENVIRONMENT_STATE, STATE
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.windows import Windows

_ROWS = 65536  # taken at a time


def stats(windows: Windows, action_mode: str) -> dict[str, dict[str, np.ndarray]]:
    """The statistics a policy normalises with, by feature key; relative actions are taken over all windows.

    Raises DatasetError for relative actions whose joints the state lacks.
    """
    table = windows.table
    found = {}
    if table.state.shape[1]:
        found[STATE] = _stats_of(table.state)
    if table.environment_state is not None:
        found[ENVIRONMENT_STATE] = _stats_of(table.environment_state)
    return found | {ACTION: _relative_stats(windows) if action_mode == "relative" else _stats_of(table.action)}


def _relative_stats(windows: Windows) -> dict[str, np.ndarray]:
    """Of (action - newest joints), over all steps of all windows that are not padding."""
    table = windows.table
    if table.action_state_indices is None:
        lacking = [name for name in table.action_names if name not in table.state_names]
        raise DatasetError(
            f"{table.name}: policy.action_mode=relative needs each of the action's names once in the state's; "
            f"not there: {', '.join(lacking) or 'none, but a name stands twice'}. Set policy.action_mode=absolute"
        )
    moments = _Moments(table.action.shape[1])
    for first in range(0, len(table), _ROWS):
        rows = np.arange(first, min(first + _ROWS, len(table)))
        commanded, is_pad = windows.commanded(rows)
        origin = table.state[rows][:, table.action_state_indices]
        for step in range(windows.horizon):
            keep = ~is_pad[:, step]
            moments.add(table.action[commanded[keep, step]].astype(np.float64) - origin[keep])
    return moments.stats()


def _stats_of(values: np.ndarray) -> dict[str, np.ndarray]:
    moments = _Moments(values.shape[1])
    for first in range(0, len(values), _ROWS):
        moments.add(values[first : first + _ROWS].astype(np.float64))
    return moments.stats()


class _Moments:
    """Running min, max, mean and standard deviation over rows.

    Sums are taken around the first row, so that a small spread far from 0 keeps its digits.
    """

    def __init__(self, dims: int):
        self.min, self.max = np.full(dims, np.inf), np.full(dims, -np.inf)
        self.count, self.total, self.squares = 0, np.zeros(dims), np.zeros(dims)
        self.origin = np.zeros(dims)

    def add(self, values: np.ndarray) -> None:
        if len(values) == 0:
            return
        if self.count == 0:
            self.origin = values[0].copy()
        self.min, self.max = np.minimum(self.min, values.min(0)), np.maximum(self.max, values.max(0))
        self.count += len(values)
        centred = values - self.origin
        self.total += centred.sum(0)
        self.squares += np.square(centred).sum(0)

    def stats(self) -> dict[str, np.ndarray]:
        mean = self.total / self.count
        variance = np.maximum(self.squares / self.count - mean**2, 0.0)
        return {"min": self.min, "max": self.max, "mean": self.origin + mean, "std": np.sqrt(variance)}
