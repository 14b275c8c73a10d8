"""Which rows make a sample.

A window is what LeRobot's `delta_timestamps` give: beyond an episode's ends its first or last row is repeated, and
`action_is_pad` says where.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_policy_ros.policy.configuration import ACTION, ACTION_IS_PAD, ENVIRONMENT_STATE, STATE, TASK
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.table import Table


@dataclass(frozen=True)
class Windows:
    """Which rows make a sample: n_obs_steps observations up to row i, horizon actions from i - n_obs_steps + 1 on.

    Raises DatasetError where every episode is shorter than the steps of a chunk that do not lie in the past.
    """

    table: Table
    n_obs_steps: int
    horizon: int

    def __post_init__(self) -> None:
        """Refuses a horizon that no episode fills: every sample would be padded."""
        longest = int((self.table.episode_end - self.table.episode_start).max())
        ahead = self.horizon - self.n_obs_steps + 1
        if ahead > longest:
            raise DatasetError(
                f"{self.table.name}: the longest episode has {longest} frames, a chunk of policy.horizon "
                f"{self.horizon} looks {ahead} frames ahead: set policy.horizon to at most "
                f"{longest + self.n_obs_steps - 1}"
            )

    def observed(self, rows: np.ndarray) -> np.ndarray:
        """(B,) -> (B, n_obs_steps) rows of the observations, earliest first."""
        return self._clamped(rows, np.arange(1 - self.n_obs_steps, 1))

    def commanded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B,) -> (B, horizon) rows of the actions, and where they lie outside the episode."""
        offsets = np.arange(1 - self.n_obs_steps, 1 - self.n_obs_steps + self.horizon)
        wanted = rows[:, None] + offsets
        inside = self._clamped(rows, offsets)
        return inside, wanted != inside

    def _clamped(self, rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        first, end = self.table.episode_start[rows, None], self.table.episode_end[rows, None]
        return np.clip(rows[:, None] + offsets, first, end - 1)

    def vectors(self, rows: np.ndarray) -> dict[str, Any]:
        """Everything of a batch but the pictures, by feature key; `task` is a list of texts."""
        table = self.table
        commanded, is_pad = self.commanded(rows)
        observed = self.observed(rows)
        batch: dict[str, Any] = {}
        if table.state.shape[1]:
            batch[STATE] = torch.from_numpy(table.state[observed])
        if table.environment_state is not None:
            batch[ENVIRONMENT_STATE] = torch.from_numpy(table.environment_state[observed])
        return batch | {
            ACTION: torch.from_numpy(table.action[commanded]),
            ACTION_IS_PAD: torch.from_numpy(is_pad),
            TASK: [table.tasks[index] for index in table.task_index[rows]],
        }
