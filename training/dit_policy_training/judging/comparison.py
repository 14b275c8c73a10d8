"""Several checkpoints at the same recorded moments, from the same noise.

They must be of the dataset's robot; they may differ in horizon, objective or size. What is compared are the steps that
all of them predict, so that a longer chunk is not worse for reaching farther.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dit_policy_ros.policy.sampling import Sampling
from dit_policy_training.data.frames import open_frames
from dit_policy_training.data.table import Table
from dit_policy_training.judging.evaluation import MEAN, STILL, plain
from dit_policy_training.judging.held_out import Seen, seen_of
from dit_policy_training.judging.opening import Subject, Unit, open_subject
from dit_policy_training.judging.predictions import Predictions, mean_over, predict, standing_still

RESAMPLED = 200  # times, for the interval of a difference


@dataclass(frozen=True)
class Rival:
    """One checkpoint's predictions, and what there is to know of it."""

    name: str
    folder: Path
    step: int | None  # of its training run, by its folder's name
    predictions: Predictions
    executed: int
    unit: Unit
    parameters: int
    chosen: str  # sampler and denoising steps
    still: np.ndarray | None
    seen: Seen | None  # of the judged episodes, in training; None where that is not known


@dataclass(frozen=True)
class Comparison:
    """All that could be compared; left_out says of the others why not."""

    table: Table
    rivals: list[Rival]
    left_out: dict[str, str]
    seed: int

    @property
    def steps(self) -> int:
        """Steps of a chunk that all of them predict."""
        return min(rival.predictions.recorded.shape[1] for rival in self.rivals)

    def distances(self, rival: Rival) -> np.ndarray:
        """(N, steps, A) |predicted - recorded|, of the steps that all have."""
        return rival.predictions.distances[:, : self.steps]


def compare(
    folders: Sequence[Path],
    table: Table,
    rows: np.ndarray,
    *,
    device: str = "cpu",
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 64,
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> Comparison:
    """Predict with each checkpoint; those that do not fit the dataset are left out, and told.

    Raises ValueError if none is left.
    """
    frames = open_frames(table, cache="off")
    names = names_of(folders)
    rivals: list[Rival] = []
    left_out: dict[str, str] = {}
    for name, folder in zip(names, folders, strict=True):
        try:
            subject = open_subject(folder, table, device, frames)
            rivals.append(_rival(name, subject, rows, sampling, seed, batch_size, advance))
        except ValueError as error:
            left_out[name] = str(error)
    if not rivals:
        raise ValueError("nothing to compare:\n" + "\n".join(f"{name}: {why}" for name, why in left_out.items()))
    return Comparison(table, rivals, left_out, seed)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The ends of their paths, as short as tells them apart; a step's number has its run's name before it.

    Raises ValueError for a checkpoint that is given twice: it differs from itself by nothing.
    """
    places = [folder.resolve() for folder in folders]
    if twice := [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        ways = " and ".join(str(folder) for folder in dict.fromkeys(twice))
        raise ValueError(f"--checkpoints names a checkpoint twice: {ways}; give each once")
    paths = [folder.resolve() if folder.is_symlink() else folder.absolute() for folder in folders]
    parts = [[part for part in path.parts if part not in ("checkpoints", "/")] for path in paths]
    lengths = [2 if each[-1].isdecimal() else 1 for each in parts]
    while True:
        names = ["/".join(each[-length:]) for each, length in zip(parts, lengths, strict=True)]
        longer = [
            length + (names.count(name) > 1 and length < len(each))
            for name, length, each in zip(names, lengths, parts, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer


def _rival(
    name: str,
    subject: Subject,
    rows: np.ndarray,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    advance: Callable[[str, int, int], None],
) -> Rival:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        advance(name, done, len(rows))

    found = predict(
        subject.policy,
        subject.windows,
        subject.frames,
        rows,
        sampling=sampling,
        seed=seed,
        batch_size=batch_size,
        advance=progress,
    )
    chosen = sampling.resolve(subject.policy.config)
    number = subject.folder.resolve().name
    return Rival(
        name=name,
        folder=subject.folder,
        step=int(number) if number.isdecimal() else None,
        predictions=found,
        executed=subject.executed,
        unit=subject.unit,
        parameters=sum(weight.numel() for weight in subject.policy.parameters()),
        chosen=f"{chosen.sampler} {chosen.denoising_steps}",
        still=standing_still(subject.policy, subject.windows, rows),
        seen=seen_of(subject.folder, subject.table, rows),
    )


def figures(comparison: Comparison) -> dict[str, Any]:
    """The content of report.json; distances in the dataset's units, over the steps that all checkpoints predict."""
    first, table = comparison.rivals[0], comparison.table
    return {
        "dataset": {"name": table.name, "episodes": table.episodes, "frames": len(table), "fps": table.fps},
        "unit": {"name": first.unit.name, "scale": first.unit.scale},
        "settings": {
            "moments": len(first.predictions),
            "seed": comparison.seed,
            "steps compared": comparison.steps,
            "steps of each": {rival.name: rival.predictions.recorded.shape[1] for rival in comparison.rivals},
        },
        "checkpoints": [_figures_of(comparison, rival) for rival in comparison.rivals],
        "baselines": _baselines(comparison),
        "differences": _differences(comparison),
        "left_out": comparison.left_out,
    }


def _figures_of(comparison: Comparison, rival: Rival) -> dict[str, Any]:
    distances, tasks = comparison.distances(rival), np.array(rival.predictions.tasks)
    return {
        "name": rival.name,
        "folder": str(rival.folder),
        "step": rival.step,
        "parameters": rival.parameters,
        "sampling": rival.chosen,
        "trained_on": None if rival.seen is None else asdict(rival.seen),
        "horizon": rival.predictions.recorded.shape[1],
        "n_action_steps": rival.executed,
        "error": float(np.nanmean(distances)),
        "error_executed": float(np.nanmean(distances[:, : rival.executed])),
        "by_step": plain(mean_over(distances, (0, 2))),
        "by_action": dict(zip(comparison.table.action_names, plain(mean_over(distances, (0, 1))), strict=True)),
        "by_task": {
            task: float(np.nanmean(distances[tasks == task])) for task in dict.fromkeys(rival.predictions.tasks)
        },
    }


def _baselines(comparison: Comparison) -> dict[str, Any]:
    rival = comparison.rivals[0]
    every = {MEAN: comparison.table.action.mean(axis=0, dtype=np.float64)}
    every |= {} if rival.still is None else {STILL: rival.still}
    found = {}
    for name, actions in every.items():
        distances = rival.predictions.distances_of(actions)[:, : comparison.steps]
        found[name] = {"error": float(np.nanmean(distances)), "by_step": plain(mean_over(distances, (0, 2)))}
    return found


def _differences(comparison: Comparison) -> list[dict[str, Any]]:
    """Each pair's difference of error, with the interval that holds 95 % of it if other episodes had been recorded."""
    episodes = comparison.table.episode_start[comparison.rivals[0].predictions.rows]
    numbers = np.unique(episodes, return_inverse=True)[1]
    return [
        {"of": a.name, "to": b.name, **_difference(comparison.distances(a), comparison.distances(b), numbers)}
        for a, b in combinations(comparison.rivals, 2)
    ]


def _difference(first: np.ndarray, second: np.ndarray, episodes: np.ndarray) -> dict[str, Any]:
    """Bootstrap over whole episodes: moments of one episode are alike, and are not so many independent ones."""
    apart = mean_over(first - second, (1, 2))
    count = int(episodes.max()) + 1
    sums = np.bincount(episodes, apart, count)
    sizes = np.bincount(episodes, minlength=count)
    rng = np.random.default_rng(0)
    picked = rng.integers(count, size=(RESAMPLED, count))
    means = sums[picked].sum(axis=1) / sizes[picked].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "difference": float(apart.mean()),
        "low": float(low),
        "high": float(high),
        "sure": bool(low > 0 or high < 0),
    }


def best(report: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with the least error over all compared steps."""
    found: dict[str, Any] = min(report["checkpoints"], key=lambda one: one["error"])
    return found
