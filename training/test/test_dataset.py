"""Training samples against LeRobotDataset's own, and the errors of a dataset that is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.frames import gather, open_frames
from dit_policy_training.data.statistics import stats
from dit_policy_training.data.table import load_table
from dit_policy_training.data.windows import Windows
from lerobot.datasets.lerobot_dataset import LeRobotDataset

N_OBS, HORIZON = 2, 6
CAMERAS = ("observation.images.side", "observation.images.hand")


def test_windows_are_lerobots_windows(dataset: Path) -> None:
    """Pictures, state, actions and padding of every row, the episodes' ends included."""
    observed, commanded = [-0.1, 0.0], [step / 10 for step in range(-1, HORIZON - 1)]
    theirs = LeRobotDataset(
        "local/toy",
        root=dataset,
        video_backend="pyav",
        return_uint8=True,
        delta_timestamps=dict.fromkeys((*CAMERAS, "observation.state"), observed) | {"action": commanded},
    )
    table = load_table(dataset)
    batch = gather(Windows(table, N_OBS, HORIZON), open_frames(table), np.arange(len(table)))
    assert len(table) == len(theirs)
    for row in range(len(table)):
        item = theirs[row]
        for key in (*CAMERAS, "observation.state", "action", "action_is_pad"):
            assert batch[key][row].dtype == item[key].dtype
            assert torch.equal(batch[key][row], item[key]), (row, key)
        assert batch["task"][row] == item["task"]
    assert batch["action_is_pad"].any(1).sum() == table.episodes * (1 + HORIZON - N_OBS)


def test_statistics_of_relative_actions_leave_padding_out(dataset: Path) -> None:
    table = load_table(dataset)
    differences = []
    for row in range(len(table)):
        joints = table.state[row, [1, 0]]  # turn, lift
        for step in range(row - N_OBS + 1, row - N_OBS + 1 + HORIZON):
            if table.episode_start[row] <= step < table.episode_end[row]:
                differences.append(table.action[step].astype(float) - joints)
    found = stats(Windows(table, N_OBS, HORIZON), "relative")
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(found["action"][name], getattr(np, name)(differences, axis=0), rtol=1e-9)
        np.testing.assert_allclose(
            found["observation.state"][name], getattr(np, name)(table.state.astype(float), axis=0), rtol=1e-9
        )
    absolute = stats(Windows(table, N_OBS, HORIZON), "absolute")
    np.testing.assert_allclose(absolute["action"]["max"], table.action.max(0))


def edit_info(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "meta" / "info.json"
        info = json.loads(path.read_text())
        change(info)
        path.write_text(json.dumps(info))

    return edit


def drop(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def nan_action(root: Path) -> None:
    path = next((root / "data").rglob("*.parquet"))
    rows = pd.read_parquet(path)
    rows["action"] = [np.full(2, np.nan, np.float32) if i == 30 else a for i, a in enumerate(rows["action"])]
    rows.to_parquet(path)


def relative_actions(root: Path) -> None:
    path = root / "conversion.json"
    conversion = json.loads(path.read_text())
    assert conversion["settings"]["vectors"]["action_mode"] == "absolute"
    conversion["settings"]["vectors"]["action_mode"] = "relative"
    path.write_text(json.dumps(conversion))


FAULTS = {
    "no_dataset": (drop("meta/info.json"), r"is not a LeRobotDataset: .*info\.json is missing\. Make one"),
    "old_format": (edit_info(lambda i: i.update(codebase_version="v2.1")), r"format v2\.1, v3\.0 is needed"),
    "other_fps": (edit_info(lambda i: i.update(fps=30)), r"fps: 30 in the dataset, 10 in embodiment"),
    "no_camera": (edit_info(lambda i: i["features"].pop(CAMERAS[1])), r"images\.hand: nothing in the dataset"),
    "other_joints": (
        edit_info(lambda i: i["features"]["action"].update(names=["lift", "turn"])),
        r"action: \['lift', 'turn'\] in the dataset, \['turn', 'lift'\] in embodiment",
    ),
    "relative": (relative_actions, r"converted with --vectors\.action_mode=relative, and the node would take its"),
    "nan": (nan_action, r"action is not finite in episode 1, frame \d+"),
    "rows_missing": (edit_info(lambda i: i.update(total_frames=1)), r"rows in data/, meta/info\.json promises 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dataset_that_does_not_fit_is_refused_with_the_reason(dataset: Path, tmp_path: Path, fault: str) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    change, message = FAULTS[fault]
    change(copy)
    with pytest.raises(DatasetError, match=message):
        load_table(copy)
