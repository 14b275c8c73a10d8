"""All that is measured of a policy to find out why it does not do what it should."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dit_policy_training.data.table import Table
from dit_policy_training.judging.held_out import Seen, seen_of
from dit_policy_training.judging.idling import Idling, idling
from dit_policy_training.judging.instructions import Pair, Task, closest_pairs, tasks_of
from dit_policy_training.judging.listening import Answer, listen, ways
from dit_policy_training.judging.opening import AS_RECORDED, Subject, Unit
from dit_policy_training.judging.predictions import standing_still
from dit_policy_training.judging.some_frames import SomeFrames

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Diagnosis:
    """Errors and changes in the actions' units."""

    checkpoint: str
    dataset: str
    answers: list[Answer]  # in the first seconds of episodes; the first is as recorded
    whole: list[Answer]  # the same over whole episodes
    standing_still: float | None  # error of a robot that stays where it is; None where the state does not tell
    error: float  # over whole episodes
    idling: Idling
    tasks: list[Task]
    pairs: list[Pair]
    unit: Unit = AS_RECORDED  # in which errors and changes are told; the figures here are the dataset's
    seen: Seen | None = None  # of the judged episodes, in training; None where that is not known

    def answer(self, asked: str) -> Answer | None:
        """The answer in the first seconds, None if it was not asked."""
        return next((one for one in self.answers if one.asked == asked), None)

    def to_json(self, findings: Sequence[Any] = ()) -> str:
        """All of it, with what was found of it (findings.py); what is infinite or no number is null."""
        document = {"findings": [asdict(one) for one in findings], **asdict(self)}
        return json.dumps(_finite(document), indent=1) + "\n"


def rows_to_ask(
    table: Table, seconds: float, samples: int, among: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Moments in the first `seconds` of episodes, and over whole episodes; at most `samples` each, evenly spread.

    `among`: rows of the episodes to ask about; None: all.
    """
    rows = np.arange(len(table)) if among is None else among
    return _spread(rows[rows - table.episode_start[rows] < seconds * table.fps], samples), _spread(rows, samples)


def diagnose(
    subject: Subject,
    *,
    seconds: float = 2.0,
    samples: int = 256,
    idle_motion: float = 0.01,
    seed: int = 0,
    batch_size: int = 64,
    among: np.ndarray | None = None,
    advance: Advance | None = None,
) -> Diagnosis:
    """Measure everything, at moments of the rows `among` (None: all).

    `advance` is told of every moment that is done, of `amount_of_work` in all.
    """
    policy, windows, table = subject.policy, subject.windows, subject.table
    start, whole = rows_to_ask(table, seconds, samples, among)
    frames = SomeFrames(subject.frames, windows, np.union1d(start, whole), policy)
    ask = {"seed": seed, "batch_size": batch_size, "advance": advance}
    answers, _ = listen(policy, windows, frames, start, **ask)  # type: ignore[arg-type]
    over_all, usual = listen(policy, windows, frames, whole, **ask)  # type: ignore[arg-type]
    still = standing_still(policy, windows, whole)
    return Diagnosis(
        checkpoint=str(subject.folder),
        dataset=table.name,
        answers=answers,
        whole=over_all,
        standing_still=None if still is None else float(np.nanmean(usual.distances_of(still))),
        error=usual.error,
        idling=idling(usual, windows, subject.executed, idle_motion, still),
        tasks=tasks_of(policy, table, usual),
        pairs=closest_pairs(policy, table.tasks),
        unit=subject.unit,
        seen=seen_of(subject.folder, table, np.union1d(start, whole)),
    )


def amount_of_work(subject: Subject, seconds: float, samples: int, among: np.ndarray | None = None) -> int:
    """How many moments `diagnose` asks about, each way of asking counted."""
    each = sum(1 for _ in ways(subject.policy, subject.windows))
    return each * sum(len(rows) for rows in rows_to_ask(subject.table, seconds, samples, among))


def _spread(rows: np.ndarray, samples: int) -> np.ndarray:
    if len(rows) <= samples:
        return rows
    return rows[np.linspace(0, len(rows) - 1, samples).round().astype(int)]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
