"""Merging: many shards must be what one shard of all their episodes is, to the last frame of the last episode."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from dit_policy_training.conversion import lerobot_format
from dit_policy_training.conversion.merging import MergeError, merge_shards
from dit_policy_training.conversion.options import VideoOptions
from dit_policy_training.conversion.videos import VideoError
from lerobot.datasets.aggregate import aggregate_datasets
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from written import DEEP, DEPTH, H264, HAND, LAYOUT, SIDE, row, rows, write_shard

DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
FAST = VideoOptions(codec="h264", crf=18, preset="ultrafast", pix_fmt="yuv444p")
AT_30 = replace(LAYOUT, fps=30)
TASKS = ("push", "pull", "push", "lift it", "pull")


def read(folder: Path) -> LeRobotDataset:
    return LeRobotDataset("local/merged", root=folder, video_backend="pyav", tolerance_s=1e-4)


def decoded(video: Path) -> tuple[list[Fraction], list[np.ndarray]]:
    """Time and picture of each frame."""
    with av.open(str(video)) as container:
        frames = list(container.decode(video=0))
    return [frame.pts * frame.time_base for frame in frames], [frame.to_ndarray(format="rgb24") for frame in frames]


@pytest.mark.parametrize(
    ("layout", "video"),
    [(LAYOUT, H264), (DEEP, VideoOptions()), (DEEP, VideoOptions(use_videos=False))],
    ids=["h264", "svtav1 and depth", "pictures"],
)
def test_many_shards_are_what_one_shard_of_all_is(tmp_path: Path, layout: Any, video: VideoOptions) -> None:
    episodes = [rows(10 * number, 4 + number, layout, task) for number, task in enumerate(TASKS)]
    one = write_shard(tmp_path / "one", episodes, layout, video)
    groups = (episodes[:2], episodes[2:3], episodes[3:])
    shards = [write_shard(tmp_path / f"part {k}", group, layout, video) for k, group in enumerate(groups)]
    merge_shards(shards, tmp_path / "merged")
    for name in ("info.json", "stats.json"):
        merged, expected = (json.loads((folder / "meta" / name).read_text()) for folder in (tmp_path / "merged", one))
        assert merged == expected
    for name in (DATA, EPISODES, "meta/tasks.parquet"):
        assert pq.read_table(tmp_path / "merged" / name).equals(pq.read_table(one / name)), name
    for path in one.glob("videos/*/*/*.mp4"):
        times, frames = decoded(tmp_path / "merged" / path.relative_to(one))
        expected_times, expected_frames = decoded(path)
        assert times == expected_times
        np.testing.assert_array_equal(frames, expected_frames)
    assert not (tmp_path / "merged" / "evidence").exists()


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """40 episodes of 7 frames at 30 Hz, whose durations no mp4 clock in milliseconds could say, and their dataset."""
    folder = tmp_path_factory.mktemp("forty")
    shards = [
        write_shard(folder / f"shard {k}", [rows(7 * k, 7, AT_30, f"task {k % 3}")], AT_30, FAST) for k in range(40)
    ]
    merge_shards(shards, folder / "merged")
    return shards, folder / "merged"


def test_late_episodes_have_their_own_last_frame_at_its_time(forty: tuple[list[Path], Path]) -> None:
    _, merged = forty
    dataset = read(merged)  # raises where a frame is more than tolerance_s away from its time
    for episode in (0, 1, 20, 38, 39):
        index = 7 * episode + 6
        item, expected = dataset[index], row(index, AT_30)
        assert item["task"] == f"task {episode % 3}"
        for key in (SIDE, HAND):
            shown = item[key].numpy().transpose(1, 2, 0) * 255
            error = np.abs(shown - expected.frame[key]).mean()
            neighbour = np.abs(shown - row(index - 1, AT_30).frame[key]).mean()
            assert error < 2 < neighbour
    for key in (SIDE, HAND):
        times, _ = decoded(merged / f"videos/{key}/chunk-000/file-000.mp4")
        assert times == [Fraction(k, 30) for k in range(280)]
    starts = [episode[f"videos/{SIDE}/from_timestamp"] for episode in pq.read_table(merged / EPISODES).to_pylist()]
    assert starts == [7 * k / 30 for k in range(40)]


def test_statistics_follow_lerobots_rule(forty: tuple[list[Path], Path], tmp_path: Path) -> None:
    shards = forty[0][:6]
    merge_shards(shards, tmp_path / "ours")
    names = [f"local/{path.name}" for path in shards]
    aggregate_datasets(names, "local/theirs", roots=shards, aggr_root=tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / path / "meta/stats.json").read_text()) for path in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    # lerobot leaves these as they were in the shards, where each episode is number 0.
    for key in ours.keys() - {"index", "episode_index", "task_index"}:
        for name, value in theirs[key].items():
            np.testing.assert_allclose(ours[key][name], value, rtol=1e-9, atol=1e-12, err_msg=f"{key}/{name}")
    assert ours["index"]["max"] == [41.0]
    assert ours["episode_index"]["mean"] == [2.5]


def test_files_that_grow_too_large_are_followed_by_new_ones(
    forty: tuple[list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_format, "DATA_MB", 0.005)
    monkeypatch.setattr(lerobot_format, "VIDEO_MB", 0.03)
    monkeypatch.setattr(lerobot_format, "CHUNK_FILES", 2)
    shards, expected = forty
    merge_shards(shards, tmp_path / "merged")
    for pattern in ("data/*/*.parquet", f"videos/{SIDE}/*/*.mp4"):
        found = sorted(str(path.relative_to(tmp_path / "merged")) for path in tmp_path.glob(f"merged/{pattern}"))
        assert len(found) > 2
        assert found[2].split("/")[-2:-1] == ["chunk-001"]
    parts, whole = read(tmp_path / "merged"), read(expected)
    for index in (0, 6, 7, 139, 140, 279):
        for key, value in whole[index].items():
            assert value == parts[index][key] if isinstance(value, str) else value.equal(parts[index][key]), key


def test_videos_of_another_stream_header_get_a_file_of_their_own(tmp_path: Path) -> None:
    """As of two machines' hardware encoders: joined, the second one's could not be decoded."""
    shards = [
        write_shard(tmp_path / str(k), [rows(5 * k, 5)], video=replace(H264, preset=preset))
        for k, preset in enumerate(("superfast", "ultrafast", "ultrafast"))
    ]
    for shard in shards[1:]:
        shutil.copy(shards[0] / "meta/info.json", shard / "meta/info.json")
    merge_shards(shards, tmp_path / "merged")
    assert len(list(tmp_path.glob(f"merged/videos/{SIDE}/*/*.mp4"))) == 2
    dataset = read(tmp_path / "merged")
    for index in (4, 5, 14):
        shown = dataset[index][SIDE].numpy().transpose(1, 2, 0) * 255
        assert np.abs(shown - row(index).frame[SIDE]).mean() < 2


@pytest.mark.parametrize(
    ("layout", "video", "message"),
    [
        (AT_30, H264, r"two does not fit .*one:\n  fps: 30, expected 10\n"),
        (replace(LAYOUT, robot_type="other"), H264, r"robot_type: 'other', expected 'toy'"),
        (replace(LAYOUT, action_names=("lift",)), H264, r"features\.action\.names: \['lift'\], expected \['turn'\]"),
        (replace(LAYOUT, cameras={SIDE: (32, 48)}), H264, r"features\.observation\.images\.hand: None, expected"),
        (LAYOUT, replace(H264, crf=30), r"features\.observation\.images\.side\.info\.video\.crf: 30, expected 18"),
        (LAYOUT, VideoOptions(), r"side\.info\.video\.codec: 'av1', expected 'h264'"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path: Path, layout: Any, video: VideoOptions, message: str) -> None:
    one = write_shard(tmp_path / "one", [rows(0, 3)])
    two = write_shard(tmp_path / "two", [rows(0, 3, layout)], layout, video)
    with pytest.raises(MergeError, match=message):
        merge_shards([one, two], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def lose_video(shard: Path) -> None:
    next(shard.glob(f"videos/{SIDE}/*/*.mp4")).unlink()


def lose_info(shard: Path) -> None:
    (shard / "meta/info.json").unlink()


def cut_info(shard: Path) -> None:
    (shard / "meta/info.json").write_text("{")


def lose_episode(shard: Path) -> None:
    pq.write_table(pq.read_table(shard / EPISODES).slice(1), shard / EPISODES)


def lose_rows(shard: Path) -> None:
    table = pq.read_table(shard / DATA)
    pq.write_table(table.slice(0, len(table) - 1), shard / DATA)


def cut_table(shard: Path) -> None:
    (shard / DATA).write_bytes((shard / DATA).read_bytes()[:-20])


def cut_video(shard: Path) -> None:
    video = next(shard.glob(f"videos/{HAND}/*/*.mp4"))
    video.write_bytes(video.read_bytes()[:-200])


def other_video(shard: Path) -> None:
    shutil.copy(next((shard.parent / "short").glob(f"videos/{SIDE}/*/*.mp4")), next(shard.glob(f"videos/{SIDE}/*/*")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_video, r"two/videos/.*mp4"),
        (lose_info, r"two is no complete dataset: .*info\.json.*convert its bag again"),
        (cut_info, r"two is no complete dataset: Expecting property name"),
        (lose_episode, r"two: info\.json says 2 episodes of 9 frames, meta/episodes has 1 of 4; convert its bag again"),
        (lose_rows, r"two: 3 rows for an episode of 4; convert"),
        (cut_table, r"two/data/.*file-000\.parquet cannot be read: .*; convert its bag again"),
        (cut_video, r"two/videos/.*mp4"),
        (other_video, r"two/videos/.*mp4: 3 frames encoded for 9 rows"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    one, two = (write_shard(tmp_path / name, [rows(0, 5), rows(5, 4)]) for name in ("one", "two"))
    write_shard(tmp_path / "short", [rows(0, 3)])
    damage(two)
    with pytest.raises((MergeError, VideoError, OSError), match=message):
        merge_shards([one, two], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nothing_to_merge_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="no shards"):
        merge_shards([], tmp_path / "merged")


def test_depth_is_the_same_after_merging(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / str(k), [rows(3 * k, 3, DEEP)], DEEP) for k in range(2)]
    merge_shards(shards, tmp_path / "merged")
    millimetres = read(tmp_path / "merged")[5][DEPTH].numpy()[0]
    assert np.abs(millimetres - row(5, DEEP).frame[DEPTH] * 1e3).max() < 3
