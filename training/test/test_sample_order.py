"""Which samples make a batch: each row's share, whole episodes held out, and going on anywhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.order import SampleOrder, is_idle, row_weights, split_episodes
from dit_policy_training.data.table import Part, Table, load_table
from dit_policy_training.data.windows import Windows


def stream(order: SampleOrder, batches: int) -> np.ndarray:
    return np.concatenate([order.at(index) for index in range(batches)])


def test_every_epoch_has_each_row_once_in_an_order_of_the_seed() -> None:
    rows = np.array([3, 5, 6, 8, 11, 12, 20, 21, 22, 23])
    drawn = stream(SampleOrder(rows, None, 4, seed=1), 10).reshape(4, 10)
    for epoch in drawn:
        assert sorted(epoch) == rows.tolist()
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(stream(SampleOrder(rows, None, 4, seed=1), 10).reshape(4, 10), drawn)
    assert not np.array_equal(stream(SampleOrder(rows, None, 4, seed=2), 10).reshape(4, 10), drawn)
    assert np.array_equal(stream(SampleOrder(rows, np.full(10, 0.3), 4, seed=1), 10).reshape(4, 10), drawn)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_depends_on_its_number_alone(weighted: bool) -> None:
    rows = np.arange(57)
    weights = np.random.default_rng(0).random(57) if weighted else None
    through = SampleOrder(rows, weights, 8, seed=3)
    expected = [through.at(index) for index in range(40)]
    for index in (39, 0, 7, 38, 20, 7):
        assert np.array_equal(SampleOrder(rows, weights, 8, seed=3).at(index), expected[index])
        assert np.array_equal(through.at(index), expected[index])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_large_batch_is_what_several_small_ones_are(weighted: bool) -> None:
    """So that two processes with half the batch each, or two accumulation steps, see what one process sees."""
    rows = np.arange(57)
    weights = np.random.default_rng(0).random(57) if weighted else None
    large, small = SampleOrder(rows, weights, 16, seed=3), SampleOrder(rows, weights, 8, seed=3)
    for index in range(20):
        assert np.array_equal(large.at(index), np.concatenate([small.at(2 * index), small.at(2 * index + 1)]))


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    drawn = SampleOrder(np.arange(5), None, 12, seed=0).at(1)  # positions 12 to 23: epochs 2 to 4
    assert len(drawn) == 12
    assert sorted(drawn[3:8]) == list(range(5))


def test_with_weights_every_row_comes_floor_or_ceiling_of_its_share_an_epoch() -> None:
    generator = np.random.default_rng(5)
    rows = np.arange(100, 400)
    weights = generator.random(300) ** 3
    weights[:20] = 0.0
    weights[20] = 9.0
    expected = weights / weights.sum() * 300
    order = SampleOrder(rows, weights, 300, seed=7)
    total = np.zeros(300)
    for epoch in range(200):
        counts = np.bincount(order.at(epoch) - 100, minlength=300)
        assert (counts >= np.floor(expected)).all()
        assert (counts <= np.ceil(expected)).all()
        total += counts
    # A row's count is its floor plus a coin: over 200 epochs within five standard deviations of its share.
    chance = expected - np.floor(expected)
    assert (np.abs(total - 200 * expected) <= 5 * np.sqrt(200 * chance * (1 - chance)) + 1e-6).all()


def test_whole_shares_are_met_exactly() -> None:
    weights = np.array([0.1] * 30 + [0.3] * 30)  # of 60 samples: half a one each, and one and a half
    ones = np.array([0.7] * 60)
    whole = np.array([0.1] * 30 + [0.3] * 3 + [0.0] * 6 + [0.1])  # of 40 samples: one and three each, up to rounding
    doubles = np.array([0.2] * 20 + [0.1] * 20)  # 1.333 and 0.667: 26.7 and 13.3 in all
    for index in range(30):
        counts = np.bincount(SampleOrder(np.arange(60), weights, 60, seed=index).at(0), minlength=60)
        assert counts[:30].sum() == 15
        assert counts[30:].sum() == 45
        assert np.bincount(SampleOrder(np.arange(60), ones, 60, seed=index).at(0)).tolist() == [1] * 60
        drawn = SampleOrder(np.arange(40), whole, 40, seed=index).at(0)
        assert np.bincount(drawn).tolist() == [1] * 30 + [3] * 3 + [0] * 6 + [1]
        drawn = SampleOrder(np.arange(40), doubles, 40, seed=index).at(0)
        assert (drawn < 20).sum() in (26, 27)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(DatasetError, match="no frame to train on: every episode is held out"):
        SampleOrder(np.arange(0), None, 4, seed=0)
    with pytest.raises(DatasetError, match="task_weights, idle_weight or drop_n_last_frames leave none"):
        SampleOrder(np.arange(3), np.zeros(3), 4, seed=0)
    with pytest.raises(ValueError, match="one for each of 3 rows"):
        SampleOrder(np.arange(3), np.array([1.0, np.nan, 1.0]), 4, seed=0)


@pytest.fixture(scope="module")
def table(dataset: Path) -> Table:
    """Three episodes: red, blue, red."""
    return load_table(dataset)


PLAIN = {
    "task_weights": {},
    "balance_tasks": False,
    "idle_weight": 1.0,
    "idle_motion": 0.01,
    "n_action_steps": 3,
    "drop_n_last_frames": 0,
}
RED, BLUE = "push the red block", "push the blue block"


def weights_of(table: Table, **changes: object) -> np.ndarray:
    return row_weights(table, Windows(table, 2, 6), **(PLAIN | changes))  # type: ignore[arg-type]


def share_of(table: Table, weights: np.ndarray, task: str) -> float:
    return float(weights[table.task_index == table.tasks.index(task)].sum() / weights.sum())


def test_weights_by_task(table: Table) -> None:
    assert weights_of(table).tolist() == [1.0] * len(table)
    frames = np.bincount(table.task_index)[[table.tasks.index(RED), table.tasks.index(BLUE)]]
    assert frames[0] > 1.5 * frames[1]
    assert share_of(table, weights_of(table, balance_tasks=True), BLUE) == pytest.approx(0.5)
    tripled = share_of(table, weights_of(table, balance_tasks=True, task_weights={BLUE: 3.0}), BLUE)
    assert tripled == pytest.approx(0.75)
    doubled = share_of(table, weights_of(table, task_weights={BLUE: 2.0}), BLUE)
    assert doubled == pytest.approx(2 * frames[1] / (frames[0] + 2 * frames[1]))
    assert share_of(table, weights_of(table, task_weights={RED: 0.0}), RED) == 0
    with pytest.raises(
        DatasetError, match=r"no dataset has: \['push the green block'\]; there are 2, such as \['push the"
    ):
        weights_of(table, task_weights={"push the green block": 1.0})
    with pytest.raises(DatasetError, match="must be finite and at least 0"):
        weights_of(table, task_weights={RED: -1.0})


def test_the_last_frames_of_every_episode_can_be_left_out(table: Table) -> None:
    weights = weights_of(table, drop_n_last_frames=4)
    assert np.flatnonzero(weights == 0).tolist() == [
        row for end in np.unique(table.episode_end) for row in range(end - 4, end)
    ]


def resting(table: Table) -> Table:
    """The table with the first ten actions of the second episode, and the last five, alike."""
    action = table.action.copy()
    start, end = table.episode_starts[1], table.episode_starts[2]
    action[start : start + 10] = action[start]
    action[end - 5 : end] = action[end - 5]
    return replace(table, action=action)


def test_idle_frames_are_those_whose_actions_stay(table: Table) -> None:
    rested = resting(table)
    start, end = rested.episode_starts[1], rested.episode_starts[2]
    idle, usual = (is_idle(Windows(one, 2, 6), n_action_steps=3, idle_motion=0.001) for one in (rested, table))
    # Row start + 8 looks at the steps start + 8, + 9 and + 10, of which the last moved; behind the end nothing moves.
    expected = {*range(start, start + 8), *range(end - 5, end)}
    assert set(np.flatnonzero(idle)) == set(np.flatnonzero(usual)) | expected
    assert not expected <= set(np.flatnonzero(usual))
    assert is_idle(Windows(rested, 2, 6), n_action_steps=3, idle_motion=2.0).all()
    weights = weights_of(rested, idle_weight=0.1, idle_motion=0.001)
    assert set(weights[idle]) == {0.1}
    assert set(weights[~idle]) == {1.0}


def parts_of(table: Table, *weights: float) -> Table:
    """The table as if each episode were a dataset."""
    bounds = [*table.episode_starts, len(table)]
    features = table.parts[0].features
    parts = tuple(
        Part(Path(f"part{i}"), f"part{i}", int(bounds[i]), int(bounds[i + 1] - bounds[i]), weight, features)
        for i, weight in enumerate(weights)
    )
    return replace(table, parts=parts)


def test_datasets_have_their_share_of_the_samples(table: Table) -> None:
    mixed = parts_of(table, 1.0, 2.0, 5.0)
    for changes in ({}, {"task_weights": {BLUE: 0.5}}, {"drop_n_last_frames": 3}, {"balance_tasks": True}):
        weights = weights_of(mixed, **changes)
        shares = [weights[part.first : part.first + part.rows].sum() / weights.sum() for part in mixed.parts]
        assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert weights_of(parts_of(table, 0.0, 0.0, 0.0)).tolist() == [1.0] * len(table)
    among = np.setdiff1d(np.arange(len(table)), [0, 1, 2, 30, len(table) - 1])
    weights = weights_of(mixed, among=among)
    assert np.flatnonzero(weights == 0).tolist() == [0, 1, 2, 30, len(table) - 1]
    shares = [weights[part.first : part.first + part.rows].sum() / weights.sum() for part in mixed.parts]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    with pytest.raises(DatasetError, match="weight above 0, or none of them; got part0: 1, part1: 0, part2: 1"):
        weights_of(parts_of(table, 1.0, 0.0, 1.0))
    with pytest.raises(DatasetError, match="no frame of part1 is left"):
        weights_of(mixed, task_weights={BLUE: 0.0})


def made_of(table: Table, counts: dict[str, int], frames: int = 4) -> Table:
    """A table of so many episodes of each task."""
    tasks = list(counts)
    task_of = np.repeat(np.arange(len(tasks)), list(counts.values()))
    rows = len(task_of) * frames
    start = np.repeat(np.arange(0, rows, frames), frames)
    values = np.zeros((rows, 2), np.float32)
    return replace(
        table,
        tasks=tasks,
        task_index=np.repeat(task_of, frames),
        state=values,
        action=values,
        episode_start=start,
        episode_end=start + frames,
    )


def test_whole_episodes_are_held_out_some_of_every_task(table: Table) -> None:
    many = made_of(table, {"a": 40, "b": 5, "c": 4, "d": 1})
    train, held_out = split_episodes(many, 0.1, seed=0)
    assert sorted([*train, *held_out]) == list(range(len(many)))
    episodes = np.unique(many.episode_start[held_out])
    assert len(held_out) == 4 * len(episodes)  # whole ones
    counts = np.bincount(many.task_index[episodes], minlength=4)
    assert counts.tolist() == [4, 1, 0, 0]
    again = split_episodes(many, 0.1, seed=0)[1]
    other = split_episodes(many, 0.1, seed=1)[1]
    assert np.array_equal(held_out, again)
    assert not np.array_equal(held_out, other)


def test_held_out_episodes_need_enough_episodes(table: Table) -> None:
    few = made_of(table, {"a": 9})
    assert [len(rows) for rows in split_episodes(few, 0.5, seed=0)] == [36, 0]
    assert [len(rows) for rows in split_episodes(made_of(table, {"a": 10}), 0.0, seed=0)] == [40, 0]
    assert [len(rows) for rows in split_episodes(made_of(table, {"a": 10}), 0.05, seed=0)] == [36, 4]
    single = made_of(table, {str(task): 1 for task in range(12)})
    assert [len(rows) for rows in split_episodes(single, 0.05, seed=0)] == [44, 4]
    alone = made_of(table, {str(task): 1 for task in range(100)} | {"twice": 2})
    held_out = split_episodes(alone, 0.05, seed=0)[1]
    assert len(held_out) == 4 * 5
    assert np.sum(alone.task_index[held_out] == 100) == 4  # the one that leaves another of its task
    assert len(split_episodes(made_of(table, {"a": 10}), 1.0, seed=0)[0]) == 4  # never all of a task
