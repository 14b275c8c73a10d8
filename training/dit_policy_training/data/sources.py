"""Which datasets a run trains on: a folder, a repository of the Hugging Face hub, or several with weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_policy_training.data.errors import DatasetError


@dataclass
class DatasetSource:
    """One of several datasets: a folder or a repository of the hub."""

    path: Path | None = None  # folder of a LeRobotDataset v3
    repo_id: str = ""  # or its name on the hub
    revision: str = ""  # there: branch, tag or commit
    weight: float = 0.0  # share of the samples, relative to the other datasets'; 0: as many as it has frames


@dataclass(frozen=True)
class ResolvedSource:
    """A dataset on this machine. `weight` is DatasetSource's; `name` is what messages call it."""

    root: Path
    weight: float
    name: str


def resolve(config: Any) -> list[ResolvedSource]:
    """The datasets that a configuration's dataset_path, dataset_repo_id or datasets name, downloaded if need be."""
    if config.dataset_path is not None:
        return [ResolvedSource(Path(config.dataset_path), 0.0, Path(config.dataset_path).name)]
    raise DatasetError("no dataset is given: --dataset_path=FOLDER, --dataset_repo_id=NAME or --datasets")
