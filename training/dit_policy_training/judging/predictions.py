"""Chunks that a policy predicts at recorded moments, beside the actions that were recorded there.

A moment's noise depends on the seed, the moment and the sample's number alone: not on the batch it is computed in, nor
on the checkpoint, so that two policies, or one policy asked twice, are compared from the same noise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_policy_ros.policy.configuration import ACTION, ACTION_IS_PAD, STATE, TASK
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.sampling import AS_CONFIGURED, Sampling, make_plan
from dit_policy_training.data.frames import Frames, gather
from dit_policy_training.data.windows import Windows

Change = Callable[[dict[str, Any]], Mapping[str, Any]]
"""What is altered of a batch before the policy sees it."""


@dataclass(frozen=True)
class Predictions:
    """N moments, S samples each, chunks of T steps from the newest observation on, A actions; absolute, in units.

    Steps that lie behind the episode's end (is_pad) count nowhere.
    """

    rows: np.ndarray  # (N,) of the table
    samples: np.ndarray  # (N, S, T, A) float32
    recorded: np.ndarray  # (N, T, A) float32
    is_pad: np.ndarray  # (N, T) bool
    tasks: list[str]  # N recorded instructions

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def predicted(self) -> np.ndarray:
        """(N, T, A): the first sample of each moment, which is what a robot would have executed."""
        return self.samples[:, 0]

    @cached_property
    def distances(self) -> np.ndarray:
        """|predicted - recorded|, (N, T, A) float64, NaN where there is no recorded action."""
        return self.distances_of(self.predicted)

    def distances_of(self, actions: np.ndarray) -> np.ndarray:
        """|actions - recorded| for other actions than the predicted ones, (N, T, A) or what broadcasts to it."""
        apart = np.abs(actions.astype(np.float64) - self.recorded)
        return np.where(self.is_pad[:, :, None], np.nan, apart)

    @property
    def error(self) -> float:
        """The mean of all distances."""
        return float(np.nanmean(self.distances))

    def by_step(self) -> np.ndarray:
        """(T,) mean distance of each step; NaN for a step that no moment has."""
        return mean_over(self.distances, (0, 2))

    def by_action(self) -> np.ndarray:
        """(A,) mean distance of each action dimension."""
        return mean_over(self.distances, (0, 1))

    def by_step_and_action(self) -> np.ndarray:
        """(T, A) mean distance."""
        return mean_over(self.distances, (0,))

    def by_row(self) -> np.ndarray:
        """(N,) mean distance of each moment's chunk."""
        return mean_over(self.distances, (1, 2))

    def by_task(self) -> dict[str, float]:
        """Mean distance by instruction, in the order of their first moments."""
        tasks = np.array(self.tasks)
        return {task: float(np.nanmean(self.distances[tasks == task])) for task in dict.fromkeys(self.tasks)}

    def spread(self) -> np.ndarray:
        """(N, T, A) standard deviation of the samples around their mean, NaN behind the end; 0 for one sample."""
        return np.where(self.is_pad[:, :, None], np.nan, self.samples.std(axis=1, dtype=np.float64))

    def closest(self) -> np.ndarray:
        """(N,) mean distance of the sample that is closest to what was recorded."""
        apart = np.abs(self.samples.astype(np.float64) - self.recorded[:, None])
        return mean_over(np.where(self.is_pad[:, None, :, None], np.nan, apart), (2, 3)).min(axis=1)


def mean_over(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The mean over what is not NaN; NaN, without a warning, where nothing is left."""
    there = ~np.isnan(values)
    count = there.sum(axis=axes)
    total = np.where(there, values, 0.0).sum(axis=axes)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


@torch.inference_mode()
def predict(
    policy: MultitaskDiTPolicy,
    windows: Windows,
    frames: Frames,
    rows: np.ndarray,
    *,
    sampling: Sampling = AS_CONFIGURED,
    seed: int = 0,
    batch_size: int = 64,
    change: Change | None = None,
    samples: int = 1,
    advance: Callable[[int], None] | None = None,
) -> Predictions:
    """What the policy predicts at these rows of the table, (N,); advance(n) is told of every n that are done.

    change(batch) -> batch alters what the policy sees, never what is held against it. Raises ValueError for rows that
    are none, and for a sampling that the policy cannot follow.
    """
    rows = np.asarray(rows)
    if len(rows) == 0:
        raise ValueError("no moments to predict at: choose episodes, frames or --max_samples that leave some")
    if sampling.candidates != 1:
        raise ValueError(f"Sampling(candidates={sampling.candidates}): here each sample is kept; give `samples`")
    chunks, recorded, is_pad, tasks = [], [], [], []
    past = windows.n_obs_steps - 1
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        batch = gather(windows, frames, some)
        seen = batch if change is None else change(dict(batch))
        chunks.append(_chunks(policy, seen, sampling, some, seed, samples).cpu().numpy())
        recorded.append(np.asarray(batch[ACTION])[:, past:])
        is_pad.append(np.asarray(batch[ACTION_IS_PAD])[:, past:])
        tasks += batch[TASK]
        if advance is not None:
            advance(len(some))
    return Predictions(rows, np.concatenate(chunks), np.concatenate(recorded), np.concatenate(is_pad), tasks)


def _chunks(
    policy: MultitaskDiTPolicy, batch: Mapping[str, Any], sampling: Sampling, rows: np.ndarray, seed: int, samples: int
) -> Tensor:
    """(B, S, T, A) in units. As policy.predict_candidates, but with ddpm's noise of each step by row as well."""
    config, chosen = policy.config, sampling.resolve(policy.config)
    with policy.evaluating():
        conditioning = policy.encode(batch)
        unconditional = policy.encode(batch, without_instruction=True) if chosen.guidance_scale != 1 else None
        plan = make_plan(policy.objective, chosen.sampler, chosen.denoising_steps, conditioning.device)
        draws = 1 + (plan.steps if plan.draws_noise else 0)
        noise = row_noise(rows, seed, samples, (draws, config.horizon, config.action_dim)).to(conditioning)
        step_noise = noise[1:] if plan.draws_noise else None
        chunk = policy.denoise(plan, noise[0], step_noise, None, conditioning, unconditional, chosen.guidance_scale)
        chunk = chunk[:, config.n_obs_steps - 1 :].unflatten(0, (len(rows), samples))
        return policy.action_normalizer.undo(chunk) + policy.action_origin(batch).unsqueeze(1)


def row_noise(rows: np.ndarray, seed: int, samples: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal (shape[0], B * S, *shape[1:]) float32; a sample's depends on seed, row and its number alone."""
    drawn = [
        np.random.default_rng((seed, int(row), sample)).standard_normal(shape, dtype=np.float32)
        for row in rows
        for sample in range(samples)
    ]
    return torch.from_numpy(np.stack(drawn, axis=1))


def standing_still(policy: MultitaskDiTPolicy, windows: Windows, rows: np.ndarray) -> np.ndarray | None:
    """(N, 1, A) the joints as they were measured at each moment; None if the state does not hold all of them.

    What to hold a policy against: one that does not move has this error.
    """
    indices = policy.config.action_state_indices
    if indices is None or STATE not in policy.config.input_features:
        return None
    return windows.table.state[np.asarray(rows)][:, None, indices]
