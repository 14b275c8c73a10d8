import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent))  # for toy_robot and converting, under pytest's importlib mode

import pytest
import torch
import toy_robot
from converting import Launcher, config_for
from dit_policy_training.conversion.options import VideoOptions
from dit_policy_training.convert import convert
from dit_policy_training.loop.options import TrainConfig
from rich.console import Console
from small_run import small_config

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.tiny_clip import make_tiny_clip

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def embodiment_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embodiment") / "toy.yaml"
    path.write_text(toy_robot.EMBODIMENT)
    return path


@pytest.fixture(scope="session")
def embodiment(embodiment_file: Path) -> Embodiment:
    return Embodiment.load(embodiment_file)


@pytest.fixture(scope="session")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes: two tasks, two storages, two lengths."""
    folder = tmp_path_factory.mktemp("bags")
    toy_robot.write_bag(folder / "a", toy_robot.messages(3.0, "push the red block"))
    toy_robot.write_bag(folder / "b", toy_robot.messages(2.2, "push the blue block"), toy_robot.StoragePlugin.SQLITE3)
    toy_robot.write_bag(folder / "c", toy_robot.messages(2.2, "push the red block"))
    return folder


@pytest.fixture(scope="session")
def dataset(bags: Path, embodiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three episodes converted, with videos."""
    output = tmp_path_factory.mktemp("dataset") / "video"
    assert convert(config_for(bags, embodiment_file, output), Console(quiet=True)) == []
    return output


@pytest.fixture(scope="session")
def png_dataset(bags: Path, embodiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with lossless pictures."""
    output = tmp_path_factory.mktemp("dataset") / "png"
    config = config_for(bags, embodiment_file, output, video=VideoOptions(use_videos=False))
    assert convert(config, Console(quiet=True)) == []
    return output


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP text tower of a few hundred weights."""
    folder = tmp_path_factory.mktemp("tiny_clip")
    make_tiny_clip(folder, ["push the red block", "push the blue block"], hidden_size=16, num_layers=1)
    return folder


@pytest.fixture
def config(dataset: Path, tmp_path: Path, text_model: Path) -> TrainConfig:
    """A run of seconds on the three episodes, into a folder that is not there yet."""
    return small_config(dataset, tmp_path / "run", text_model)


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    started = Launcher(tmp_path_factory.mktemp("printed"))
    yield started
    started.close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
