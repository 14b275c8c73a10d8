"""Which sampler, how many denoising steps, and how many steps of a chunk to execute: each combination measured.

In the simulator a combination is judged by success. Offline nothing closes the loop; what can be told is how far the
executed steps are from the recorded ones, and how far the next chunk begins from where the last one would have gone on.
More executed steps make the first worse and the second rarer, so their score is the error plus the jump shared among
the steps from one seam to the next.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dit_policy_ros.policy.engine import PolicyEngine
from dit_policy_ros.policy.sampling import Sampling
from dit_policy_training.data.frames import gather
from dit_policy_training.judging.opening import Subject
from dit_policy_training.judging.predictions import Predictions, predict

TIMED = 7  # chunks
ALIKE = 1.03  # scores this near to the least are taken for the same


@dataclass(frozen=True)
class Combination:
    """What the node is told, by its parameters' names."""

    sampler: str
    denoising_steps: int
    n_action_steps: int
    guidance_scale: float = 1.0  # 1: none

    def __str__(self) -> str:
        guided = "" if self.guidance_scale == 1 else f", guidance {self.guidance_scale:g}"
        return f"{self.sampler}, {self.denoising_steps} denoising steps, {self.n_action_steps} executed{guided}"

    @property
    def sampling(self) -> Sampling:
        """How a chunk is sampled, whatever of it is executed."""
        return Sampling(self.sampler, self.denoising_steps, self.guidance_scale)


@dataclass(frozen=True)
class Measured:
    """What came of a combination; what was not measured is None. error and seam in the dataset's units."""

    combination: Combination
    chunk_ms: float  # on this machine
    error: float | None = None  # of the executed steps
    seam: float | None = None  # |next chunk's first step - the step this chunk had in its place|
    episodes: int | None = None
    success: int | None = None
    wrong_block: int | None = None
    refused: int | None = None
    latency: float | None = None  # s, of a chunk in the simulator

    @property
    def success_share(self) -> float:
        """Of the episodes; 0 where none was run."""
        return (self.success or 0) / self.episodes if self.episodes else 0.0

    @property
    def score(self) -> float | None:
        """Error, and the seam's jump shared among the steps from one to the next; the less, the better."""
        if self.error is None:
            return None
        return self.error + (self.seam or 0.0) / self.combination.n_action_steps

    def is_late(self, fps: float) -> bool:
        """Whether a chunk takes longer than its executed steps last: the arm would wait for it."""
        return self.chunk_ms / 1e3 >= self.combination.n_action_steps / fps

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"score": self.score}

    @classmethod
    def from_plain(cls, document: dict[str, Any]) -> "Measured":
        """The same read again."""
        known: dict[str, Any] = {one.name: document.get(one.name) for one in fields(cls)}
        known["combination"] = Combination(**document["combination"])
        return cls(**known)


class Record:
    """tune.json: what has been measured so far, on disk after each; that of the same question is read again."""

    def __init__(self, path: Path, question: dict[str, Any]):
        self._path, self._question = path, question
        self.measured: dict[Combination, Measured] = {}
        if path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            document = json.loads(self._path.read_text())
            if document["question"] == self._question:
                every = [Measured.from_plain(one) for one in document["measured"]]
                self.measured = {one.combination: one for one in every}
        except (ValueError, KeyError, TypeError):
            return  # of another version, or cut short: measured anew

    def add(self, measured: Measured) -> None:
        """Keep one."""
        self.measured[measured.combination] = measured
        self.write({})

    def write(self, more: dict[str, Any]) -> None:
        """The file, at once whole."""
        document = {"question": self._question, **more, "measured": [one.plain() for one in self.measured.values()]}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        partial.write_text(json.dumps(document, indent=2) + "\n")
        partial.replace(self._path)


def digest(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's weights and configuration."""
    sha = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with (checkpoint / name).open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


class Clock:
    """How long this machine takes for a chunk of an observation, cameras and all; each sampling is timed once."""

    def __init__(self, engine: PolicyEngine, batch: dict[str, Any]):
        self._engine, self._batch = engine, batch
        self._known: dict[Sampling, float] = {}

    def milliseconds(self, sampling: Sampling) -> float:
        """The median of some chunks."""
        if sampling not in self._known:
            taken = []
            for _ in range(TIMED + 1):  # the first one fills caches
                began = time.perf_counter()
                self._engine.predict_chunk(self._batch, sampling, generator=torch.Generator().manual_seed(0)).cpu()
                taken.append(1e3 * (time.perf_counter() - began))
            self._known[sampling] = median(taken[1:])
        return self._known[sampling]


def clock_of(subject: Subject) -> Clock:
    """Times chunks of the dataset's first observation."""
    return Clock(PolicyEngine(subject.policy), gather(subject.windows, subject.frames, np.array([0])))


def blank_observation(policy: Any) -> dict[str, Any]:
    """An observation of zeros, to time chunks where there is no dataset."""
    batch: dict[str, Any] = {
        key: torch.zeros(1, policy.config.n_obs_steps, *feature.shape)
        for key, feature in policy.config.input_features.items()
    }
    return batch | {"task": [(policy.config.tasks or ["do it"])[0]]}


@dataclass(frozen=True)
class Offline:
    """Measures combinations against recorded episodes; the moments are the same for all."""

    subject: Subject
    starts: np.ndarray  # (M,) rows
    seed: int = 0
    batch_size: int = 64

    def measure(self, sampling: Sampling, executed: Sequence[int]) -> dict[int, tuple[float, float | None]]:
        """(error, seam) by n_action_steps; each moment is predicted once for all of them."""
        end = self.subject.table.episode_end[self.starts]
        follow = {n: (self.starts + n)[self.starts + n < end] for n in executed}
        rows = np.unique(np.concatenate([self.starts, *follow.values()]))
        found = predict(
            self.subject.policy,
            self.subject.windows,
            self.subject.frames,
            rows,
            sampling=sampling,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        place = {int(row): number for number, row in enumerate(found.rows)}
        at = np.array([place[int(row)] for row in self.starts])
        return {n: (float(np.nanmean(found.distances[at, :n])), self._seam(found, place, n)) for n in executed}

    def _seam(self, found: Predictions, place: dict[int, int], n: int) -> float | None:
        """The mean jump; None where no episode is that long."""
        table = self.subject.table
        rows = self.starts[self.starts + n < table.episode_end[self.starts]]
        if len(rows) == 0:
            return None
        before = found.predicted[[place[int(row)] for row in rows]]
        after = found.predicted[[place[int(row) + n] for row in rows], 0]
        if n < before.shape[1]:
            expected = before[:, n]
        else:  # the chunk is at its end: it would have gone on as the recorded actions did
            expected = before[:, -1] + table.action[rows + n] - table.action[rows + n - 1]
        return float(np.abs(expected - after).mean())


def best_of(every: Iterable[Measured], fps: float) -> tuple[Measured, str]:
    """The combination to use, and why. Raises ValueError if there is none.

    Success first; among those that succeed as often, the least score; among those whose scores are alike, the quickest,
    and then the one with the fewest denoising steps.
    """
    every = list(every)
    if not every:
        raise ValueError("nothing was measured")
    timely = [one for one in every if not one.is_late(fps)]
    said = (
        [f"{len(every) - len(timely)} of {len(every)} take longer than their steps last"]
        if len(timely) < len(every)
        else []
    )
    left = timely or every
    if left[0].episodes:
        most = max(one.success_share for one in left)
        left = [one for one in left if one.success_share == most]
        said.append(f"{_many(len(left), 'succeeds', 'succeed')} most often, {most:.0%} of {left[0].episodes} episodes")
    scores = [one.score for one in left if one.score is not None]
    if scores:
        least = min(scores)
        left = [one for one in left if one.score is not None and one.score <= ALIKE * least]
        which = _many(len(left), "has", "have")
        said.append(f"{which} the least score, error and jump together (within {ALIKE - 1:.0%})")
    chosen = min(
        left, key=lambda one: (round(one.chunk_ms), one.combination.denoising_steps, -one.combination.n_action_steps)
    )
    if len(left) > 1:
        said.append(f"of these it is the quickest with {chosen.chunk_ms:.0f} ms a chunk")
    return chosen, "; ".join(said) + "."


def _many(count: int, one: str, more: str) -> str:
    return f"it alone {one}" if count == 1 else f"{count} {more}"
