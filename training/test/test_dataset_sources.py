"""Which datasets a run trains on: folders and weights checked, and what the hub answers, told at its HTTP border."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.frames import gather, open_frames
from dit_policy_training.data.sources import DatasetSource, ResolvedSource, resolve
from dit_policy_training.data.table import load_table, load_tables
from dit_policy_training.data.windows import Windows
from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.trainer import Trainer
from huggingface_hub.utils._http import default_client_factory
from small_run import QUIET, rows_of

from dit_policy_ros.policy.checkpoint import load_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Choice:
    """What a run's configuration has of this."""

    dataset_path: Path | None = None
    dataset_repo_id: str = ""
    dataset_revision: str = ""
    datasets: list[DatasetSource] = field(default_factory=list)
    embodiment: Path | None = None


def test_exactly_one_way_to_name_the_datasets() -> None:
    with pytest.raises(
        DatasetError, match="no dataset is given: give --dataset_path=FOLDER, --dataset_repo_id=NAME or"
    ):
        resolve(Choice())
    with pytest.raises(DatasetError, match="--dataset_path and --dataset_repo_id exclude each other"):
        resolve(Choice(dataset_path=Path("x"), dataset_repo_id="a/b"))
    with pytest.raises(DatasetError, match="--dataset_revision=main is for --dataset_repo_id, which is not given"):
        resolve(Choice(dataset_path=Path("x"), dataset_revision="main"))
    with pytest.raises(DatasetError, match=r"lerobot/pusht is not a LeRobotDataset: .*--dataset_repo_id=lerobot/pusht"):
        resolve(Choice(dataset_path=Path("lerobot/pusht")))
    with pytest.raises(DatasetError, match=r"test_dataset_sources.py is not a LeRobotDataset: it is a file"):
        resolve(Choice(dataset_path=Path(__file__)))


def test_a_list_of_datasets_is_checked(dataset: Path) -> None:
    wrong = [DatasetSource(), DatasetSource(dataset, "a/b"), DatasetSource(dataset, revision="r", weight=-1.0)]
    with pytest.raises(DatasetError) as error_info:
        resolve(Choice(datasets=wrong))
    message = str(error_info.value)
    for expected in (r"datasets\[0\] needs either", r"datasets\[1\] needs either", r"datasets\[2\] has the revision r"):
        assert re.search(expected, message)
    assert "datasets[2] has the weight -1.0" in message
    assert "give every dataset a weight above 0, or none of them; got [0.0, 0.0, -1.0]" in message
    sources = resolve(Choice(datasets=[DatasetSource(dataset, weight=2.0), DatasetSource(dataset, weight=1.0)]))
    assert sources == [ResolvedSource(dataset, 2.0, "video"), ResolvedSource(dataset, 1.0, "video")]


def test_several_datasets_are_one_table(dataset: Path, png_dataset: Path, tmp_path: Path) -> None:
    """Videos and pictures in tables together; tasks are united by their text, in whatever order each has them."""
    other = shutil.copytree(png_dataset, tmp_path / "other")
    path = other / "meta" / "tasks.parquet"
    tasks = pd.read_parquet(path)
    swapped = {"push the red block": "push the green block"}
    tasks.rename(index=swapped)[::-1].to_parquet(path)
    one, two = load_table(dataset), load_table(other)
    both = load_tables([ResolvedSource(dataset, 3.0, "one"), ResolvedSource(other, 1.0, "two")])
    assert len(both) == len(one) + len(two)
    assert both.tasks == ["push the red block", "push the blue block", "push the green block"]
    assert both.name == "one + two"
    assert [(part.first, part.rows, part.weight) for part in both.parts] == [(0, 71, 3.0), (71, 71, 1.0)]
    assert both.episodes == 6
    rows = np.random.default_rng(0).permutation(len(both))
    expected = [gather(Windows(each, 2, 6), open_frames(each), np.arange(71)) for each in (one, two)]
    for cache in ("memory", "off"):
        batch = gather(Windows(both, 2, 6), open_frames(both, cache=cache), rows)
        for place, row in enumerate(rows):
            theirs, at = expected[row // 71], row % 71
            assert batch["task"][place] == theirs["task"][at]
            for key in ("action", "action_is_pad", "observation.state", *both.image_shapes):
                assert np.array_equal(batch[key][place], theirs[key][at]), (cache, key, row)


def test_datasets_that_differ_are_told_apart(dataset: Path, tmp_path: Path) -> None:
    other = shutil.copytree(dataset, tmp_path / "other")
    (other / "embodiment.yaml").unlink()
    path = other / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"]["action"]["names"] = ["x", "y"]
    info["features"].pop("observation.images.side")
    path.write_text(json.dumps(info))
    plain = shutil.copytree(dataset, tmp_path / "plain")
    (plain / "embodiment.yaml").unlink()
    with pytest.raises(DatasetError) as error_info:
        load_tables([ResolvedSource(plain, 0.0, "one"), ResolvedSource(other, 0.0, "two")])
    message = str(error_info.value)
    assert "action: ['turn', 'lift'] in one, ['x', 'y'] in two" in message
    assert re.search(r"cameras: .*side.* in one, .*hand.* in two", message)


@dataclass
class Hub:
    """A hub of one repository, answered from a folder; `answer` may refuse a request first."""

    folder: Path
    tags: tuple[str, ...] = ("v3.0", "main")
    answer: Callable[[httpx.Request], httpx.Response | None] = lambda _: None
    asked: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if (refusal := self.answer(request)) is not None:
            return refusal
        path = request.url.path
        if found := re.fullmatch(r"/api/datasets/toy/robot/revision/(.+)", path):
            if found[1] not in (*self.tags, COMMIT):
                return httpx.Response(404, headers={"X-Error-Code": "RevisionNotFound"}, request=request)
            return httpx.Response(200, json={"id": "toy/robot", "sha": COMMIT}, request=request)
        if re.match(rf"/api/datasets/toy/robot/tree/{COMMIT}", path):
            return httpx.Response(200, json=list(self._tree()), request=request)
        if found := re.fullmatch(rf"/datasets/toy/robot/resolve/{COMMIT}/(.+)", path):
            data = (self.folder / found[1]).read_bytes()
            headers = {"ETag": f'"{hash(data):x}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(data))}
            return httpx.Response(200, headers=headers, content=b"" if request.method == "HEAD" else data)
        return httpx.Response(404, headers={"X-Error-Code": "RepoNotFound"}, request=request)

    def _tree(self) -> Iterator[dict]:
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(self.folder).as_posix()
                yield {"type": "file", "path": name, "size": path.stat().st_size, "oid": f"{hash(name):040x}"[-40:]}

    def fetched(self) -> list[str]:
        """The files whose content was asked for."""
        return [
            r.url.path.split(f"{COMMIT}/")[1] for r in self.asked if r.method == "GET" and "/resolve/" in r.url.path
        ]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's library, allowed to ask, with an empty cache and no account."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HUGGINGFACE_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub"


@pytest.fixture
def hub(dataset: Path, cache: Path) -> Iterator[Hub]:
    made = Hub(dataset)

    def client() -> httpx.Client:
        usual = default_client_factory()
        hooks = usual.event_hooks
        usual.close()
        return httpx.Client(transport=httpx.MockTransport(made), event_hooks=hooks, follow_redirects=True)

    huggingface_hub.set_client_factory(client)
    yield made
    huggingface_hub.set_client_factory(default_client_factory)


CHOICE = Choice(dataset_repo_id="toy/robot")


def test_a_repository_is_downloaded_once(
    hub: Hub, dataset: Path, monkeypatch: pytest.MonkeyPatch, embodiment_file: Path
) -> None:
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_secret")
    (source,) = resolve(CHOICE)
    assert source.name == "robot"
    described = [request for request in hub.asked if request.url.path.startswith("/api/datasets/")]
    assert {request.headers.get("authorization") for request in described} == {"Bearer hf_secret"}
    assert hub.fetched()[0].startswith(("meta/", "embodiment.yaml", "conversion.json"))
    assert load_table(source.root).fingerprint == load_table(dataset).fingerprint
    open_frames(load_table(source.root))

    hub.asked.clear()
    assert resolve(CHOICE) == [source]
    assert hub.fetched() == []

    hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve(CHOICE) == [source]
    assert hub.asked == []


def test_only_the_cameras_that_are_trained_on_are_downloaded(hub: Hub, embodiment_file: Path, tmp_path: Path) -> None:
    text = embodiment_file.read_text().replace("  hand: {", "  # hand: {")
    (tmp_path / "one.yaml").write_text(text)
    resolve(Choice(dataset_repo_id="toy/robot", embodiment=tmp_path / "one.yaml"))
    videos = [name for name in hub.fetched() if name.startswith("videos/")]
    assert videos
    assert all("observation.images.side" in name for name in videos)


def test_main_serves_where_the_format_has_no_tag(hub: Hub, dataset: Path) -> None:
    hub.tags = ("main",)
    (source,) = resolve(CHOICE)
    assert load_table(source.root).fingerprint == load_table(dataset).fingerprint


def test_another_format_is_refused_before_anything_large_is_fetched(hub: Hub, dataset: Path, tmp_path: Path) -> None:
    hub.folder = shutil.copytree(dataset, tmp_path / "old")
    info = json.loads((hub.folder / "meta/info.json").read_text()) | {"codebase_version": "v2.1"}
    (hub.folder / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match=r"format v2\.1, v3\.0 is needed; LeRobot converts"):
        resolve(CHOICE)
    assert not [name for name in hub.fetched() if name.startswith(("data/", "videos/"))]


def refuse(status: int, code: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(status, headers={"X-Error-Code": code}, request=request)


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("Name or service not known", request=request)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refuse(404, "RepoNotFound"), r"dataset toy/robot .* does not exist, or is private: .* set HUGGINGFACE_TOKEN"),
        (refuse(401, "RepoNotFound"), r"dataset toy/robot .* does not exist, or is private"),
        (refuse(403, "GatedRepo"), r"dataset toy/robot .* is gated: ask for access on its page, then set HUGGINGFACE"),
        (refuse(404, "RevisionNotFound"), r"dataset toy/robot .* has no revision 'main'"),
        (unreachable, r"not \(or not wholly\) in the cache, .*ConnectError Name or service not known.*--dataset_path"),
        (refuse(500, ""), r"dataset toy/robot .*500"),
    ],
)
def test_what_the_hub_refuses_is_told(hub: Hub, answer: Callable, message: str) -> None:
    hub.answer = answer
    with pytest.raises(DatasetError, match=message):
        resolve(CHOICE)


def test_a_token_that_is_not_enough_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    hub.answer = refuse(401, "RepoNotFound")
    with pytest.raises(DatasetError, match="the token given must be one that may read it"):
        resolve(CHOICE)


def test_names_that_no_repository_has_are_told(cache: Path) -> None:
    with pytest.raises(DatasetError, match=r"--dataset_repo_id is 'a/b/c'; expected NAME or OWNER/NAME"):
        resolve(Choice(dataset_repo_id="a/b/c"))


def test_offline_with_an_empty_cache_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetError, match="HF_HUB_OFFLINE"):
        resolve(CHOICE)


@pytest.mark.timeout(300)
def test_a_run_on_several_datasets_without_an_embodiment(config: TrainConfig, dataset: Path, tmp_path: Path) -> None:
    """From a file, from memory and decoded on the way: the same samples; of the pictures, only the rounding differs."""
    bare = shutil.copytree(dataset, tmp_path / "bare")
    (bare / "embodiment.yaml").unlink()
    sources = [DatasetSource(bare, weight=1.0), DatasetSource(shutil.copytree(bare, tmp_path / "two"), weight=3.0)]
    losses = []
    for cache in ("memory", "disk", "off"):
        options: dict[str, Any] = {"dataset_path": None, "datasets": sources, "cache": cache, "num_workers": 1}
        run = replace(config, **options, output_dir=tmp_path / cache, train_steps=4, log_freq=1)
        folder = Trainer(run, QUIET).train()
        losses.append([row["loss"] for row in rows_of(run.output_dir)])
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)
    assert load_checkpoint(folder).config.tasks == ["push the red block", "push the blue block"]
