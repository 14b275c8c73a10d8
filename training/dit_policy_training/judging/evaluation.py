"""How far a policy's chunks are from what was recorded: by step, action, task and episode, with what to judge it by.

Two baselines do not look at anything: one stays where the arm is, one always gives the dataset's mean action. Several
samples of the same moments tell whether the policy knows more than one way: then the closest of them is much closer
than any single one, and the error of one says little.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dit_policy_ros.policy.sampling import AS_CONFIGURED, Sampling
from dit_policy_training.judging.held_out import UNKNOWN, Seen, rows_to_judge, seen_of
from dit_policy_training.judging.opening import Subject, place_of, rows_of_episodes, some_of
from dit_policy_training.judging.predictions import Predictions, mean_over, predict, standing_still

STILL, MEAN = "stands still", "mean action"
FILM = 8  # pictures of an episode


@dataclass(frozen=True)
class Choice:
    """Which moments are looked at, and how: `most` moments (0: all) of `episodes` (empty: all)."""

    episodes: Sequence[int] = ()
    held_out: bool = False  # instead: those that the checkpoint's run held out
    most: int = 0
    samples: int = 8  # of each of sampled_moments
    sampled_moments: int = 200
    drawn_episodes: int = 3  # 0: none
    seed: int = 0
    batch_size: int = 64
    sampling: Sampling = AS_CONFIGURED


@dataclass(frozen=True)
class Evaluation:
    """A subject's predictions: at all moments chosen, several samples at some of them, all chunks of some episodes.

    baselines: actions, of the shape of the predicted ones or what broadcasts to it, by name.
    """

    subject: Subject
    choice: Choice
    predictions: Predictions
    sampled: Predictions
    baselines: dict[str, np.ndarray]
    drawn: dict[int, Predictions] = field(default_factory=dict)
    seen: Seen | None = None  # of the episodes, in training; None where that is not known

    @property
    def executed(self) -> int:
        """Steps of a chunk that are executed, as the checkpoint says."""
        return self.subject.executed


Advance = Callable[[str, int, int], None]
"""(what, done, of how many)."""


def evaluate(subject: Subject, choice: Choice, advance: Advance = lambda *_: None) -> Evaluation:
    """Predict at the moments chosen. Raises ValueError for episodes that are not there and an impossible sampling."""
    if choice.samples < 2:
        raise ValueError(f"samples must be at least 2, to see how far they are apart; got {choice.samples}")
    table = subject.table
    every = rows_to_judge(table, [subject.folder], choice.episodes, choice.held_out)
    rows = some_of(every, choice.most, choice.seed)
    predictions = _predict(subject, choice, rows, 1, "predicting", advance)
    few = some_of(rows, choice.sampled_moments, choice.seed)
    sampled = _predict(subject, choice, few, choice.samples, "several samples", advance)
    episodes = choice.episodes or _telling(subject, predictions)
    drawn = {
        number: _predict(subject, choice, rows_of_episodes(table, [number]), 1, f"episode {number}", advance)
        for number in list(episodes)[: choice.drawn_episodes]
    }
    still = standing_still(subject.policy, subject.windows, rows)
    mean = table.action.mean(axis=0, dtype=np.float64)
    baselines = ({} if still is None else {STILL: still}) | {MEAN: mean}
    seen = seen_of(subject.folder, table, rows)
    return Evaluation(subject, choice, predictions, sampled, baselines, drawn, seen)


def _predict(
    subject: Subject, choice: Choice, rows: np.ndarray, samples: int, what: str, advance: Advance
) -> Predictions:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        advance(what, done, len(rows))

    return predict(
        subject.policy,
        subject.windows,
        subject.frames,
        rows,
        sampling=choice.sampling,
        seed=choice.seed,
        batch_size=max(choice.batch_size // samples, 1),
        samples=samples,
        advance=progress,
    )


def _telling(subject: Subject, predictions: Predictions) -> list[int]:
    """The episodes with the largest, the median and the least error."""
    errors = episode_errors(subject, predictions)
    order = sorted(errors, key=lambda number: -errors[number])
    return list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]]))


def episode_errors(subject: Subject, predictions: Predictions) -> dict[int, float]:
    """Mean distance by episode, of those that have moments, in order."""
    numbers = np.array([place_of(subject.table, row)[0] for row in predictions.rows])
    return {int(number): float(np.nanmean(predictions.distances[numbers == number])) for number in np.unique(numbers)}


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """The content of report.json; distances are mean |predicted - recorded| in the dataset's units."""
    subject, found = evaluation.subject, evaluation.predictions
    config, table, choice = subject.policy.config, subject.table, evaluation.choice
    chosen = choice.sampling.resolve(config)
    return {
        "checkpoint": str(subject.folder),
        "dataset": {"name": table.name, "episodes": table.episodes, "frames": len(table), "fps": table.fps},
        "robot": None if subject.embodiment is None else subject.embodiment.name,
        "unit": {"name": subject.unit.name, "scale": subject.unit.scale},
        "settings": {
            "moments": len(found),
            "episodes": list(choice.episodes) or ("held out" if choice.held_out else "all"),
            "seed": choice.seed,
            "sampler": chosen.sampler,
            "denoising_steps": chosen.denoising_steps,
            "guidance_scale": chosen.guidance_scale,
            "horizon": config.horizon,
            "n_obs_steps": config.n_obs_steps,
            "n_action_steps": config.n_action_steps,
        },
        "trained_on": None if evaluation.seen is None else asdict(evaluation.seen),
        "error": found.error,
        "error_executed": _executed(evaluation, found.distances),
        "by_step": plain(found.by_step()),
        "baselines": {name: _baseline(evaluation, actions) for name, actions in evaluation.baselines.items()},
        "actions": _actions(evaluation),
        "by_step_and_action": plain(found.by_step_and_action()),
        "tasks": _tasks(evaluation),
        "by_episode": _episodes(evaluation),
        "samples": _samples(evaluation),
    }


def plain(values: np.ndarray) -> Any:
    """Nested lists with None for NaN: JSON has none."""
    wide = values.astype(object)
    wide[np.isnan(values)] = None
    return wide.tolist()


def _executed(evaluation: Evaluation, distances: np.ndarray) -> float:
    return float(np.nanmean(distances[:, : evaluation.executed]))


def _baseline(evaluation: Evaluation, actions: np.ndarray) -> dict[str, Any]:
    distances = evaluation.predictions.distances_of(actions)
    return {
        "error": float(np.nanmean(distances)),
        "error_executed": _executed(evaluation, distances),
        "by_step": plain(mean_over(distances, (0, 2))),
        "by_action": plain(mean_over(distances, (0, 1))),
    }


def _actions(evaluation: Evaluation) -> list[dict[str, Any]]:
    found, table = evaluation.predictions, evaluation.subject.table
    executed = mean_over(found.distances[:, : evaluation.executed], (0, 1))
    span = np.ptp(table.action.astype(np.float64), axis=0)
    return [
        {
            "name": name,
            "error": error,
            "error_executed": first,
            "range": reach,
            "share_of_range": error / reach if reach > 0 else None,
        }
        for name, error, first, reach in zip(
            table.action_names, found.by_action().tolist(), executed.tolist(), span.tolist(), strict=True
        )
    ]


def _tasks(evaluation: Evaluation) -> list[dict[str, Any]]:
    found, subject = evaluation.predictions, evaluation.subject
    still = evaluation.baselines.get(STILL)
    tasks = np.array(found.tasks)
    numbers = np.array([place_of(subject.table, row)[0] for row in found.rows])
    rows = []
    for task, error in found.by_task().items():
        here = tasks == task
        row = {"task": task, "moments": int(here.sum()), "episodes": len(np.unique(numbers[here])), "error": error}
        row["error_executed"] = _executed(evaluation, found.distances[here])
        row[STILL] = None if still is None else float(np.nanmean(found.distances_of(still)[here]))
        rows.append(row)
    return rows


def _episodes(evaluation: Evaluation) -> list[dict[str, Any]]:
    subject, table = evaluation.subject, evaluation.subject.table
    errors = episode_errors(subject, evaluation.predictions)
    starts = table.episode_starts
    return [
        {
            "episode": number,
            "task": table.tasks[table.task_index[starts[number]]],
            "frames": int(table.episode_end[starts[number]] - starts[number]),
            "error": error,
        }
        for number, error in errors.items()
    ]


def _samples(evaluation: Evaluation) -> dict[str, Any]:
    found = evaluation.sampled
    one, closest, spread = found.by_row(), found.closest(), mean_over(found.spread(), (1, 2))
    middle = float(np.nanmean(found.distances_of(found.samples.mean(axis=1, dtype=np.float64))))
    varied = len(found) > 2 and spread.std() > 0 and one.std() > 0
    return {
        "count": found.samples.shape[1],
        "moments": len(found),
        "error_of_one": float(one.mean()),
        "error_of_closest": float(closest.mean()),
        "error_of_mean": middle,
        "spread": float(spread.mean()),
        "correlation": float(np.corrcoef(spread, one)[0, 1]) if varied else None,
        "by_moment": {"rows": found.rows.tolist(), "spread": spread.tolist(), "error": one.tolist()},
    }


def verdicts(report: dict[str, Any]) -> list[tuple[bool, str]]:
    """How it compares with what looks at nothing: (whether it is better, sentence)."""
    said = []
    for name, baseline in report["baselines"].items():
        ratio = report["error"] / baseline["error"] if baseline["error"] else float("inf")
        what = "an arm that stands still" if name == STILL else "always giving the dataset's mean action"
        said.append((ratio < 1, f"Its error is {ratio:.2f} times that of {what}."))
    return said


def on_training(report: dict[str, Any]) -> str:
    """How many of the judged episodes it was trained on, in a sentence."""
    return str(Seen(**report["trained_on"])) if report["trained_on"] else UNKNOWN


def on_samples(report: dict[str, Any]) -> str:
    """What several samples of a moment say, in a sentence."""
    told = report["samples"]
    gain = told["error_of_closest"] / told["error_of_one"] if told["error_of_one"] else 1.0
    return (
        f"The closest of {told['count']} samples is {gain:.2f} times as far from the recorded actions as one sample: "
        "well below 1, the policy knows several ways or is not sure of its own; near 1, it always does the same."
    )
