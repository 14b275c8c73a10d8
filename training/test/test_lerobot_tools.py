"""LeRobot's own tools take what `convert` writes: its reader with windows, its viewer, its trainer. Offline."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import DataLoader

SIDE, HAND = "observation.images.side", "observation.images.hand"
# As small as ACT gets, from nothing: pretrained weights would come from the network.
TINY_ACT = [
    "--policy.type=act", "--policy.device=cpu", "--policy.push_to_hub=false",
    "--policy.pretrained_backbone_weights=null",
    "--policy.dim_model=32", "--policy.n_heads=2", "--policy.dim_feedforward=32", "--policy.n_encoder_layers=1",
    "--policy.n_vae_encoder_layers=1", "--policy.chunk_size=8", "--policy.n_action_steps=8",
]  # fmt: skip


def run(command: str, *args: str, home: Path) -> str:
    """What a command of LeRobot's prints; it must succeed without network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    program = Path(sys.executable).with_name(command)
    done = subprocess.run([program, *args], env=os.environ | offline, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    return printed


@pytest.mark.parametrize("kind", ["dataset", "png_dataset"])
def test_windows_by_delta_timestamps_are_the_neighbouring_rows(kind: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(kind)
    steps = {"observation.state": [-0.1, 0.0], SIDE: [-0.1, 0.0], HAND: [0.0], "action": [0.0, 0.1, 0.2]}
    opened = LeRobotDataset("local/toy", root=root, delta_timestamps=steps, video_backend="pyav")
    single = LeRobotDataset("local/toy", root=root, video_backend="pyav")
    table = pd.concat([pd.read_parquet(path) for path in sorted((root / "data").rglob("*.parquet"))])
    state, action = np.stack(table["observation.state"]), np.stack(table["action"])
    for episode in opened.meta.episodes:
        first, last = episode["dataset_from_index"], episode["dataset_to_index"] - 1
        for row in (first, (first + last) // 2, last):
            item = opened[row]
            before, after = max(first, row - 1), [min(last, row + step) for step in range(3)]
            np.testing.assert_array_equal(item["observation.state"], state[[before, row]])
            np.testing.assert_array_equal(item["action"], action[after])
            assert item["observation.state_is_pad"].tolist() == [row == first, False]
            assert item["action_is_pad"].tolist() == [row + step > last for step in range(3)]
            for shown, there in ((item[SIDE][0], before), (item[SIDE][1], row)):
                torch.testing.assert_close(shown, single[there][SIDE], rtol=0, atol=0)
    batch = next(iter(DataLoader(opened, batch_size=5, shuffle=True)))
    assert batch[SIDE].shape == (5, 2, 3, 32, 48)
    assert batch["action"].shape == (5, 3, 2)


@pytest.mark.timeout(300)  # processes that take seconds to start, on a busy machine a minute
def test_the_viewer_saves_an_episode(dataset: Path, tmp_path: Path) -> None:
    rerun = pytest.importorskip("rerun.experimental", reason="lerobot-dataset-viz needs rerun-sdk")
    output = tmp_path / "viewed"
    where = ["--repo-id=local/toy", f"--root={dataset}", "--episode-index=1", f"--output-dir={output}"]
    run("lerobot-dataset-viz", *where, "--save=1", "--num-workers=0", home=tmp_path)
    (recording,) = output.glob("*.rrd")
    shown: Counter[str] = Counter()
    for chunk in rerun.RrdReader(recording).store().stream().to_chunks():
        shown[str(chunk.entity_path)] += chunk.num_rows
    frames = LeRobotDataset("local/toy", root=dataset, video_backend="pyav").meta.episodes[1]["length"]
    assert frames > 10
    assert {name: shown[f"/{name}"] for name in (SIDE, HAND, "action", "state")} == dict.fromkeys(
        (SIDE, HAND, "action", "state"), frames
    )


@pytest.mark.timeout(300)  # processes that take seconds to start, on a busy machine a minute
def test_the_trainer_takes_two_steps(dataset: Path, tmp_path: Path) -> None:
    printed = run(
        "lerobot-train", "--dataset.repo_id=local/toy", f"--dataset.root={dataset}", "--dataset.video_backend=pyav",
        *TINY_ACT, "--steps=2", "--batch_size=2", "--num_workers=0", "--log_freq=1", "--save_checkpoint=false",
        "--wandb.enable=false", f"--output_dir={tmp_path / 'trained'}", home=tmp_path,
    )  # fmt: skip
    losses = [float(loss) for loss in re.findall(r"loss:([-\d.naif]+) grdn", printed)]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert "cfg.steps=2" in printed
