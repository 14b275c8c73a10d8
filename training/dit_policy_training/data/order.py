"""Which samples make a batch: functions of the batch's number alone, so that a run can go on anywhere."""

from collections.abc import Mapping
from difflib import get_close_matches

import numpy as np

from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.table import Table
from dit_policy_training.data.windows import Windows

_FEWEST_EPISODES = 10  # to hold any out
_FEWEST_OF_A_TASK = 5  # of which one is held out: less would cost the task too much
_ROWS = 65536  # taken at a time
_TOLD = 10  # instructions that a message names


class SampleOrder:
    """An endless stream of rows, cut into batches: batch i is the positions i * batch_size to (i + 1) * batch_size.

    The stream goes epoch by epoch, each len(rows) long: without weights every row once; with weights a systematic
    resample (Kitagawa 1996), in which each row comes the floor or the ceiling of its expected number of times. The
    order of an epoch is a function of (seed, epoch); a batch may reach over an epoch's end.
    """

    def __init__(self, rows: np.ndarray, weights: np.ndarray | None, batch_size: int, seed: int):
        """`weights` are those of `rows`, one each, at least 0. Raises DatasetError if nothing can be drawn."""
        if len(rows) == 0:
            raise DatasetError("there is no frame to train on: every episode is held out, or weighs nothing")
        if weights is not None and (weights.shape != rows.shape or not np.isfinite(weights).all() or weights.min() < 0):
            raise ValueError(f"weights must be finite, at least 0 and one for each of {len(rows)} rows")
        if weights is not None and weights.sum() <= 0:
            raise DatasetError(
                "there is no frame to train on: task_weights, idle_weight or drop_n_last_frames leave none"
            )
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._weights = None if weights is None or np.ptp(weights) == 0 else weights.astype(np.float64)
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def epoch_length(self) -> int:
        """Samples that an epoch has."""
        return len(self._rows)

    def at(self, index: int) -> np.ndarray:
        """The rows (batch_size,) of a batch."""
        positions = np.arange(index * self._batch_size, (index + 1) * self._batch_size)
        epochs, places = np.divmod(positions, len(self._rows))
        return np.concatenate([self._epoch(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            generator = np.random.default_rng((self._seed, epoch))
            order = generator.permutation(self._rows if self._weights is None else self._resampled(generator))
            self._epochs = {epoch - 1: self._epochs[epoch - 1]} if epoch - 1 in self._epochs else {}
            self._epochs[epoch] = order
        return self._epochs[epoch]

    def _resampled(self, generator: np.random.Generator) -> np.ndarray:
        """Rows, each as often as its weight says: the whole part of that surely, the rest by one comb over all."""
        assert self._weights is not None
        count = len(self._rows)
        expected = self._weights * (count / self._weights.sum())
        whole = np.floor(expected + 1e-9)  # an expected 2.9999999999 is 3
        rest = np.maximum(expected - whole, 0.0)
        times, left = whole.astype(np.int64), count - int(whole.sum())
        if left > 0:
            teeth = np.cumsum(rest)  # in the order of the rows, so that what is left out is spread along each episode
            teeth *= left / teeth[-1]
            teeth[-1] = left
            hits = np.floor(teeth + generator.random())
            times += np.diff(hits, prepend=0.0).astype(np.int64)
        return np.repeat(self._rows, times)


def row_weights(
    table: Table,
    windows: Windows,
    *,
    task_weights: Mapping[str, float],
    balance_tasks: bool,
    idle_weight: float,
    idle_motion: float,
    n_action_steps: int,
    drop_n_last_frames: int,
    among: np.ndarray | None = None,
) -> np.ndarray:
    """How often each row (N,) is drawn, relative to the others; all 1 where nothing is asked for.

    `among`, if given, are the rows that may be drawn; others weigh 0. In this order: an episode's last frames weigh 0,
    idle frames `idle_weight`; with `balance_tasks` every task weighs the same in all; tasks are multiplied by their
    weight; each dataset weighs its share. Raises DatasetError.
    """
    weights = np.ones(len(table))
    if among is not None:
        weights = np.zeros(len(table))
        weights[among] = 1.0
    if drop_n_last_frames:
        weights[table.episode_end - np.arange(len(table)) <= drop_n_last_frames] = 0.0
    if idle_weight != 1:
        weights[is_idle(windows, n_action_steps, idle_motion)] *= idle_weight
    shares = _shares(table)
    if balance_tasks:
        for first, end in [(part.first, part.first + part.rows) for part in table.parts] if shares else [(0, None)]:
            weights[first:end] = _balanced(weights[first:end], table.task_index[first:end])
    weights *= _by_task(table, task_weights)[table.task_index]
    for part, share in zip(table.parts, shares, strict=False):
        rows = slice(part.first, part.first + part.rows)
        total = weights[rows].sum()
        if total <= 0:
            raise DatasetError(
                f"no frame of {part.name} is left to train on: task_weights, idle_weight, drop_n_last_frames or the "
                "episodes held out leave none"
            )
        weights[rows] *= share * len(table) / total
    return weights


def _shares(table: Table) -> list[float]:
    """Each dataset's share of the samples; empty where none is asked for."""
    given = [part.weight for part in table.parts]
    if not any(given):
        return []
    if min(given) <= 0:
        weights = ", ".join(f"{part.name}: {part.weight:g}" for part in table.parts)
        raise DatasetError(f"give every dataset a weight above 0, or none of them; got {weights}")
    return [weight / sum(given) for weight in given]


def _balanced(weights: np.ndarray, task_index: np.ndarray) -> np.ndarray:
    totals = np.bincount(task_index, weights)
    present = totals > 0
    factors = np.zeros(len(totals))
    factors[present] = totals.sum() / present.sum() / totals[present]
    return weights * factors[task_index]


def _by_task(table: Table, task_weights: Mapping[str, float]) -> np.ndarray:
    known = set(table.tasks)
    if unknown := [task for task in task_weights if task not in known]:
        there = get_close_matches(unknown[0], table.tasks, _TOLD, cutoff=0.0) if len(known) > _TOLD else table.tasks
        raise DatasetError(
            f"task_weights names instructions that no dataset has: {unknown}; there are {len(known)}, such as {there}"
        )
    if wrong := {task: weight for task, weight in task_weights.items() if not 0 <= weight < np.inf}:
        raise DatasetError(f"task_weights must be finite and at least 0, got {wrong}")
    return np.array([task_weights.get(task, 1.0) for task in table.tasks])


def is_idle(windows: Windows, n_action_steps: int, idle_motion: float) -> np.ndarray:
    """(N,) whether the actions of the next n_action_steps stay, in every dimension, within `idle_motion` (a share of
    the dimension's range over all rows) of the row's own action. What lies beyond the episode's end is not asked.
    """
    table = windows.table
    allowed = idle_motion * np.ptp(table.action, axis=0)
    idle = np.ones(len(table), dtype=bool)
    for first in range(0, len(table), _ROWS):
        rows = np.arange(first, min(first + _ROWS, len(table)))
        for step in range(1, n_action_steps):
            later = np.minimum(rows + step, table.episode_end[rows] - 1)
            idle[rows] &= (np.abs(table.action[later] - table.action[rows]) <= allowed).all(axis=1)
    return idle


def split_episodes(table: Table, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those held out, whole episodes each, in order.

    Of each task round(share x its episodes) are held out, at least one where it has five, never all; if that is less
    than the share of all episodes, as with an instruction for each, more of any. None are held out of fewer than ten
    episodes, or with share 0.
    """
    starts = table.episode_starts
    if share <= 0 or len(starts) < _FEWEST_EPISODES:
        return np.arange(len(table)), np.arange(0)
    generator = np.random.default_rng((seed, len(starts)))
    task_of = table.task_index[starts]
    mixed = generator.permutation(len(starts))
    mixed = mixed[np.argsort(task_of[mixed], kind="stable")]  # by task, within each in any order
    _, firsts, counts = np.unique(task_of[mixed], return_index=True, return_counts=True)
    rank = np.arange(len(mixed)) - np.repeat(firsts, counts)
    least = (counts >= _FEWEST_OF_A_TASK).astype(int)
    wanted = np.minimum(np.maximum(np.round(share * counts).astype(int), least), counts - 1)
    is_held_out = rank < np.repeat(wanted, counts)
    if (missing := max(round(share * len(starts)), 1) - is_held_out.sum()) > 0:
        # Of tasks that keep one first; of the only episodes of their task where there are no others.
        left = np.flatnonzero(~is_held_out)
        left = left[np.lexsort((generator.random(len(left)), rank[left] == np.repeat(counts - 1, counts)[left]))]
        is_held_out[left[: min(missing, len(left) - 1)]] = True
    rows = np.isin(table.episode_start, starts[mixed[is_held_out]])
    return np.flatnonzero(~rows), np.flatnonzero(rows)
