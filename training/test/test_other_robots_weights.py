"""Weights that a dataset of another robot cannot take over: it is the dataset that is told, not an option."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dit_policy_training.data.table import Table, load_table
from dit_policy_training.data.windows import Windows
from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.policies import new_policy

from dit_policy_ros.policy.checkpoint import CheckpointError, save_checkpoint


def one_joint_more(table: Table) -> Table:
    action = np.concatenate([table.action, table.action[:, :1]], axis=1)
    return replace(table, action=action, action_names=[*table.action_names, "gripper"])


def without_a_camera(table: Table) -> Table:
    return replace(table, image_shapes=dict(list(table.image_shapes.items())[1:]))


def test_what_differs_in_the_dataset_is_named(config: TrainConfig, tmp_path: Path) -> None:
    policy = replace(config.policy, action_mode="absolute")
    table = load_table(Path(str(config.dataset_path)))
    save_checkpoint(tmp_path / "checkpoint", new_policy(policy, Windows(table, 2, 8)), "", "")
    dims = table.action.shape[1]
    camera = next(iter(table.image_shapes))
    for other, named in (
        (one_joint_more(table), rf"differs from the checkpoint's in action \({dims} numbers there, {dims + 1} numbers"),
        (without_a_camera(table), rf"differs from the checkpoint's in {camera} \(a camera there, none here\)"),
    ):
        with pytest.raises(CheckpointError, match=named) as told:
            new_policy(policy, Windows(other, 2, 8), tmp_path / "checkpoint")
        assert "--policy options" not in str(told.value)
