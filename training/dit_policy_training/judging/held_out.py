"""Which episodes of a dataset a checkpoint's run never trained on, and how many of those judged it did.

They follow from the data, the share that was asked for and the seed: a checkpoint that training wrote has the settings
and the data's fingerprint in its folder `training`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from dit_policy_training.data.order import split_episodes
from dit_policy_training.data.table import Table
from dit_policy_training.judging.opening import place_of, rows_of_episodes
from dit_policy_training.loop.state import FOLDER, read_state

UNKNOWN = (
    "Whether it was trained on the judged episodes is not known: the checkpoint does not tell, or is of other data."
)


class UnknownSplit(ValueError):
    """Why it is not known which episodes a run held out; the message says what to do."""


@dataclass(frozen=True)
class Seen:
    """Of how many judged episodes, how many the checkpoint was trained on."""

    episodes: int
    trained_on: int

    def __str__(self) -> str:
        if self.trained_on == 0:
            return f"Not trained on any of the {self.episodes} judged episodes."
        return (
            f"Trained on {self.trained_on} of the {self.episodes} judged episodes, which shows how well those are "
            "remembered; --held_out judges only those that it was not trained on."
        )


def held_out_rows(checkpoint: Path, table: Table) -> np.ndarray:
    """The rows that the checkpoint's run held out, whole episodes in order; empty if it held out none.

    Raises UnknownSplit for a checkpoint without `training`, and for another dataset than it was trained on;
    CheckpointError for a damaged one.
    """
    if not (checkpoint / FOLDER).is_dir():
        raise UnknownSplit(
            f"{checkpoint} has no folder {FOLDER}, which tells what its run held out: choose a checkpoint as training "
            "wrote it, or name --episodes that it was not trained on"
        )
    state = read_state(checkpoint)
    if state.counters.fingerprint != table.fingerprint:
        raise UnknownSplit(
            f"{checkpoint} was trained on other data than {table.name}, or on several datasets: what it held out of "
            "that is not known. Of a dataset that it never saw every episode is held out: leave --held_out away"
        )
    settings = yaml.safe_load(state.settings)
    return split_episodes(table, settings["validation"]["episode_share"], settings["seed"])[1]


def rows_to_judge(
    table: Table, checkpoints: Sequence[Path], episodes: Sequence[int] = (), held_out: bool = False
) -> np.ndarray:
    """All rows, those of some episodes, or those that every one of the checkpoints' runs held out.

    Raises ValueError for episodes that are not there and for held-out ones that are not known, or none.
    """
    if not held_out:
        return rows_of_episodes(table, episodes) if episodes else np.arange(len(table))
    if episodes:
        raise ValueError("give either --held_out or the episodes to judge, not both")
    rows = np.arange(len(table))
    for checkpoint in checkpoints:
        rows = np.intersect1d(rows, held_out_rows(checkpoint, table))
    if len(rows) == 0:
        who = f"{checkpoints[0]} held out" if len(checkpoints) == 1 else "the checkpoints' runs all held out"
        raise ValueError(
            f"there is no episode of {table.name} that {who}: see --validation.episode_share of training, which holds "
            "out none of fewer than 10 episodes"
        )
    return rows


def seen_of(checkpoint: Path, table: Table, rows: np.ndarray) -> Seen | None:
    """How many of the rows' episodes the checkpoint was trained on; None where that is not known."""
    try:
        held_out = held_out_rows(checkpoint, table)
    except UnknownSplit:
        return None
    judged = np.unique(table.episode_start[rows])
    return Seen(len(judged), int((~np.isin(judged, held_out)).sum()))


def episodes_of(table: Table, rows: np.ndarray) -> list[int]:
    """The numbers of the rows' episodes, in order."""
    return [place_of(table, int(start))[0] for start in np.unique(table.episode_start[rows])]
