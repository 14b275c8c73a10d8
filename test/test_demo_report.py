"""The demo's figures, bars and pictures from episodes made by hand; and the processes it starts."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dit_policy_ros.nodes.demo_pictures import Studio, contact_sheet, video_frames, write_video
from dit_policy_ros.nodes.demo_report import Episode, Referee, Snapshot, report
from dit_policy_ros.nodes.processes import Child, ChildDied
from dit_policy_ros.sim.scene import HOME, JOINTS

SCENE = {"overview": (100, 160, 200), "workspace": (10, 250, 10), "wrist": (250, 250, 10)}
END = (230, 120, 40)


def snapshot(time: float) -> Snapshot:
    joints = dict(zip(JOINTS, [*HOME, 0.0], strict=True))
    return Snapshot(time, joints, {"red": (0.45, 0.1, 0.0), "green": (0.4, -0.1, 0.3), "blue": (0.5, 0.0, 0.0)})


def episode(number: int, success: bool = True, wrong: bool = False, **fields: object) -> Episode:
    trace = [snapshot(0.0), snapshot(0.5), snapshot(1.0)]
    instruction = "push the green block over the line"
    outcome = "over the line" if success else "time limit"
    return Episode(number, 500_000 + number, instruction, success, wrong, outcome, 1.0, trace=trace, **fields)


def render(snapshot: Snapshot, camera: str) -> np.ndarray:
    """Each camera one colour; the overview changes at the end."""
    if camera == "overview":
        return np.full((450, 800, 3), END if snapshot.time == 1.0 else SCENE["overview"], np.uint8)
    return np.full((128, 128, 3), SCENE[camera], np.uint8)


def near(pixel: tuple[int, ...], colour: tuple[int, ...], tolerance: int = 12) -> bool:
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance


def referee(track: list[tuple[float, float, float]]) -> Episode:
    """An episode, asked for green, seen at (time, x of the green block, x of the red block); the line is at 0.62 m."""
    played = Episode(1, 500_000, "push the green block over the line")
    official = Referee(played, "green", {"green": (0.4, -0.1, 0.0), "red": (0.45, 0.1, 0.0)})
    for time, green, red in track:
        assert not played.over, f"over before {time} s"
        official.see(Snapshot(time, {}, {"green": (green, -0.1, 0.0), "red": (red, 0.1, 0.0)}))
    return played


def test_success_counts_once_it_has_lasted() -> None:
    played = referee([(1.0, 0.61, 0.45), (2.0, 0.63, 0.45), (2.2, 0.63, 0.45), (2.31, 0.64, 0.48)])
    assert (played.success, played.wrong_block, played.outcome) == (True, False, "over the line")
    assert played.duration == 2.31
    assert played.moved == pytest.approx({"green": 0.24, "red": 0.03})
    assert len(played.trace) == 4


def test_a_block_that_comes_back_has_not_succeeded() -> None:
    played = referee([(2.0, 0.63, 0.45), (2.2, 0.615, 0.45), (2.4, 0.63, 0.45), (2.6, 0.63, 0.45)])
    assert not played.over


def test_another_block_moved_ends_the_episode() -> None:
    played = referee([(1.0, 0.5, 0.45), (1.1, 0.5, 0.495)])
    assert (played.success, played.wrong_block, played.outcome) == (False, True, "moved another block")


def test_time_runs_out_after_twelve_seconds() -> None:
    played = referee([(11.9, 0.5, 0.45), (12.0, 0.5, 0.45)])
    assert (played.success, played.wrong_block, played.outcome) == (False, False, "time limit")


def test_report_sums_over_episodes() -> None:
    episodes = [
        episode(1, chunk_seconds=[0.010, 0.020, 0.030], rejected=1, moved={"green": 0.21987}),
        episode(2, success=False, wrong=True, chunk_seconds=[0.040, 0.050], stale=2),
    ]
    figures = report(episodes, "none", {"checkpoint": "here"})
    assert (figures["episodes"], figures["success"], figures["wrong_block"]) == (2, 1, 1)
    assert (figures["chunks"], figures["rejected"], figures["stale"]) == (5, 1, 2)
    assert figures["chunk_ms"] == {
        "p50": 30.0,
        "p95": 48.0,
    }  # between the 4th and 5th of 10 20 30 40 50, four fifths up
    assert figures["seeds"] == [500_001, 500_002]
    assert figures["checkpoint"] == "here"
    assert [row["outcome"] for row in figures["results"]] == ["over the line", "time limit"]
    assert figures["results"][0]["moved_m"] == {"green": 0.2199}
    assert figures["machine"]["cores"] >= 1
    assert figures["versions"]["numpy"] == np.__version__
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(
    ("successes", "wrong", "total", "holds"),
    [
        (18, 0, 20, True),
        (17, 0, 20, False),
        (18, 1, 20, True),
        (18, 2, 20, False),
        (9, 0, 10, True),
        (9, 1, 10, False),
        (63, 3, 70, True),
    ],
)
def test_bars_are_ninety_and_five_percent(successes: int, wrong: int, total: int, holds: bool) -> None:
    episodes = [episode(i, i < successes, i >= total - wrong) for i in range(total)]
    for control in ("none", "wrong_instruction"):
        assert report(episodes, control, {})["holds"] is holds


def test_blank_images_have_no_bar_and_a_run_without_chunks_no_latency() -> None:
    figures = report([episode(1, success=False)], "blank_images", {})
    assert figures["holds"] is True
    assert figures["rows"] == []
    assert figures["chunk_ms"] == {"p50": None, "p95": None}


def test_contact_sheet_shows_start_end_and_verdict_of_each_episode() -> None:
    without_trace = episode(3, success=False)
    without_trace.trace = []
    sheet = contact_sheet([episode(1), episode(2, success=False), without_trace], render, "a title")
    cell, gap, header = 400, 14, 66
    assert sheet.width == 3 * (cell + gap) + gap
    for column in (0, 1):
        left = gap + column * (cell + gap)
        assert near(sheet.getpixel((left + 300, header + 150)), END), "the end fills the cell"
        assert near(sheet.getpixel((left + 100, header + 20)), SCENE["overview"]), "the start is in its corner"
        assert near(sheet.getpixel((left + 2, header + 250)), (26, 158, 64)), "the block's colour"
    done, failed = (sheet.crop((gap + x + 340, header + 225, gap + x + 400, header + 277)) for x in (0, cell + gap))
    pixels = {name: np.asarray(part).reshape(-1, 3).astype(int) for name, part in (("y", done), ("n", failed))}
    assert any(near(pixel, (30, 142, 70)) for pixel in pixels["y"])
    assert any(near(pixel, (200, 44, 36)) for pixel in pixels["n"])
    assert not any(near(pixel, (200, 44, 36), 40) for pixel in pixels["y"])


def test_video_shows_scene_cameras_and_caption_and_plays(tmp_path: Path) -> None:
    path = tmp_path / "demo.mp4"
    frames = list(video_frames(episode(1), render, ("workspace", "wrist"), fps=10))
    assert len(frames) == 2 + 8, "one each, and the last one for 0.8 s"
    assert write_video(path, iter(frames), fps=10) == 10
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 10
        shown = [frame.to_image() for frame in container.decode(stream)]
    assert len(shown) == 10
    assert shown[0].size == (800, 506)
    assert near(shown[0].getpixel((200, 300)), SCENE["overview"])
    assert near(shown[-1].getpixel((200, 300)), END)
    assert near(shown[0].getpixel((728, 60)), SCENE["workspace"])
    assert near(shown[0].getpixel((728, 200)), SCENE["wrist"])
    clock, verdict = (np.asarray(image.crop((600, 450, 800, 506))).astype(int) for image in (shown[0], shown[-1]))
    assert np.abs(clock - verdict).max() > 60, "the clock gives way to the verdict"


def test_video_of_blank_images_shows_what_the_policy_saw() -> None:
    frame = next(video_frames(episode(1), render, ("workspace",), fps=10, blank=True))
    assert near(Image.fromarray(frame).getpixel((728, 60)), (0, 0, 0))


def test_no_frame_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frame"):
        write_video(tmp_path / "empty.mp4", iter([]), 10)


def test_studio_sets_the_scene_as_recorded() -> None:
    studio = Studio(shadows=0, samples=0)
    pictures = {camera: studio.render(snapshot(0.0), camera) for camera in ("overview", "workspace")}
    assert pictures["overview"].shape == (450, 800, 3)
    assert pictures["workspace"].shape == (128, 128, 3)
    moved = Snapshot(0.0, snapshot(0.0).joints, snapshot(0.0).blocks | {"red": (0.7, 0.1, 0.0)})
    # Seen from the front, a block nearer the camera is lower in the picture.
    rows = [red_rows(picture) for picture in (pictures["workspace"], studio.render(moved, "workspace"))]
    assert rows[1] > rows[0] + 10


def red_rows(picture: np.ndarray) -> float:
    """Mean row of the strongly red pixels."""
    red, green, blue = picture.astype(int).transpose(2, 0, 1)
    return float(np.argwhere((red > 120) & (green < 70) & (blue < 70))[:, 0].mean())


def run(tmp_path: Path, code: str) -> Child:
    return Child("helper", [sys.executable, "-c", code], tmp_path / "log")


def test_a_child_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    child = run(tmp_path, "print('the disk is full'); raise SystemExit(3)")
    child.wait(10)
    with pytest.raises(ChildDied, match=r"helper ended with status 3(?s:.*)the disk is full"):
        child.check()


def test_a_child_stops_by_sigint_else_sigterm_else_sigkill(tmp_path: Path) -> None:
    ready = "import signal, sys, time; print('ready', flush=True)\n"
    ignore = "signal.signal(signal.{}, signal.SIG_IGN)\n"
    exits = "signal.signal(signal.{}, lambda *_: sys.exit({}))\n"
    wait = "while True: time.sleep(0.01)"
    cases = {
        exits.format("SIGINT", 5) + ready + wait: 5,
        ignore.format("SIGINT") + exits.format("SIGTERM", 6) + ready + wait: 6,
        ignore.format("SIGINT") + ignore.format("SIGTERM") + ready + wait: -signal.SIGKILL,
    }
    for code, status in cases.items():
        child = run(tmp_path, "import signal, sys\n" + code)
        while "ready" not in child.log.read_text():
            child.check()
        child.check()
        assert child.stop(patience=0.3) == status
