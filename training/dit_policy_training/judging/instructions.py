"""The instructions of a dataset: how many examples each has, and how far apart the policy's text encoder puts them."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_training.data.table import Table
from dit_policy_training.judging.predictions import Predictions


@dataclass(frozen=True)
class Task:
    """One instruction: how much the dataset has of it, and what the policy's mean error on it is, in units."""

    task: str
    episodes: int
    frames: int
    error: float | None  # None if no moment of it was asked
    moments: int  # that were
    trained_on: bool  # whether the checkpoint names it among its tasks


@dataclass(frozen=True)
class Pair:
    """Two instructions and the cosine between their vectors: the frozen text tower's, and after the projection."""

    one: str
    other: str
    tower: float
    projected: float


def tasks_of(policy: MultitaskDiTPolicy, table: Table, predictions: Predictions) -> list[Task]:
    """Every instruction of the dataset that has frames, in the dataset's order."""
    starts = table.task_index[table.episode_starts]
    errors, moments = predictions.by_task(), Counter(predictions.tasks)
    return [
        Task(
            task,
            int((starts == number).sum()),
            int((table.task_index == number).sum()),
            errors.get(task),
            moments[task],
            not policy.config.tasks or task in policy.config.tasks,
        )
        for number, task in enumerate(table.tasks)
        if (table.task_index == number).any()
    ]


@torch.inference_mode()
def closest_pairs(policy: MultitaskDiTPolicy, tasks: list[str]) -> list[Pair]:
    """All pairs of instructions, the most alike by the tower first; none for a policy that reads none."""
    encoder = policy.observation_encoder.text_encoder
    if encoder is None or len(tasks) < 2:
        return []
    with policy.evaluating():
        tower, projected = _cosines(encoder.pooled(tasks)), _cosines(encoder(tasks))
    pairs = [
        Pair(tasks[i], tasks[j], float(tower[i, j]), float(projected[i, j]))
        for i in range(len(tasks))
        for j in range(i + 1, len(tasks))
    ]
    return sorted(pairs, key=lambda pair: -pair.tower)


def _cosines(vectors: torch.Tensor) -> np.ndarray:
    """(N, D) -> (N, N); 1 between vectors of length 0, which nothing tells apart."""
    vectors = vectors.double().cpu()
    length = vectors.norm(dim=1, keepdim=True)
    unit = torch.where(length > 0, vectors / length.clamp_min(1e-300), 0.0)
    cosines = unit @ unit.T
    nothing = (length == 0).squeeze(1)
    cosines[nothing[:, None] & nothing[None, :]] = 1.0
    result: np.ndarray = cosines.numpy()
    return result
