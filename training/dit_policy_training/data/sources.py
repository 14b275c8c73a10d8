"""Which datasets a run trains on: a folder, a repository of the Hugging Face hub, or several with weights."""

from dataclasses import dataclass
from pathlib import Path


@dataclass
class DatasetSource:
    """One of several datasets: a folder or a repository of the hub."""

    path: Path | None = None  # folder of a LeRobotDataset v3
    repo_id: str = ""  # or its name on the hub
    revision: str = ""  # there: branch, tag or commit
    weight: float = 0.0  # share of the samples, relative to the other datasets'; 0: as many as it has frames
