"""The report: what it tells is what the tables and the accounts hold, and it opens anywhere."""

import base64
import inspect
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import toy_robot
from dit_policy_training.cli import parse
from dit_policy_training.conversion import report_warnings
from dit_policy_training.conversion.account import BagAccount, EpisodeAccount, GapAccount, StreamAccount
from dit_policy_training.conversion.checking import check_options
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.merging import merge_shards
from dit_policy_training.conversion.options import ConvertConfig, VideoOptions
from dit_policy_training.conversion.report import write_report
from dit_policy_training.conversion.report_plots import HEIGHT, WIDTH, bars, curves
from dit_policy_training.conversion.report_style import STYLE
from dit_policy_training.conversion.report_warnings import warnings_of
from dit_policy_training.conversion.rows import Row
from dit_policy_training.conversion.shards import ShardWriter

SIDE, HAND = "observation.images.side", "observation.images.hand"
LAYOUT = Layout(
    fps=10,
    robot_type="toy",
    cameras={SIDE: (32, 48), HAND: (32, 32)},
    depth={},
    state_names=("lift", "turn", "reach"),
    action_names=("turn", "lift"),
    topics=(),
)
NASTY = '<script>alert("push & pull")</script>'
FRAMES = (30, 24, 20)


def write_dataset(folder: Path, row: Callable[[int, int], Row], lengths: tuple[int, ...] = FRAMES) -> Path:
    """A dataset of row(episode, frame), without conversion.json."""
    with ShardWriter(folder / "shard", LAYOUT, VideoOptions(codec="h264", preset="ultrafast", crf=18)) as writer:
        for episode, length in enumerate(lengths):
            for frame in range(length):
                writer.add(row(episode, frame))
            writer.end(True)
    merge_shards([folder / "shard"], folder / "dataset")
    (folder / "dataset" / "embodiment.yaml").write_text(toy_robot.EMBODIMENT)
    return folder / "dataset"


def usual(episode: int, frame: int) -> Row:
    t = frame / 10
    state = np.float32([toy_robot.position(joint, t) for joint in toy_robot.JOINTS])
    ahead = np.float32([toy_robot.position(joint, t + 0.15) for joint in ("turn", "lift")])
    pictures = {SIDE: toy_robot.picture(5 * frame, 48, 32), HAND: toy_robot.picture(3 * frame + 40, 32, 32)}
    return Row(0, NASTY if episode == 2 else "push the red block", {**pictures, "observation.state": state}, ahead, {})


def account(bag: str, episodes: list[EpisodeAccount]) -> dict[str, Any]:
    streams = [
        StreamAccount("side", "/side/image_raw", "camera", "header", "as_of", 0.3, 45, 15.0, 0.08, 0.02, 0.05, 0.06),
        StreamAccount("state", "/joint_states", "state", "header", "as_of", 0.2, 150, 50.0, 0.03, 0.001, 0.004, 0.009),
    ]
    return BagAccount(bag, 10, 0, 3.4, 0.2, "side", 0.1, "state", streams=streams, episodes=episodes).as_json()


def episode_account(frames: int, left_out: str | None = None) -> EpisodeAccount:
    ages = {"side": [0.02, 0.05, 0.06], "state": [0.001, 0.004, 0.009]}
    return EpisodeAccount(0.2, frames / 10, frames, [(0, "t")], 0.1, 0.2, 0.1, {"turn": 1.3}, ages, left_out)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bags: the first gave two episodes and one that was left out, the second one; a third was refused."""
    folder = write_dataset(tmp_path_factory.mktemp("report"), usual)
    first = [episode_account(30), episode_account(3, "too short: 0.3 s"), episode_account(24)]
    bags = [
        {"path": "/data/mon", "sha256": "a" * 64, "episodes": [0, 1], "refused": None,
         "account": account("mon", first)},
        {"path": "/data/tue", "sha256": "b" * 64, "episodes": [2], "refused": None,
         "account": account("tue", [episode_account(20)])},
        {"path": "/data/wed", "sha256": None, "episodes": [], "refused": "empty file; record again", "account": None},
    ]  # fmt: skip
    (folder / "conversion.json").write_text(
        json.dumps({"settings": {}, "converter": {"lerobot": "0.6.1"}, "bags": bags})
    )
    checked = {
        "mode": "sample", "problems": 0, "frames": 74, "values_compared": 370, "pictures_compared": 24,
        "psnr_db": {SIDE: {"min": 41.5, "median": 45.0, "bound": 32.0, "identical": 0, "frames": 12}},
    }  # fmt: skip
    write_report(folder, checked)
    return folder


@pytest.fixture(scope="module")
def figures(reported: Path) -> dict[str, Any]:
    return json.loads((reported / "report.json").read_text())


@pytest.fixture(scope="module")
def html(reported: Path) -> str:
    return (reported / "report.html").read_text()


class Page(HTMLParser):
    """Checks that every element is closed where it must be, and gathers what the page would fetch and its words."""

    VOID = ("meta", "img", "input", "polyline", "path", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "data", "action"):
                (self.links if tag == "a" else self.fetched).append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.words += data + " "


def test_the_page_is_whole_and_fetches_nothing(html: str) -> None:
    page = Page(html)
    assert len(page.fetched) == 3 * 2  # a strip a camera and episode
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.fetched)
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(set(page.ids)) == len(page.ids)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert "prefers-color-scheme:dark" in html
    assert 'name="viewport"' in html
    assert len(html) < 30_000 + 3 * 200_000


def test_words_from_bags_are_shown_and_never_run(html: str) -> None:
    assert NASTY not in html
    assert NASTY in Page(html).words
    assert html.count("<script>") == 1


def test_it_tells_what_was_converted(html: str, figures: dict[str, Any]) -> None:
    words = Page(html).words
    for told in ("74", "push the red block", "Verified.", "370 numbers bit for bit", "PSNR 41.5 dB", "wed",
                 "empty file; record again", "1 x too short: 0.3 s", "15.0 Hz", "idle 10%"):  # fmt: skip
        assert told in words, told
    assert figures["dataset"] | {"bytes": 0, "name": ""} == {
        "name": "", "robot": "toy", "fps": 10, "episodes": 3, "frames": 74, "seconds": 7.4, "bytes": 0,
        "cameras": {HAND: [32, 32, 3], SIDE: [32, 48, 3]},
    }  # fmt: skip
    assert [(task["task"], task["episodes"], task["frames"]) for task in figures["tasks"]] == [
        ("push the red block", 2, 54),
        (NASTY, 1, 20),
    ]


def test_episodes_are_told_with_the_account_of_their_own_bag(figures: dict[str, Any]) -> None:
    told = [(episode["bag"], episode["frames"], episode["seconds"]) for episode in figures["episodes"]]
    assert told == [("mon", 30, 3.0), ("mon", 24, 2.4), ("tue", 20, 2.0)]
    assert figures["episodes"][1]["ages"]["side"] == [0.02, 0.05, 0.06]
    assert figures["bags"][0]["left_out"] == [{"start": 0.2, "seconds": 0.3, "left_out": "too short: 0.3 s"}]


def test_histograms_and_limits_are_those_of_the_table(reported: Path, figures: dict[str, Any]) -> None:
    (path,) = (reported / "data").rglob("*.parquet")
    turn = np.stack(pd.read_parquet(path)["action"])[:, 0].astype(float)
    told = figures["vectors"]["action"][0]
    assert told["name"] == "turn"
    assert told["limits"] == [-3.0, 3.0]
    assert sum(told["counts"]) == 74
    assert told["min"] == pytest.approx(turn.min(), rel=1e-5)
    assert told["counts"] == np.histogram(turn, bins=len(told["counts"]))[0].tolist()
    assert told["at_limit"] == told["too_fast"] == 0.0


def test_it_is_the_same_each_time(reported: Path, html: str) -> None:
    before = (reported / "report.json").read_bytes()
    write_report(reported, json.loads(before)["verified"])
    assert (reported / "report.json").read_bytes() == before
    assert (reported / "report.html").read_text() == html


def test_a_strip_shows_the_episodes_frames_in_order(html: str) -> None:
    """The toy's coloured square moves 5 pixels a frame and changes its colour: the strip must show where it was."""
    sources = Page(html).fetched
    jpeg = np.frombuffer(base64.b64decode(sources[0].split(",")[1]), np.uint8)
    side = cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    width = side.shape[1] // 8
    for place in range(8):
        frame = (2 * place + 1) * 30 // 16
        cell = cv2.resize(side[:, place * width : (place + 1) * width], (48, 32), interpolation=cv2.INTER_AREA)
        own = np.abs(cell.astype(int) - toy_robot.picture(5 * frame, 48, 32)).mean()
        for other in (frame - 1, frame + 1):
            assert own < np.abs(cell.astype(int) - toy_robot.picture(5 * other, 48, 32)).mean()


def test_a_dataset_without_an_account_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    cautions = write_report(write_dataset(tmp_path, usual))
    assert any("was not checked" in caution for caution in cautions)
    assert "Not verified." in Page((tmp_path / "dataset" / "report.html").read_text()).words


def kinds_of(dataset: Path) -> dict[str, str]:
    write_report(dataset)
    return {w["kind"]: w["found"] for w in json.loads((dataset / "report.json").read_text())["warnings"]}


def dull(episode: int, frame: int) -> Row:
    """Dark and frozen cameras, joints that stand, and an action that is the state."""
    row = usual(episode, frame)
    state = np.float32([0.3, toy_robot.position("turn", frame / 10), 0.1])
    pictures = {SIDE: np.full((32, 48, 3), 9, np.uint8), HAND: toy_robot.picture(7, 32, 32)}
    return Row(0, row.task, {**pictures, "observation.state": state}, state[[1, 0]], {})


def wild(episode: int, frame: int) -> Row:
    row = usual(episode, frame)
    return Row(
        0, "Push the red block." if episode else row.task, row.frame, np.float32([(-1) ** frame * 2.99, 0.1]), {}
    )


def test_what_is_wrong_with_the_data_is_seen_in_the_tables(tmp_path: Path) -> None:
    usually = kinds_of(write_dataset(tmp_path / "usual", usual))
    assert set(usually) == {"not verified", "few episodes"}
    found = kinds_of(write_dataset(tmp_path / "dull", dull))
    assert found["action is state"].startswith("In 100% of the rows")
    assert found["still joints"].startswith("lift, reach: measured at one place")
    assert found["frozen camera"] == "hand shows one and the same picture throughout in 3 episodes of the 3 looked at."
    assert found["dark camera"] == "side is nearly black in 3 episodes of the 3 looked at."
    found = kinds_of(write_dataset(tmp_path / "wild", wild, (90, 20, 24, 22)))
    assert found["at the limit"].startswith("turn is commanded to within 1 % of its limits (-3 to 3) in 100%")
    assert found["jumps"].startswith("turn is commanded faster than 1.5 times its limit (2 a second)")
    assert found["lengths"].startswith("1 episode is more than 3 times longer")
    assert found["spelling"] == "One task is spelled in 2 ways: 'push the red block', 'Push the red block.'."


def zeros(episode: int, frame: int) -> Row:
    row = usual(episode, frame)
    return Row(0, row.task, {**row.frame, "observation.state": np.zeros(3, np.float32)}, np.zeros(2, np.float32), {})


@pytest.mark.parametrize(("made", "kind"), [(wild, "at the limit"), (wild, "jumps"), (zeros, "action is state")])
def test_relative_actions_are_not_judged_as_positions(tmp_path: Path, made: Callable[..., Row], kind: str) -> None:
    dataset = write_dataset(tmp_path, made, (20,))
    assert kind in kinds_of(dataset)
    settings = {"vectors": {"action_mode": "relative"}}
    (dataset / "conversion.json").write_text(json.dumps({"settings": settings, "bags": []}))
    assert kind not in kinds_of(dataset)
    assert "turn, relative" in (dataset / "report.html").read_text()


def stream(**changes: float) -> Callable[[dict[str, Any]], None]:
    return lambda figures: figures["bags"][0]["streams"][0].update(changes)


def gap(figures: dict[str, Any]) -> None:
    figures["bags"][1]["gaps"] = [vars(GapAccount(1.0, 4.25, "side", "stale", "no message for 0.3 s"))]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], None], list[str]]] = {
    "idling": (lambda f: f["episodes"][1].update(idle_share=0.31), ["1 episode of 3 stands still", "trim_idle=true"]),
    "gaps": (gap, ["side: 1 gap (stale) in 1 bag, 3.2 s in all", "the longest 3.25 s in tue at 1.0 s", "loose cable"]),
    "skew": (stream(skew_median=-0.07), ["side: header stamps are -70 ms off", "'{/side/image_raw: receive}'"]),
    "old data": (stream(age_p95=0.21), ["side: data is 210 ms old", "200 ms are usual at 10 frames"]),
    "repeated frames": (stream(repeated=0.4), ["40% of the frames are the frame before", "lower --fps"]),
    "clock jumps": (stream(clock_jumps=1), ["side: its stamps jumped 1 time ("]),
    "late messages": (stream(too_late=3), ["side: 3 messages came after the row"]),
    "late start": (
        lambda f: f["bags"][1].update(warm_up=2.5),
        ["1 bag: the first 2.5 s (in tue)", "until side begins"],
    ),
    "notes": (lambda f: f["bags"][0]["notes"].append("split files overlap"), ["mon: split files overlap"]),
    "not verified": (lambda f: f.update(verified={"mode": "off"}), ["--verify=sample"]),
    "coarse pictures": (
        lambda f: f["verified"]["psnr_db"][SIDE].update(median=29.94),
        ["side lost much in its video: PSNR 29.9 dB at the median, 41.5", "--video.crf"],
    ),
    "coarse colours": (
        lambda f: f["verified"].update(colour_error={SIDE: 31.0}),
        ["side: in every tenth frame the colour of some 8x8 pixels is 31 of 255 off", "pix_fmt=yuv444p"],
    ),
    "action is state": (lambda f: f["agreement"].update(state=0.95), ["In 95% of the rows", "action_from=next_state"]),
}


def test_the_reported_bags_have_the_warnings_they_should(figures: dict[str, Any]) -> None:
    assert [warning.kind for warning in warnings_of(figures)] == ["refused bags", "few episodes", "left out"]


@pytest.mark.parametrize("kind", EDITS)
def test_each_warning_comes_with_its_cause(figures: dict[str, Any], kind: str) -> None:
    edit, expected = EDITS[kind]
    changed = json.loads(json.dumps(figures))
    edit(changed)
    kind = {"coarse colours": "coarse pictures"}.get(kind, kind)
    (warning,) = [warning for warning in warnings_of(changed) if warning.kind == kind]
    assert all(part in warning.sentence for part in expected), warning.sentence
    assert kind not in [before.kind for before in warnings_of(figures)]


def test_advice_names_options_as_they_are_given() -> None:
    """Each `--option=value` of a warning, put on the command line, is understood and makes sense."""
    source = inspect.getsource(report_warnings).replace("\\", "")
    advised = re.findall(r"--[a-z_.]+='[^']*'|--[a-z_.]+=[^\s.;,)\"']+", source)
    assert len(advised) >= 4
    for option in advised:
        given = option.replace("'", "").replace('" + stream["topic"] + "', "/joint_states")
        if given.startswith("--episodes.by=annotations"):
            continue  # wants a file beside it
        config = parse(ConvertConfig, ["--bags=bags", "--embodiment=robot.yaml", "--output=out", given])
        check_options(config)


def test_a_long_word_in_a_warning_does_not_widen_the_page() -> None:
    """Paths have no blanks to break a line at."""
    (rule,) = re.findall(r"\.cautions li\{([^}]*)\}", STYLE)
    assert "overflow-wrap:anywhere" in rule
    assert "min-width:0" in rule


def test_of_many_episodes_those_with_warnings_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_policy_training.conversion.report.DRAWN", 4)
    lengths = tuple(40 if episode == 7 else 6 for episode in range(12))
    dataset = write_dataset(tmp_path, usual, lengths)
    write_report(dataset)
    told = json.loads((dataset / "report.json").read_text())
    assert len(told["drawn"]) == 4
    assert 7 in told["drawn"]
    assert len(told["episodes"]) == 12
    assert "4 of 12 are drawn" in Page((dataset / "report.html").read_text()).words


def test_a_curve_keeps_its_spike() -> None:
    values = np.zeros(5000)
    values[1234], values[4321] = 5.0, -3.0
    svg, low, high = curves([("s", values)])
    assert (low, high) == (-3.0, 5.0)
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg)[1].split()]
    assert len(points) < 400
    assert min(points, key=lambda p: p[1])[0] == pytest.approx(1234 / 4999 * WIDTH, abs=0.1)
    assert max(points, key=lambda p: p[1])[0] == pytest.approx(4321 / 4999 * WIDTH, abs=0.1)
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    assert all(0 <= y <= HEIGHT for _, y in points)


def test_drawings_of_what_never_changes() -> None:
    svg, low, high = curves([("s", np.full(3, 2.0))])
    assert low < 2.0 < high
    assert "nan" not in svg
    assert "nan" not in bars([0, 0, 0])
