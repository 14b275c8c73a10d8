"""How well a policy does on episodes that it is not trained on: the loss, and how far its actions are off.

Both are measured at the same moments with the same noise each time, so that what changes between two measurements is
the policy. A falling training loss with a rising one here is memory; what a robot feels is the action error.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dit_policy_ros.policy.draws import Draws
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_training.data.frames import Frames, gather
from dit_policy_training.data.table import Table
from dit_policy_training.data.windows import Windows
from dit_policy_training.judging.predictions import Predictions, predict
from dit_policy_training.loop.options import TrainConfig


class Validation:
    """Held-out rows of a table, of which at most config.validation.samples, evenly spread, are measured."""

    def __init__(self, table: Table, windows: Windows, frames: Frames, rows: np.ndarray, config: TrainConfig):
        """rows (N,) are held out, in the table's order. Raises ValueError if there is none."""
        if len(rows) == 0:
            raise ValueError("no moments to validate on: no episode is held out")
        self._table, self._windows, self._frames = table, windows, frames
        self._batch_size, self._seed = config.batch_size, config.seed
        spread = np.linspace(0, len(rows) - 1, min(config.validation.samples, len(rows)))
        self.rows: np.ndarray = np.asarray(rows)[spread.round().astype(int)]
        self.predictions: Predictions | None = None
        """Of the last measurement."""

    def measure(self, policy: MultitaskDiTPolicy) -> dict[str, float]:
        """The figures of a row of metrics.jsonl, in evaluation mode; the policy is left as it was.

        `validation_loss` (normalised, as the training loss), `validation_action_error`, the mean over the steps of a
        chunk that lie in the episode, in units, and `validation_action_error/<name>` of each action.
        """
        found = predict(policy, self._windows, self._frames, self.rows, seed=self._seed, batch_size=self._batch_size)
        self.predictions = found
        by_name = dict(zip(self._table.action_names, found.by_action().tolist(), strict=True))
        return {
            "validation_loss": self._loss(policy),
            "validation_action_error": found.error,
            **{f"validation_action_error/{name}": error for name, error in by_name.items()},
        }

    @torch.no_grad()
    def _loss(self, policy: MultitaskDiTPolicy) -> float:
        total = count = 0.0
        with policy.evaluating():
            for rows, batch in self._batches():
                # One sequence for all rows, of which each batch takes its own: its size changes nothing.
                draws = Draws(torch.Generator().manual_seed(self._seed), rows, len(self.rows))
                terms = policy.loss_terms(batch, draws)
                total += terms.total.double().item()
                count += float(terms.count)
        return total / max(count, 1.0)

    def _batches(self) -> Iterator[tuple[slice, dict[str, Any]]]:
        for start in range(0, len(self.rows), self._batch_size):
            rows = slice(start, min(start + self._batch_size, len(self.rows)))
            yield rows, gather(self._windows, self._frames, self.rows[rows])
