"""The whole line in simulated time: with slow inference the demo's policy still does its task, however chunks join."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_delay import figures, judged

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.engine import PolicyEngine
from dit_policy_ros.runtime.decisions import Settings
from dit_policy_ros.runtime.faults import Fault, Trouble
from dit_policy_ros.runtime.gate import Verdict
from dit_policy_ros.runtime.joining import JOININGS, Joining
from dit_policy_ros.sim.closed_loop import ClosedLoop
from dit_policy_ros.sim.simulation import Simulation

CHECKPOINT = Path(__file__).parents[1] / "checkpoints/demo"


@pytest.fixture(scope="module")
def simulation() -> Iterator[Simulation]:
    with Simulation(camera_size=128) as simulation:
        yield simulation


@pytest.fixture
def loop(simulation: Simulation) -> ClosedLoop:
    torch.manual_seed(0)
    engine = PolicyEngine(load_checkpoint(CHECKPOINT, device="cpu"))
    return ClosedLoop(engine, Embodiment.load(CHECKPOINT / "embodiment.yaml"), simulation, latency=0.23)


@pytest.mark.parametrize("joining", JOININGS)
def test_the_task_is_done_with_slow_inference(loop: ClosedLoop, joining: Joining) -> None:
    episodes = [
        loop.run(seed, target, Settings(n_action_steps=8, joining=joining))
        for seed, target in ((700_100, "blue"), (700_101, "red"))
    ]
    assert any(episode.success for episode in episodes)  # 20 of 20 in the benchmark
    assert not any(episode.wrong_block for episode in episodes)
    outcomes = [outcome for episode in episodes for outcome in episode.outcomes]
    # The first chunk of each episode starts from rest with its first step; the others have lost some to the inference.
    assert [outcome.steps_dropped for outcome in outcomes if outcome.request.sequence == 0] == [0, 0]
    assert all(outcome.steps_dropped >= 2 for outcome in outcomes if outcome.request.sequence > 0)
    assert all((outcome.steps_committed > 0) == (joining == "rtc") for outcome in outcomes if outcome.seam is not None)
    assert set(figures(episodes)) >= {"success", "velocity jump", "jerk"}


def test_an_arm_brought_to_rest_in_the_middle_still_finishes(loop: ClosedLoop) -> None:
    """A camera fails for a while: the arm stops, goes on by itself, and does its task."""
    trouble = [Trouble(Fault.INPUT, "a camera failed")]
    episode = loop.run(
        700_100, "blue", Settings(n_action_steps=8, recovery="automatic"), lambda s: trouble if 1 < s < 2 else []
    )
    assert episode.stops == 1
    assert episode.success
    assert Verdict.ACCEPTED in {outcome.decision.verdict for outcome in episode.outcomes[-3:]}


def test_the_benchmarks_bars_can_fail() -> None:
    smooth, rough = ({"success": 1.0, "velocity jump": jump} for jump in (0.1, 0.4))
    good = {("rtc", 0): smooth, ("rtc", 200): smooth, ("replace", 200): rough}
    assert all(row["holds"] for row in judged(good, "so"))  # type: ignore[arg-type]
    bad = good | {("rtc", 200): rough | {"success": 0.9}}
    assert not any(row["holds"] for row in judged(bad, "so"))  # type: ignore[arg-type]


def test_drives_that_refuse_a_target_keep_theirs_and_the_episode_goes_on(
    loop: ClosedLoop, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an arm that leans on its end stop, a little beyond the limit, is told to hold there."""
    drive, calls = simulation.set_targets, itertools.count()

    def faulty(names: Sequence[str], positions: np.ndarray) -> None:
        if 100 <= next(calls) < 120:
            raise ValueError("target of joint 'panda_joint4': -3.0723, expected -3.0718 to -0.0698")
        drive(names, positions)

    monkeypatch.setattr(simulation, "set_targets", faulty)
    assert loop.run(700_100, "blue", Settings(n_action_steps=8, recovery="automatic")).success
    assert next(calls) > 120
