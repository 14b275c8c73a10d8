"""What make bench-trainers compares: lerobot-train's batches give the plugin our loss, and its weights our policy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_trainers
import draccus
import numpy as np
import pytest
import torch
from demo_for_lerobot import DemoDitConfig, DemoDitPolicy
from dit_policy_training.data.frames import gather, open_frames
from dit_policy_training.data.table import load_table
from dit_policy_training.data.windows import Windows
from dit_policy_training.loop.options import TrainConfig
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.collate import lerobot_collate_fn

from dit_policy_ros.policy.checkpoint import load_checkpoint


def plugin(config: TrainConfig, folder: Path) -> DemoDitPolicy:
    """The policy of a run's settings as lerobot-train makes it."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(draccus.dump(config))
    torch.manual_seed(0)
    return DemoDitPolicy(DemoDitConfig(recipe=str(recipe), dataset=str(config.dataset_path), device="cpu"))


@pytest.mark.parametrize("n_obs_steps", [1, 2])  # of one step LeRobot's pictures have a dimension less
def test_lerobots_batches_give_our_loss(config: TrainConfig, dataset: Path, tmp_path: Path, n_obs_steps: int) -> None:
    config = replace(config, policy=replace(config.policy, n_obs_steps=n_obs_steps))
    trained = plugin(config, tmp_path)
    theirs = LeRobotDataset("local/toy", root=dataset, video_backend="pyav")
    theirs = LeRobotDataset(
        "local/toy",
        root=dataset,
        video_backend="pyav",
        delta_timestamps=resolve_delta_timestamps(trained.config, theirs.meta),
    )
    table = load_table(dataset)
    rows = np.array([0, 7, table.episode_end[0] - 1])  # with padding
    ours = gather(Windows(table, n_obs_steps, config.policy.horizon), open_frames(table), rows)
    torch.manual_seed(1)
    expected = trained.policy.loss(ours)
    torch.manual_seed(1)
    found, _ = trained.forward(lerobot_collate_fn([theirs[int(row)] for row in rows]))
    assert found.item() == expected.item()
    torch.manual_seed(2)
    assert trained.policy.loss(ours).item() != expected.item()  # so that equality says something


def test_its_weights_are_a_checkpoint_of_ours(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = plugin(config, tmp_path)
    monkeypatch.setattr(bench_trainers, "RECIPE", str(tmp_path / "recipe.yaml"))
    monkeypatch.setattr(bench_trainers, "DATASET", config.dataset_path)
    trained.save_pretrained(tmp_path / "lerobot")
    bench_trainers.export(tmp_path / "lerobot" / "model.safetensors", tmp_path / "exported")
    loaded = load_checkpoint(tmp_path / "exported").state_dict()
    expected = trained.policy.state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def report(success: int) -> dict[str, Any]:
    return {"success": success, "wrong_block": 1, "episodes": 20}


@pytest.mark.parametrize(("ours", "holds"), [((20, 18), True), ((20, 17), False)])
def test_the_bar_is_the_sum_of_their_successes(ours: tuple[int, int], holds: bool) -> None:
    reports = {("ours", seed): report(count) for seed, count in enumerate(ours)}
    reports |= {("lerobot-train", seed): report(19) for seed in range(2)}
    *each, total = bench_trainers.rows_of(reports, "told the colour", "so")
    assert (total["value"], total["unit"], total["bar"], total["holds"]) == (sum(ours), "of 40", ">= 38", holds)
    assert [row["value"] for row in each if "lerobot-train, seed 1" in row["name"]] == [19, 1]
