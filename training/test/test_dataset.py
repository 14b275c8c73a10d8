"""Training samples against LeRobotDataset's own, with and without an embodiment; what is wrong with a dataset, told."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.frames import gather, open_frames
from dit_policy_training.data.statistics import stats
from dit_policy_training.data.table import load_table
from dit_policy_training.data.windows import Windows
from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.trainer import Trainer
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from small_run import QUIET

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


def edit_rows(change: Callable[[pd.DataFrame], None]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = next((root / "data").rglob("*.parquet"))
        rows = pd.read_parquet(path)
        change(rows)
        rows.to_parquet(path)

    return edit


def set_cell(key: str, row: int, value: object) -> Callable[[Path], None]:
    def change(rows: pd.DataFrame) -> None:
        rows.at[row, key] = value

    return edit_rows(change)


def edit_tasks(*texts: str | int) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        frame = pd.DataFrame({"task_index": range(len(texts))}, index=pd.Index(texts, name="task"))
        frame.to_parquet(root / "meta" / "tasks.parquet")

    return edit


def cut(pattern: str) -> Callable[[Path], None]:
    def truncate(root: Path) -> None:
        path = next(root.glob(pattern))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return truncate


def later_timestamps(rows: pd.DataFrame) -> None:
    rows["timestamp"] *= 2


def swap_episodes(rows: pd.DataFrame) -> None:
    rows["episode_index"] = 2 - rows["episode_index"]


def shorter_actions(rows: pd.DataFrame) -> None:
    rows["action"] = [action[:1] if row == 40 else action for row, action in enumerate(rows["action"])]


def texts_for_actions(rows: pd.DataFrame) -> None:
    rows["action"] = [["a", "b"]] * len(rows)


DATA = "data/*/*.parquet"
FAULTS = {
    "no_dataset": (drop("meta/info.json"), r"is not a LeRobotDataset: .*info\.json is missing\. Make one"),
    "old_format": (
        edit_info(lambda i: i.update(codebase_version="v2.1")),
        r"format v2\.1, v3\.0 is needed; LeRobot converts it: .*v21_to_v30 .*--root=\S+copy --push-to-hub=false$",
    ),
    "older_format": (
        edit_info(lambda i: i.update(codebase_version="v2.0")),
        r"format v2\.0, v3\.0 is needed; first to v2\.1 by a LeRobot of that time",
    ),
    "newer_format": (edit_info(lambda i: i.update(codebase_version="v9.9")), r"format v9\.9.* a newer dit_policy_tr"),
    "broken_info": (cut("meta/info.json"), r"info\.json cannot be read: .*; take it from the dataset's source again"),
    "info_lacks": (
        edit_info(lambda i: i.pop("total_frames")),
        r"info\.json is not as the format v3\.0 has it: KeyError",
    ),
    "other_fps": (edit_info(lambda i: i.update(fps=30)), r"fps: 30 in the dataset, 10 in embodiment"),
    "no_camera": (edit_info(lambda i: i["features"].pop(CAMERAS[1])), r"images\.hand: nothing in the dataset"),
    "no_action": (edit_info(lambda i: i["features"].pop("action")), r"action: nothing in the dataset"),
    "no_column": (
        edit_rows(lambda rows: rows.pop("observation.state")),
        r"has no column observation\.state: meta/info",
    ),
    "other_joints": (
        edit_info(lambda i: i["features"]["action"].update(names=["lift", "turn"])),
        r"action: \['lift', 'turn'\] in the dataset, \['turn', 'lift'\] in embodiment",
    ),
    "relative": (relative_actions, r"converted with --vectors\.action_mode=relative, and the node would take its"),
    "nan": (nan_action, r"action is not finite in episode 1, frame \d+: .*\(1 such rows\); leave these episodes out"),
    "rows_missing": (edit_info(lambda i: i.update(total_frames=1)), r"rows in data/, meta/info\.json promises 1"),
    "no_rows": (drop("data/chunk-000/file-000.parquet"), r"has no rows: .*data holds no chunk-\*/file-\*\.parquet"),
    "cut_rows": (cut(DATA), r"file-000\.parquet cannot be read, it is damaged or cut short"),
    "slow": (
        edit_rows(later_timestamps),
        r"episode 0, frame 1 has the timestamp 0\.2000 s; at the 10 fps .* 0\.1000 s",
    ),
    "episode_order": (
        edit_rows(swap_episodes),
        r"episode 1 follows episode 2 at row \d+; episodes must stand in order",
    ),
    "frame_order": (
        set_cell("frame_index", 5, 7),
        r"frame_index is 7 in row 5 \(episode 0\), expected 5: rows are miss",
    ),
    "short_action": (edit_rows(shorter_actions), r"action has 1 numbers in row 40, meta/info\.json says 2"),
    "text_action": (edit_rows(texts_for_actions), r"action holds string values, numbers are needed"),
    "no_task": (
        set_cell("task_index", 9, 2),
        r"task_index is 2 in row 9 \(episode 0\), meta/tasks\.parquet has 0 to 1",
    ),
    "no_tasks": (drop("meta/tasks.parquet"), r"has no instructions: .*tasks\.parquet is missing"),
    "empty_task": (
        edit_tasks("push the red block", " "),
        r"the instruction of episode 1 is empty \(task_index 1 in meta/tasks\.parquet\); write there what",
    ),
    "number_task": (edit_tasks(1, 2), r"tasks\.parquet: an instruction is no text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dataset_that_does_not_fit_is_refused_with_the_reason(dataset: Path, tmp_path: Path, fault: str) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    change, message = FAULTS[fault]
    change(copy)
    with pytest.raises(DatasetError, match=message):
        load_table(copy)


def test_a_horizon_longer_than_every_episode_is_refused(dataset: Path) -> None:
    table = load_table(dataset)
    longest = (table.episode_end - table.episode_start).max()
    Windows(table, 2, longest + 1)
    with pytest.raises(
        DatasetError, match=rf"longest episode has {longest} frames.*policy\.horizon to at most {longest + 1}"
    ):
        Windows(table, 2, longest + 2)


def test_pictures_smaller_than_the_crop_name_the_options(config: TrainConfig) -> None:
    """As a user of train meets them."""
    vision = replace(config.policy.observation_encoder.vision, resize_shape=None, crop_shape=(64, 64))
    encoder = replace(config.policy.observation_encoder, vision=vision)
    with pytest.raises(
        ValueError, match=r"vision\.crop_shape \(64, 64\) does not fit into .*side of \(32, 48\); set a smaller"
    ):
        Trainer(replace(config, policy=replace(config.policy, observation_encoder=encoder)), QUIET)


def test_the_fingerprint_is_that_of_the_rows(dataset: Path, tmp_path: Path) -> None:
    """A dataset that was moved is the same; one number more, and it is another."""
    copy = shutil.copytree(dataset, tmp_path / "elsewhere", copy_function=shutil.copy)
    assert load_table(copy).fingerprint == load_table(dataset).fingerprint
    edit_rows(lambda rows: rows.at[20, "observation.state"].__setitem__(0, 0.125))(copy)
    assert load_table(copy).fingerprint != load_table(dataset).fingerprint


FEATURES: dict[str, dict[str, Any]] = {
    "observation.state": {"dtype": "float32", "shape": (2,), "names": {"motors": ["x", "y"]}},
    "observation.environment_state": {"dtype": "float32", "shape": (3,), "names": None},
    "observation.image": {"dtype": "image", "shape": (3, 8, 12), "names": ["channels", "height", "width"]},
    "observation.effort": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "action": {"dtype": "float32", "shape": (1,), "names": {"y": 0}},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such as the hub has, written by LeRobot: no embodiment.yaml, other names, numbers that are no lists."""
    root = tmp_path_factory.mktemp("hub") / "foreign"
    theirs = LeRobotDataset.create("toy/foreign", fps=5, features=FEATURES, root=root, use_videos=False)
    generator = np.random.default_rng(0)
    for episode in range(3):
        for _ in range(6 + episode):
            frame = {key: generator.random(feature["shape"], np.float32) for key, feature in FEATURES.items()}
            frame["observation.image"] = generator.integers(0, 256, (3, 8, 12), np.uint8)
            theirs.add_frame(frame | {"task": f"task {2 - episode}"})
        theirs.save_episode()
    theirs.finalize()
    return root


def test_a_dataset_without_an_embodiment(foreign: Path) -> None:
    theirs = LeRobotDataset("toy/foreign", root=foreign)
    table = load_table(foreign)
    assert table.embodiment is None
    assert (table.fps, table.episodes, len(table)) == (5, 3, 21)
    assert (table.state_names, table.action_names) == (["x", "y"], ["y"])
    assert table.action_state_indices == [1]
    assert table.tasks == list(theirs.meta.tasks.sort_values("task_index").index)
    assert {key: (feature.type, feature.shape) for key, feature in table.input_features.items()} == {
        "observation.image": ("VISUAL", (3, 8, 12)),
        "observation.state": ("STATE", (2,)),
        "observation.environment_state": ("ENV", (3,)),
    }
    assert table.notes == ["observation.effort is not used", "next.reward is not used"]
    windows = Windows(table, 1, 2)
    batch = gather(windows, open_frames(table), np.arange(21))
    for row in range(21):
        item = theirs[row]
        for key in ("observation.state", "observation.environment_state", "action"):
            assert torch.equal(batch[key][row, 0], item[key].reshape(-1)), key
        assert torch.equal(batch["observation.image"][row, 0], (item["observation.image"] * 255).round().byte())
        assert batch["task"][row] == item["task"]
    assert stats(windows, "relative")["action"]["max"].shape == (1,)
    assert stats(windows, "absolute")["observation.environment_state"]["min"].shape == (3,)


def test_names_decide_what_relative_actions_are_relative_to(foreign: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(foreign, tmp_path / "copy")
    edit_info(lambda info: info["features"]["action"].update(names=None))(copy)
    table = load_table(copy)
    assert table.action_names == ["action.0"]
    with pytest.raises(
        DatasetError, match=r"names once in the state's; not there: action\.0\. Set policy\.action_mode=abs"
    ):
        stats(Windows(table, 1, 2), "relative")


def test_an_embodiment_given_is_held_against_the_dataset(dataset: Path, tmp_path: Path, embodiment_file: Path) -> None:
    bare = shutil.copytree(dataset, tmp_path / "bare")
    (bare / "embodiment.yaml").unlink()
    assert load_table(bare).embodiment is None
    given = load_table(bare, embodiment_file)
    assert given.embodiment is not None
    assert given.fingerprint == load_table(dataset).fingerprint
    other = tmp_path / "other.yaml"
    other.write_text(embodiment_file.read_text().replace("fps: 10", "fps: 20").replace("width: 48", "width: 40"))
    with pytest.raises(DatasetError) as error_info:
        load_table(bare, other)
    assert "fps: 10 in the dataset, 20 in embodiment.yaml" in str(error_info.value)
    assert "side: (3, 32, 48) in the dataset, (3, 32, 40) in embodiment.yaml" in str(error_info.value)
    one_camera = tmp_path / "one.yaml"
    one_camera.write_text(embodiment_file.read_text().replace("  hand: {", "  # hand: {"))
    table = load_table(bare, one_camera)
    assert list(table.image_shapes) == [CAMERAS[0]]
    assert table.notes == [f"{CAMERAS[1]} is not used: the embodiment has no such camera"]
