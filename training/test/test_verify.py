"""A sound dataset passes; one that was tampered with in a single place does not, and the problem says where."""

import json
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from dit_policy_training.conversion.evidence import FOLDER, KEPT, ShardEvidence, Witness
from dit_policy_training.conversion.findings import SHOWN, Findings
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.likeness import LOSSLESS, bound, colour_error, fault, psnr
from dit_policy_training.conversion.merging import merge_shards
from dit_policy_training.conversion.options import DepthCamera, VideoOptions
from dit_policy_training.conversion.rows import EpisodeEnd, Row
from dit_policy_training.conversion.shards import ShardWriter
from dit_policy_training.conversion.verify import Verification, verify
from huggingface_hub import constants
from toy_robot import picture

SIDE, HAND, DEPTH = "observation.images.side", "observation.images.hand", "observation.images.depth"
LAYOUT = Layout(
    fps=10,
    robot_type="toy",
    cameras={SIDE: (48, 64), HAND: (32, 40)},
    depth={DEPTH: DepthCamera("depth", "raw", 24, 16, 0.3)},
    state_names=("lift", "turn", "reach"),
    action_names=("turn", "lift"),
    topics=(),
)
FAST = VideoOptions(codec="h264", crf=18, preset="ultrafast")
TASKS = ["push the red block", "push the blue block"]


def rows(length: int, start: int, task: Callable[[int], str]) -> Iterator[Row]:
    y, x = np.mgrid[0:16, 0:24]
    for k in range(start, start + length):
        frame = {
            SIDE: picture(4 * k, 64, 48),
            HAND: picture(k + 7, 40, 32),
            DEPTH: (0.5 + 0.01 * k + 0.03 * x + 0.02 * y).astype(np.float32),
            "observation.state": np.sin(np.float32([0.1, 0.2, 0.3]) * k, dtype=np.float32),
        }
        yield Row(k * 10**8, task(k - start), frame, np.cos(np.float32([0.15, 0.25]) * k, dtype=np.float32), {})


def events(shard: Path) -> Iterator[Row | EpisodeEnd]:
    """What the sampler would give for the bag of each shard; an episode that is left out among them."""
    if shard.name == "a":
        yield from rows(20, 0, lambda k: TASKS[0])
        yield EpisodeEnd(None)
        yield from rows(4, 25, lambda k: TASKS[0])
        yield EpisodeEnd("too short")
        yield from rows(13, 30, lambda k: TASKS[k >= 6])
        yield EpisodeEnd(None)
    else:
        yield from rows(9, 50, lambda k: TASKS[1])
        yield EpisodeEnd(None)


def made(folder: Path, video: VideoOptions) -> list[Path]:
    """Shards a and b, and the dataset of both, in `folder`."""
    shards = [folder / "a", folder / "b"]
    for shard in shards:
        with ShardWriter(shard, LAYOUT, video) as writer:
            for event in events(shard):
                if isinstance(event, Row):
                    writer.add(event)
                else:
                    writer.end(event.reason is None)
    merge_shards(shards, folder / "dataset")
    return shards


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    made(folder, FAST)
    return folder


@pytest.fixture
def tampered(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def check(folder: Path, mode: str = "sample", reread: bool = True) -> Verification:
    return verify(folder / "dataset", [folder / "a", folder / "b"], mode, events if reread else None)


@pytest.mark.parametrize(("mode", "pictures"), [("sample", None), ("full", 42 * 2)])
def test_a_sound_dataset_has_no_problem(sound: Path, mode: str, pictures: int | None) -> None:
    found = check(sound, mode)
    assert found.problems == []
    assert found.figures["frames"] == 20 + 13 + 9
    assert found.figures["episodes"] == 3
    assert found.figures["values_compared"] == 42 * (3 + 2)
    # The kept ones: each episode's last, and those evenly before it, of both colour cameras.
    expected = 2 * sum(len(e.pictures) for s in "ab" for e in ShardEvidence.load(sound / s).episodes)
    assert found.figures["pictures_compared"] == (pictures or expected)
    psnr = found.figures["psnr_db"][SIDE]
    assert psnr["min"] > psnr["bound"] == 30.0
    json.dumps(found.figures, allow_nan=False)


def test_without_the_bags_every_frame_is_compared_with_the_shards(tampered: Path) -> None:
    assert check(tampered, "full", reread=False).problems == []
    frames = decoded(video_of(tampered, SIDE))
    frames[7] = frames[7] ^ 8  # too little for any PSNR
    encode(video_of(tampered, SIDE), frames)
    assert any(f"frame 7: {SIDE} is not the shard's picture" in p for p in check(tampered, "full", False).problems)


def test_off_looks_at_nothing(tmp_path: Path) -> None:
    assert verify(tmp_path / "nowhere", [], "off") == Verification([], {"mode": "off"})


def test_pictures_in_the_table_must_be_equal(tmp_path: Path) -> None:
    made(tmp_path, VideoOptions(use_videos=False))
    for mode in ("sample", "full"):
        found = check(tmp_path, mode)
        assert found.problems == []
        assert found.figures["psnr_db"][SIDE]["identical"] == found.figures["psnr_db"][SIDE]["frames"] > 9


def test_statistics_of_depth_in_tables_are_taken_again(tmp_path: Path) -> None:
    made(tmp_path, VideoOptions(use_videos=False))
    path = tmp_path / "dataset" / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    stats[DEPTH]["mean"] = [[[stats[DEPTH]["mean"][0][0][0] + 0.01]]]
    path.write_text(json.dumps(stats))
    (problem,) = check(tmp_path).problems
    assert f"mean of {DEPTH} is" in problem
    assert "the stored pictures give" in problem


def table_of(folder: Path) -> Path:
    (path,) = (folder / "dataset" / "data").rglob("*.parquet")
    return path


def video_of(folder: Path, key: str) -> Path:
    (path,) = (folder / "dataset" / "videos" / key).rglob("*.mp4")
    return path


def change_float(folder: Path) -> None:
    table = pd.read_parquet(table_of(folder))
    action = np.array(table["action"][23])
    action[1] = np.nextafter(action[1], np.float32(9))  # the least change there is
    table.at[23, "action"] = action
    table.to_parquet(table_of(folder))


def change_task(folder: Path) -> None:
    table = pd.read_parquet(table_of(folder))
    table.loc[26, "task_index"] = 0
    table.to_parquet(table_of(folder))


def rename_task(folder: Path) -> None:
    path = folder / "dataset" / "meta" / "tasks.parquet"
    tasks = pd.read_parquet(path)
    tasks.index = pd.Index(["push the red block", "push the green block"], name=tasks.index.name)
    tasks.to_parquet(path)


def change_index(folder: Path) -> None:
    table = pd.read_parquet(table_of(folder))
    table.loc[40, "timestamp"] += 0.01
    table.to_parquet(table_of(folder))


def drop_row(folder: Path) -> None:
    table = pd.read_parquet(table_of(folder))
    table.drop(index=5).to_parquet(table_of(folder), index=False)


def change_statistic(key: str, name: str, column: int, factor: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "dataset" / "meta" / "stats.json"
        stats = json.loads(path.read_text())
        stats[key][name][column] *= factor
        path.write_text(json.dumps(stats))

    return change


def bytes_as_statistics(folder: Path) -> None:
    path = folder / "dataset" / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    stats[HAND] = {k: v if k == "count" else (255 * np.array(v)).tolist() for k, v in stats[HAND].items() if k != "q01"}
    path.write_text(json.dumps(stats))


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def encode(path: Path, frames: list[np.ndarray], fps: int = 10) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", fps, options={"crf": "4", "g": "2", "preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        for number, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def edit_video(key: str, edit: Callable[[list[np.ndarray]], list[np.ndarray]]) -> Callable[[Path], None]:
    return lambda folder: encode(video_of(folder, key), edit(decoded(video_of(folder, key))))


def swap(first: int, second: int) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    def swapped(frames: list[np.ndarray]) -> list[np.ndarray]:
        frames[first], frames[second] = frames[second], frames[first]
        return frames

    return swapped


def exchange_cameras(folder: Path) -> None:
    frames = decoded(video_of(folder, HAND))
    encode(video_of(folder, HAND), [np.roll(frame, 13, axis=(0, 1)) for frame in frames])


def shift_video_times(folder: Path) -> None:
    """Of the last episode, by a third of a frame: #3177 of lerobot."""
    (path,) = (folder / "dataset" / "meta" / "episodes").rglob("*.parquet")
    episodes = pd.read_parquet(path)
    episodes.loc[2, f"videos/{HAND}/from_timestamp"] += 0.03
    episodes.to_parquet(path)


def change_window(column: str) -> Callable[[Path], None]:
    """The rows that LeRobot takes for the second episode's when it looks back and ahead."""

    def change(folder: Path) -> None:
        (path,) = (folder / "dataset" / "meta" / "episodes").rglob("*.parquet")
        episodes = pd.read_parquet(path)
        episodes.loc[1, column] += 1
        episodes.to_parquet(path)

    return change


def exchange_names(folder: Path) -> None:
    path = folder / "dataset" / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"]["action"]["names"].reverse()
    path.write_text(json.dumps(info))


def change_depth(folder: Path) -> None:
    shutil.copy(video_of(folder, SIDE), video_of(folder, DEPTH))


def lose_episode(folder: Path) -> None:
    shutil.rmtree(folder / "b" / "evidence")


def empty_video(folder: Path) -> None:
    video_of(folder, SIDE).write_bytes(b"")


def no_meta(folder: Path) -> None:
    shutil.rmtree(folder / "dataset" / "meta" / "episodes")


def corrupt_packet(folder: Path) -> None:
    """A byte within the encoded frame 23, the second episode's frame 3, of which no picture was kept."""
    path = video_of(folder, SIDE)
    with av.open(str(path)) as container:
        packet = next(p for p in container.demux(video=0) if p.pts is not None and p.pts * p.time_base * 10 == 23)
        place = packet.pos + packet.size // 2
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "dataset" / name).unlink()


SABOTAGES: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "one float": (change_float, "sample", ["episode 1 (of a), frame 3", "action of lift", "was sampled"]),
    "one task": (change_task, "sample", ["episode 1 (of a), frame 6", f"'{TASKS[0]}', '{TASKS[1]}' was sampled"]),
    "a task's words": (rename_task, "sample", ["episode 2 (of b), frame 0", "'push the green block'"]),
    "one timestamp": (change_index, "sample", ["row 40: timestamp", "expected 0.69"]),
    "a row lost": (drop_row, "sample", ["41", "42"]),
    "a mean": (change_statistic("action", "mean", 0, 1.01), "sample", ["mean of action of turn", "the table gives"]),
    "a deviation": (
        change_statistic("observation.state", "std", 2, 1.01),
        "sample",
        ["std of observation.state of reach"],
    ),
    "a quantile": (change_statistic("action", "q90", 1, 0.97), "sample", ["q90 of action of lift"]),
    "a count": (change_statistic("action", "count", 0, 2), "sample", ["count of action is 84, the table gives 42"]),
    "bytes": (bytes_as_statistics, "sample", [f"{HAND} has min", "within 0 to 1"]),
    "two frames": (edit_video(SIDE, swap(4, 5)), "full", ["episode 0 (of a), frame 4", SIDE, "out of place"]),
    "a kept frame": (edit_video(SIDE, swap(15, 16)), "sample", ["episode 0 (of a), frame 15", SIDE, "out of place"]),
    "shifted": (edit_video(HAND, lambda f: [f[0], *f[:-1]]), "sample", ["frame 19", HAND, "out of place"]),
    "a frame lost": (edit_video(HAND, lambda f: f[:20] + f[21:]), "sample", ["41 frames for 42 rows of " + HAND]),
    "blank": (edit_video(SIDE, lambda f: [np.zeros_like(p) for p in f]), "sample", [SIDE, "expected at least 30.0"]),
    "colours": (edit_video(SIDE, lambda f: [p[..., ::-1] for p in f]), "full", [SIDE, "red and blue"]),
    "another camera": (exchange_cameras, "sample", [HAND, "another picture"]),
    "video times": (shift_video_times, "sample", ["episode 2 (of b), frame 8", "LeRobot does not give it"]),
    "first row": (
        change_window("dataset_from_index"),
        "sample",
        ["episode 1: dataset_from_index", "is 21, expected 20"],
    ),
    "last row": (change_window("dataset_to_index"), "sample", ["episode 1: dataset_to_index", "is 34, expected 33"]),
    "names": (exchange_names, "sample", ["info.json: action is", "a has", "convert again"]),
    "depth": (change_depth, "sample", [DEPTH]),
    "evidence": (lose_episode, "sample", ["b has no evidence", "convert again"]),
    "a packet": (corrupt_packet, "sample", ["episode 1 (of a), frame 3", f"{SIDE} is not as encoded in the shard"]),
    "a video": (empty_video, "sample", ["no readable"]),
    "meta": (no_meta, "sample", ["LeRobot cannot load it", "meta/episodes has no file"]),
    "tasks": (lose("meta/tasks.parquet"), "sample", ["LeRobot cannot load it", "meta/tasks.parquet is missing"]),
    "data": (lose("data/chunk-000/file-000.parquet"), "sample", ["data/chunk-000/file-000.parquet is missing"]),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_what_was_tampered_with_is_named(tampered: Path, name: str) -> None:
    sabotage, mode, expected = SABOTAGES[name]
    sabotage(tampered)
    problems = check(tampered, mode).problems
    assert any(all(part in problem for part in expected) for problem in problems), problems


def test_loading_never_asks_the_network(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked: list[bool] = []

    def version(name: str, wanted: str) -> str:
        asked.append(constants.is_offline_mode())
        return wanted

    def unreadable(root: Path) -> None:
        raise FileNotFoundError("an unforeseen file")

    monkeypatch.setattr("lerobot.datasets.dataset_metadata.get_safe_version", version)
    monkeypatch.setattr("lerobot.datasets.dataset_metadata.load_tasks", unreadable)
    (problem,) = check(sound).problems
    assert "an unforeseen file" in problem
    assert asked == [True]
    assert not constants.is_offline_mode()


def test_a_bag_that_changed_since_is_noticed(sound: Path) -> None:
    def changed(shard: Path) -> Iterator[Row | EpisodeEnd]:
        for event in events(shard):
            if isinstance(event, Row) and event.stamp_ns == 34 * 10**8:
                event = Row(event.stamp_ns, "other", event.frame | {SIDE: event.frame[SIDE] // 2}, event.action + 1, {})
            yield event

    problems = verify(sound / "dataset", [sound / "a", sound / "b"], "full", changed).problems
    for part in ("the task is 'push the red block', read again 'other'", "action of turn", f"{SIDE}: PSNR"):
        assert any("episode 1 (of a), frame 4" in p and part in p for p in problems), problems


def test_a_bag_that_is_gone_is_told(sound: Path) -> None:
    def gone(shard: Path) -> Iterator[Row | EpisodeEnd]:
        raise ValueError("no such bag")
        yield

    problems = verify(sound / "dataset", [sound / "a", sound / "b"], "full", gone).problems
    assert problems == ["a: its bag cannot be read again: no such bag"]


@pytest.mark.parametrize("length", [1, 2, 5, 100, 1000])
def test_a_witness_keeps_few_pictures_evenly_and_the_last(tmp_path: Path, length: int) -> None:
    witness = Witness(tmp_path / FOLDER)
    for k in range(length):
        witness.add(Row(0, "t", {SIDE: np.full((2, 3, 3), k % 256, np.uint8)}, np.float32([k]), {}))
    witness.end(True)
    witness.add(Row(0, "t", {SIDE: np.zeros((2, 3, 3), np.uint8)}, np.float32([0]), {}))
    witness.end(False)
    (episode,) = ShardEvidence.load(tmp_path).episodes
    assert episode.frames == length
    assert episode.pictures[0] == 0
    assert episode.pictures[-1] == length - 1
    assert len(episode.pictures) <= KEPT
    assert max(np.diff(episode.pictures), default=0) <= max(1, 2 * length // 3)
    assert all(frame % 2 for frame in episode.pictures[1:-1]) or length < 4
    for frame in episode.pictures:
        assert (episode.picture(SIDE, frame) == frame % 256).all()
    np.testing.assert_array_equal(episode.vector("action")[:, 0], np.arange(length))


def test_bounds_follow_the_codec_and_its_crf() -> None:
    def of(codec: str, crf: int) -> float:
        return bound({"dtype": "video", "info": {"video.codec": codec, "video.crf": crf}})

    assert of("av1", 30) == pytest.approx(25.5)
    assert of("h264", 18) > of("h264", 30) > of("h264", 60) == 18.0
    assert bound({"dtype": "video", "info": {"video.codec": "h264"}}) == 18.0  # a hardware encoder's, without crf
    assert bound({"dtype": "image"}) == LOSSLESS


def test_the_colour_of_small_things_is_compared() -> None:
    expected = np.full((48, 64, 3), 90, np.uint8)
    expected[8:16, 16:24] = (40, 70, 210)
    found = expected.copy()
    found[8:16, 16:24] = (110, 70, 130)
    assert colour_error(expected, expected) == 0
    assert colour_error(found, expected) == 80
    found[8:16, 16:20] = expected[8:16, 16:20]
    assert colour_error(found, expected) == 40


def test_a_noisy_still_scene_is_no_fault() -> None:
    """The frames of a still camera differ by noise alone: any of them may be nearer to any other."""
    rng = np.random.default_rng(0)
    scene = picture(3, 64, 48)
    noisy = [np.clip(scene + rng.normal(0, 4, scene.shape), 0, 255).astype(np.uint8) for _ in range(4)]
    apart = [psnr(noisy[1], other) for other in noisy[2:]]
    assert fault(noisy[0], noisy[1], noisy[2:], apart, 25.5) is None


def test_a_coarse_frame_beside_a_fine_one_of_the_same_picture_is_no_fault() -> None:
    """Two rows of one picture, as where fps is above the camera's: the encoder keeps one of them better."""
    rng = np.random.default_rng(0)
    scene, other = picture(3, 64, 48), picture(40, 64, 48)
    coarse = np.clip(scene + rng.normal(0, 6, scene.shape), 0, 255).astype(np.uint8)
    assert psnr(coarse, scene) < 37
    apart = [psnr(scene, other), LOSSLESS]
    assert fault(coarse, scene, [other, scene], apart, 25.5) is None
    assert "out of place" in (fault(other, scene, [scene], apart[:1], 10.0) or "")


def test_many_problems_of_one_kind_are_counted() -> None:
    findings, other = Findings(), Findings()
    for number in range(SHOWN - 2):
        findings.add("tasks", f"task {number}")
    for number in range(5):
        other.add("tasks", f"other {number}")
    findings.take(other)
    assert findings.counts["tasks"] == SHOWN + 3
    assert findings.problems == [
        *(f"task {number}" for number in range(SHOWN - 2)), "other 0", "other 1", "... and 3 more about tasks",
    ]  # fmt: skip
